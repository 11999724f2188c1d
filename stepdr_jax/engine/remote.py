"""Sampling on vLLM or SGLang servers: token ids out, token ids and log-probabilities back, as `Engine` has it.

A server holds no session: each turn sends all of the session's ids and relies on the server's prefix cache. All turns
of a session go to one server, and a header keeps them on one replica behind a router. `cache_salt` (vLLM) keeps K/V of
one version of the weights from those of the next; SGLang empties its cache when its weights change.

Weights are published as Hugging Face folders (`publish.WeightsFolder`); then each server is told to read one:

    SGLang  POST /update_weights_from_disk; every reply of /generate states the version that sampled it
    vLLM    POST /collective_rpc (reload_weights), POST /update_weight_version; GET /weight_info, before and after every
            turn, states the version. These exist in its development mode only (VLLM_SERVER_DEV_MODE=1)

A server that states another version, as after a restart, is sent the current weights, and what it sampled before that
is not used. So a server that is killed loses nothing but time, as far as the endpoint's retries go. Both servers count
their seed anew in every request, so a turn's seed is derived from the session's seed and its length: equal requests ask
for equal samples, as far as the server's numerics go.
"""

import asyncio
import dataclasses
import hashlib
from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path
from typing import Any

from stepdr_jax.endpoint import Endpoint, EndpointError
from stepdr_jax.engine.engine import Generation, SampleParams
from stepdr_jax.engine.publish import WeightsFolder
from stepdr_jax.runtime import distributed

DIALECTS = ("vllm", "sglang")
ROUTE_HEADER = "X-Session-ID"  # what routers in front of several servers hash
_TRIES = 2  # of a turn whose server turns out to have other weights
_Sampled = tuple[list[int], list[float], bool]  # ids, log-probabilities, whether a stop id ended them


@dataclasses.dataclass
class _Counts:
    requests: int = 0
    sampled_tokens: int = 0
    sent_tokens: int = 0
    weights_sent_again: int = 0  # to a server that was started anew


class _Server:
    """An endpoint and how often it was sent weights."""

    def __init__(self, endpoint: Endpoint):
        self.endpoint, self.loads, self.loading = endpoint, 0, asyncio.Lock()


