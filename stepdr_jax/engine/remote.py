"""Sampling on a vLLM or SGLang server: token ids out, token ids and log-probabilities back, as `Engine` has it.

The server holds no session: each turn sends all of the session's ids and relies on the server's prefix cache, to which a
header keeps a session's turns. `cache_salt` (vLLM) keeps K/V of one version of the weights from those of the next; SGLang
empties its cache when its weights change. So a server that is killed loses nothing but time, as far as the endpoint's retries
go, except weights that it was sent: SGLang says with every reply which version it sampled with, and one that has come back with
its first weights is sent the current ones again before anything it samples is used. Both servers count their seed anew in every request, so a turn's seed is the
session's and its length: equal requests ask for equal samples, as far as the server's numerics go.
"""

import asyncio
import dataclasses
import hashlib
from collections.abc import Callable, Sequence

from stepdr_jax.endpoint import Endpoint, EndpointError
from stepdr_jax.engine.engine import Generation, SampleParams

DIALECTS = ("vllm", "sglang")
ROUTE_HEADER = "X-Session-ID"  # what routers in front of several servers hash


@dataclasses.dataclass
class _Counts:
    requests: int = 0
    sampled_tokens: int = 0
    sent_tokens: int = 0
    weights_sent_again: int = 0  # to a server that was started anew