class RemoteEngine:
    """An engine on servers that have equal weights; each may be a router in front of replicas that take weights
    together.

    Args:
        endpoints: of the servers, without a path.
        dialect: "vllm" (its /v1/completions; start it with --logprobs-mode processed_logprobs to sample at temperatures
            other than 1) or "sglang" (its /generate).
        model: name of the model at a vLLM server.
        max_len: tokens of a sequence that the servers take.
        stop_ids: ids that end a generation.
        version: of the weights to sample with.
        published: path of these weights, sent to a server before its first turn; None: those that the servers have.
        folder: writes new weights where the servers read them; needed by `update_weights`.
    """

    sleeping = False  # see `sleep`

    def __init__(
        self,
        endpoints: Sequence[Endpoint],
        dialect: str,
        *,
        model: str = "",
        max_len: int,
        stop_ids: Sequence[int],
        version: int = 0,
        published: str | None = None,
        folder: WeightsFolder | None = None,
    ):
        if dialect not in DIALECTS:
            raise ValueError(f"expected dialect among {', '.join(DIALECTS)}, got {dialect!r}")
        self.dialect, self.model, self.max_len = dialect, model, max_len
        self.stop_ids, self.version, self.folder = tuple(stop_ids), version, folder
        self._servers = [_Server(endpoint) for endpoint in endpoints]
        self._sessions: dict[str, list[int]] = {}
        self._counts = _Counts()
        self._published = published

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
        place = int.from_bytes(hashlib.blake2b(session.encode(), digest_size=4).digest(), "little")
        server = self._servers[place % len(self._servers)]
        ask = self._vllm if self.dialect == "vllm" else self._sglang
        sampled, logprobs, stopped = await ask(server, session, ids, params, limit)
        self._check(server.endpoint, sampled, logprobs, stopped, limit)
        self._sessions[session] = [*ids, *sampled]
        self._counts.requests += 1
        self._counts.sent_tokens += len(ids)
        self._counts.sampled_tokens += len(sampled)
        finish = "stop" if stopped else "full" if limit < params.max_tokens else "length"
        return Generation(tuple(sampled), tuple(map(float, logprobs)), finish, version)

    async def close(self, session: str) -> None:
        self._sessions.pop(session, None)

    async def stop(self) -> None:
        """Closes the connections; a later request opens new ones."""
        for server in self._servers:
            await server.endpoint.close()

    async def sleep(self) -> None:
        """Does nothing: a server's memory is not the trainer's, so it keeps its weights while the trainer works."""

    async def update_weights(self, params: dict, version: int) -> None:
        """Publishes the weights and has every server read them. Call it when no request runs, in every process.

        Raises EndpointError when a server does not take them, ValueError without a folder.
        """
        if self.folder is None:
            raise ValueError("expected a folder for published weights, got none")
        # In a thread: the event loop goes on answering the tool host's pings.
        path = await asyncio.to_thread(self.folder.publish, params, version)
        if distributed.is_lead():
            await asyncio.gather(*(self._send_weights(server, path) for server in self._servers))
        await asyncio.to_thread(distributed.barrier, f"weights {path} are loaded")
        for server in self._servers:
            server.loads += 1
        self._published, self.version = path, version
        self.folder.keep_only(path)

    async def _send_again(self, server: _Server, loads: int) -> None:
        """Has the server read the current weights, unless another session has done that since there were `loads`."""
        async with server.loading:
            if server.loads == loads:
                await self._send_weights(server, str(self._published))
                self._counts.weights_sent_again += bool(loads)
                server.loads += 1

    async def _send_weights(self, server: _Server, path: str) -> None:
        version = Path(path).name
        if self.dialect == "sglang":
            body: dict[str, Any] = {"model_path": path, "flush_cache": True, "weight_version": version}
            reply = await server.endpoint.post("/update_weights_from_disk", body)
        else:
            body = {"method": "reload_weights", "kwargs": {"weights_path": path}}
            await server.endpoint.post("/collective_rpc", body)
            reply = await server.endpoint.post("/update_weight_version", {"new_version": version})
        if not reply.get("success"):
            url = server.endpoint.base_url
            raise EndpointError(f"{url} did not take the weights in {path}: {reply.get('message')}")

    @property
    def _stated_version(self) -> str:
        """What a server with the current weights states."""
        return Path(self._published).name if self._published else ""

    def stats(self) -> dict[str, float]:
        """Totals since the engine was made."""
        return dataclasses.asdict(self._counts) | {"sessions": len(self._sessions), "version": self.version}

    async def _vllm(self, server: _Server, session: str, ids: list[int], params: SampleParams, limit: int) -> _Sampled:
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
            "cache_salt": f"version {self._stated_version or self.version}",
        }

        async def sample() -> dict:
            return await server.endpoint.post("/v1/completions", body, {ROUTE_HEADER: session})

        reply = await self._with_current_weights(server, sample)
        try:
            choice = reply["choices"][0]
            return choice["token_ids"], choice["logprobs"]["token_logprobs"], _stopped(choice["finish_reason"])
        except (KeyError, IndexError, TypeError):
            raise _nonsense(
                server.endpoint, reply, "choices[0] with token_ids (vLLM 0.10.2 and later) and logprobs"
            ) from None

    async def _sglang(
        self, server: _Server, session: str, ids: list[int], params: SampleParams, limit: int
    ) -> _Sampled:
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

        async def sample() -> dict:
            return await server.endpoint.post("/generate", body, {ROUTE_HEADER: session})

        reply = await self._with_current_weights(server, sample)
        try:
            meta = reply["meta_info"]
            pairs = meta["output_token_logprobs"]
            return [pair[1] for pair in pairs], [pair[0] for pair in pairs], _stopped(meta["finish_reason"]["type"])
        except (KeyError, IndexError, TypeError):
            raise _nonsense(server.endpoint, reply, "meta_info with output_token_logprobs and finish_reason") from None

    async def _with_current_weights(self, server: _Server, sample: Callable[[], Awaitable[dict]]) -> dict:
        """The reply of a server that states the current weights; one that has lost them is sent them again."""
        if self._published is None:
            return await sample()
        vllm = self.dialect == "vllm"
        for left in reversed(range(_TRIES)):
            loads = server.loads
            if (vllm and await self._stated(server, {}) != self._stated_version) or not loads:
                await self._send_again(server, loads)
                loads = server.loads
            reply = await sample()
            stated = await self._stated(server, reply)
            if stated == self._stated_version and (server.loads == loads or not vllm):
                return reply
            if left:
                await self._send_again(server, loads)
        raise EndpointError(
            f"{server.endpoint.base_url} sampled with weights of version {stated}, expected {self._stated_version}; "
            "check that nobody else sends it weights, that every replica behind it takes them, and that it states "
            "its version"
        )

    async def _stated(self, server: _Server, reply: dict) -> str | None:
        """The version of the server's weights: of those that sampled the reply (SGLang), or of those it has now
        (vLLM)."""
        if self.dialect == "vllm":
            return (await server.endpoint.get("/weight_info")).get("weight_version")
        meta = reply.get("meta_info")
        return meta.get("weight_version") if isinstance(meta, dict) else None

    def _check(self, endpoint: Endpoint, sampled: list, logprobs: list, stopped: bool, limit: int) -> None:
        """The contract of `Generation`: a trainer must not learn from ids that were not sampled as it thinks."""
        problem = None
        if not sampled or len(sampled) != len(logprobs) or len(sampled) > limit:
            problem = f"{len(sampled)} ids and {len(logprobs)} log-probabilities where 1 to {limit} were asked for"
        elif any(id_ in self.stop_ids for id_ in sampled[:-1]) or stopped != (sampled[-1] in self.stop_ids):
            problem = f"finish {'stop' if stopped else 'length'}, but the stop ids {self.stop_ids} say otherwise"
        elif any(value is None or value > 0 or value != value for value in logprobs):
            problem = "log-probabilities that are not numbers up to 0"
        if problem:
            raise EndpointError(f"{endpoint.base_url} answered with {problem}; check its version and settings")


def _nonsense(endpoint: Endpoint, reply: dict, wanted: str) -> EndpointError:
    return EndpointError(f"{endpoint.base_url}: expected {wanted} in the reply, got {repr(reply)[:300]}")


def _stopped(reason: str) -> bool:
    """Whether a turn ended by a stop id, not by its length. Raises KeyError for any other end, as of an aborted
    request."""
    return {"stop": True, "length": False}[reason]


def _seed(seed: int, length: int) -> int:
    """A seed for the turn that begins at `length`; a server counts a request's tokens from 0."""
    digest = hashlib.blake2b(f"{seed} {length}".encode(), digest_size=4).digest()
    return int.from_bytes(digest, "little") >> 1