class RemoteEngine:
    """An engine on one server or a router in front of several.

    Args:
        endpoint: of the server, without a path.
        dialect: "vllm" (its /v1/completions; start it with --logprobs-mode processed_logprobs to sample at temperatures
            other than 1) or "sglang" (its /generate).
        model: name of the model at a vLLM server.
        max_len: tokens of a sequence that the server takes.
        stop_ids: ids that end a generation.
        version: of the weights that the server has now.
        publish: called with (params, version) by `update_weights`; writes a Hugging Face checkpoint where the server can
            read it and returns its path. SGLang only: vLLM has no endpoint that reads weights from a path.
    """

    def __init__(
        self,
        endpoint: Endpoint,
        dialect: str,
        *,
        model: str = "",
        max_len: int,
        stop_ids: Sequence[int],
        version: int = 0,
        publish: Callable[[dict, int], str] | None = None,
    ):
        if dialect not in DIALECTS:
            raise ValueError(f"expected dialect among {', '.join(DIALECTS)}, got {dialect!r}")
        self.endpoint, self.dialect, self.model, self.max_len = endpoint, dialect, model, max_len
        self.stop_ids, self.version, self.publish = tuple(stop_ids), version, publish
        self._sessions: dict[str, list[int]] = {}
        self._counts = _Counts()
        self._published: str | None = None  # where the current weights lie; None: those that the server started with
        self._sending = asyncio.Lock()

    async def generate(self, session: str, new_ids: Sequence[int], params: SampleParams) -> Generation:
        """See `Engine`. Raises EndpointError when the server cannot be reached or breaks the contract."""
        known = self._sessions.get(session, [])
        ids = [*known, *map(int, new_ids)]
        if not ids:
            raise ValueError(f"session {session!r} is empty: expected new_ids to start from")
        room = self.max_len - len(ids)
        if room < 1:
            return Generation((), (), "full", self.version)
        limit, version = min(params.max_tokens, room), self.version
        ask = self._vllm if self.dialect == "vllm" else self._sglang
        sampled, logprobs, stopped = await ask(session, ids, params, limit)
        self._check(sampled, logprobs, stopped, limit)
        self._sessions[session] = [*ids, *sampled]
        self._counts.requests += 1
        self._counts.sent_tokens += len(ids)
        self._counts.sampled_tokens += len(sampled)
        finish = "stop" if stopped else "full" if limit < params.max_tokens else "length"
        return Generation(tuple(sampled), tuple(map(float, logprobs)), finish, version)

    async def close(self, session: str) -> None:
        self._sessions.pop(session, None)

    async def update_weights(self, params: dict, version: int) -> None:
        """Has the server read the weights that `publish` writes. Raises EndpointError, ValueError without `publish`."""
        if self.publish is None or self.dialect != "sglang":
            raise ValueError(
                "expected an SGLang server and a publish function; restart a vLLM server with the new weights"
            )
        path = self.publish(params, version)
        async with self._sending:
            await self._send_weights(path, version)
            self._published, self.version = path, version

    async def _send_weights(self, path: str, version: int) -> None:
        body = {"model_path": path, "flush_cache": True, "weight_version": str(version)}
        reply = await self.endpoint.post("/update_weights_from_disk", body)
        if not reply.get("success"):
            raise EndpointError(f"{self.endpoint.base_url} did not take the weights in {path}: {reply.get('message')}")

    def stats(self) -> dict[str, float]:
        """Totals since the engine was made."""
        return dataclasses.asdict(self._counts) | {"sessions": len(self._sessions), "version": self.version}

    async def _vllm(self, session, ids, params, limit):
        body = {
            "model": self.model,
            "prompt": ids,
            "max_tokens": limit,
            "temperature": params.temperature,
            "top_p": 1.0,
            "top_k": -1,
            "seed": _seed(params.seed, len(ids)),
            "logprobs": 0,
            "return_token_ids": True,
            "stop_token_ids": list(self.stop_ids),
            "ignore_eos": True,  # only our own stop ids stop
            "cache_salt": f"version {self.version}",
        }
        reply = await self.endpoint.post("/v1/completions", body, {ROUTE_HEADER: session})
        try:
            choice = reply["choices"][0]
            return choice["token_ids"], choice["logprobs"]["token_logprobs"], _stopped(choice["finish_reason"])
        except (KeyError, IndexError, TypeError):
            raise self._nonsense(reply, "choices[0] with token_ids (vLLM 0.10.2 and later) and logprobs") from None

    async def _sglang(self, session, ids, params, limit):
        sampling = {
            "max_new_tokens": limit,
            "temperature": params.temperature,
            "top_p": 1.0,
            "top_k": -1,
            "sampling_seed": _seed(params.seed, len(ids)),
            "stop_token_ids": list(self.stop_ids),
            "ignore_eos": True,
        }
        body = {"input_ids": ids, "sampling_params": sampling, "return_logprob": True}
        reply = await self._with_current_weights(body, session)
        try:
            meta = reply["meta_info"]
            pairs = meta["output_token_logprobs"]
            return [pair[1] for pair in pairs], [pair[0] for pair in pairs], _stopped(meta["finish_reason"]["type"])
        except (KeyError, IndexError, TypeError):
            raise self._nonsense(reply, "meta_info with output_token_logprobs and finish_reason") from None

    async def _with_current_weights(self, body: dict, session: str) -> dict:
        """The reply of a server that has the weights it was sent; one that has lost them gets them again."""
        version = self.version
        for last in (False, True):
            sent = self._counts.weights_sent_again
            reply = await self.endpoint.post("/generate", body, {ROUTE_HEADER: session})
            meta = reply.get("meta_info")
            has = meta.get("weight_version") if isinstance(meta, dict) else None
            if self._published is None or has == str(version):
                return reply
            if last:
                raise EndpointError(
                    f"{self.endpoint.base_url} sampled with weights of version {has}, expected {version}; "
                    "check that every server behind it takes new weights and says its weight_version"
                )
            async with self._sending:
                if self._counts.weights_sent_again == sent:  # else another session has seen to it
                    await self._send_weights(self._published, version)
                    self._counts.weights_sent_again += 1

    def _check(self, sampled, logprobs, stopped, limit) -> None:
        """The contract of `Generation`: a trainer must not learn from ids that were not sampled as it thinks."""
        problem = None
        if not sampled or len(sampled) != len(logprobs) or len(sampled) > limit:
            problem = f"{len(sampled)} ids and {len(logprobs)} log-probabilities where 1 to {limit} were asked for"
        elif any(id_ in self.stop_ids for id_ in sampled[:-1]) or stopped != (sampled[-1] in self.stop_ids):
            problem = f"finish {'stop' if stopped else 'length'}, but the stop ids {self.stop_ids} say otherwise"
        elif any(value is None or value > 0 or value != value for value in logprobs):
            problem = "log-probabilities that are not numbers up to 0"
        if problem:
            raise EndpointError(f"{self.endpoint.base_url} answered with {problem}; check its version and settings")

    def _nonsense(self, reply: dict, wanted: str) -> EndpointError:
        return EndpointError(f"{self.endpoint.base_url}: expected {wanted} in the reply, got {repr(reply)[:300]}")


def _stopped(reason: str) -> bool:
    """Whether a turn ended by a stop id, not by its length. Raises KeyError for any other end, as of an aborted request."""
    return {"stop": True, "length": False}[reason]


def _seed(seed: int, length: int) -> int:
    """A seed for the turn that begins at `length`; a server counts a request's tokens from 0."""
    digest = hashlib.blake2b(f"{seed} {length}".encode(), digest_size=4).digest()
    return int.from_bytes(digest, "little") >> 1
