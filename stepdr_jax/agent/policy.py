"""Who acts in an episode: the protocol, the JAX (or any token-level) engine, and OpenAI-compatible endpoints.

A policy session keeps the episode's context. An engine session keeps token ids: what it sampled is what it sees again,
text is only rendered from ids. An endpoint session keeps messages, because that is all an endpoint offers.

Failures: `act` and `observe` raise on a broken engine or endpoint, never for what the model wrote. The episode loop turns
the exception into an infrastructure outcome, so no failure of ours is ever rewarded 0.
"""

import asyncio
import dataclasses
import json
from typing import TYPE_CHECKING, Any, Protocol

import aiohttp

from stepdr_jax.records import Message
from stepdr_jax.tokens import chat
from stepdr_jax.tokens.log import TokenLog

if TYPE_CHECKING:
    from stepdr_jax.tokens.tokenizer import Tokenizer


class PolicyError(Exception):
    """The policy could not act (endpoint refused, unreachable or answered nonsense); the text names the fix."""


@dataclasses.dataclass(frozen=True)
class Turn:
    """One assistant turn as text. `finish`: "stop" ended by the model, "length" cut by `max_tokens`, "full" context full."""

    text: str
    finish: str
    ids: tuple[int, ...] | None = None


class PolicySession(Protocol):
    """One episode's side of a policy.

    `log` is the token log, or None where no tokens are known. `context_tokens`, where a session has it, is the length of
    the context so far, given tokens that are still to be fed included; the loop cannot enforce a token budget without it.
    """

    log: TokenLog | None

    async def act(self, max_tokens: int) -> Turn: ...

    async def observe(self, texts: list[str], *, tail: str = "") -> None: ...

    async def close(self) -> None: ...


class Policy(Protocol):
    """Starts sessions. `name` is written into trajectories."""

    name: str

    def start(self, messages: list[Message], *, episode_id: str, seed: int) -> PolicySession: ...


# ---------------------------------------------------------------------------------------------------------- engine


class EnginePolicy:
    """A policy over a token-level engine (`JaxEngine` protocol): token-in, token-out.

    Args:
        engine: has `generate(session, new_ids, SampleParams)` and `close(session)`.
        tokenizer: the tokenizer of the engine's model.
        temperature: of sampling; log-probs in the log are at this temperature.
    """

    def __init__(self, engine, tokenizer: "Tokenizer", temperature: float = 1.0, name: str = "engine"):
        self.engine, self.tokenizer, self.temperature, self.name = engine, tokenizer, temperature, name

    def start(self, messages: list[Message], *, episode_id: str, seed: int) -> "EngineSession":
        return EngineSession(self, chat.prompt_ids(self.tokenizer, messages), episode_id, seed)


class EngineSession:
    """The log holds exactly what the engine was fed and what it sampled: an observation that no turn followed is not in
    it, so the log never exceeds the episode's token budget.
    """

    def __init__(self, policy: EnginePolicy, prompt: list[int], episode_id: str, seed: int):
        self.policy, self.episode_id, self.seed = policy, episode_id, seed
        self.log = TokenLog()
        self.context_tokens = len(prompt)
        self._unfed = list(prompt)
        self._closed = True

    async def act(self, max_tokens: int) -> Turn:
        from stepdr_jax.engine.engine import SampleParams  # here, so that endpoint policies run without jax

        params = SampleParams(temperature=self.policy.temperature, max_tokens=max_tokens, seed=self.seed)
        generation = await self.policy.engine.generate(self.episode_id, self._unfed, params)
        if not generation.ids:  # full: the engine has not taken the new ids either
            return Turn("", generation.finish, ())
        self.log.given(self._unfed)
        self.log.sampled(generation.ids, generation.logprobs, generation.version)
        self._unfed = []
        self.context_tokens += len(generation.ids)
        tokenizer = self.policy.tokenizer
        self._closed = generation.ids[-1] == tokenizer.im_end
        return Turn(tokenizer.decode(generation.ids), generation.finish, tuple(generation.ids))

    async def observe(self, texts: list[str], *, tail: str = "") -> None:
        self._unfed = chat.observation_ids(self.policy.tokenizer, texts, closed=self._closed, tail=tail)
        self.context_tokens += len(self._unfed)

    async def close(self) -> None:
        await self.policy.engine.close(self.episode_id)


# -------------------------------------------------------------------------------------------------------- endpoint

RETRIED_STATUS = frozenset({408, 409, 425, 429, 500, 502, 503, 504})


class EndpointPolicy:
    """A policy behind an OpenAI-compatible `/v1/chat/completions`.

    Tool calls travel as text in the ChatML convention of `prompts.system_prompt("full", ...)`; native `tool_calls` and
    `reasoning_content` in a reply are rewritten to that convention, so every trajectory has one format.

    Args:
        base_url: up to and including `/v1` (a missing `/v1` is added).
        model: model name at the endpoint.
        key: API key; empty sends no Authorization header.
        timeout: seconds for one request.
        retries: further tries after a timeout, a connection error or one of RETRIED_STATUS.
        backoff: seconds before the first retry; doubles each time. A Retry-After header is obeyed, up to 60 s.
        concurrency: requests in flight at once.
    """

    def __init__(
        self,
        base_url: str,
        model: str,
        key: str = "",
        *,
        temperature: float = 1.0,
        timeout: float = 300.0,
        retries: int = 4,
        backoff: float = 1.0,
        concurrency: int = 32,
    ):
        base_url = base_url.rstrip("/")
        self.url = (base_url if base_url.endswith("/v1") else base_url + "/v1") + "/chat/completions"
        self.model, self.key, self.name = model, key, model
        self.temperature, self.timeout, self.retries, self.backoff = temperature, timeout, retries, backoff
        self.concurrency = concurrency
        self._http: aiohttp.ClientSession | None = None

    def start(self, messages: list[Message], *, episode_id: str, seed: int) -> "EndpointSession":
        return EndpointSession(self, [{"role": m.role, "content": m.content} for m in messages], seed)

    async def complete(self, messages: list[dict], max_tokens: int, seed: int) -> dict[str, Any]:
        """Returns the reply's JSON body. Raises PolicyError after the last retry, at once when retrying cannot help."""
        body = {
            "model": self.model,
            "messages": messages,
            "max_tokens": max_tokens,
            "temperature": self.temperature,
            "seed": seed,
        }
        wait, problem = self.backoff, ""
        for attempt in range(self.retries + 1):
            try:
                async with self._session().post(self.url, json=body) as reply:
                    text = await reply.text()
                    if reply.status == 200:
                        return _json_object(text, self.url)
                    problem = f"HTTP {reply.status}: {_error_text(text)}"
                    if reply.status not in RETRIED_STATUS:
                        raise PolicyError(f"{self.url} refused model {self.model!r}: {problem}{_advice(reply.status)}")
                    after = reply.headers.get("Retry-After", "")
                    wait = max(wait, min(float(after), 60.0)) if after.replace(".", "", 1).isdigit() else wait
            except (aiohttp.ClientError, TimeoutError) as error:
                problem = f"{type(error).__name__} {error}".strip()
            if attempt < self.retries:
                await asyncio.sleep(wait)
                wait *= 2
        raise PolicyError(
            f"{self.url} failed {self.retries + 1} times, last with {problem}; "
            "check that the endpoint is up and reachable"
        )

    def _session(self) -> aiohttp.ClientSession:
        if self._http is None or self._http.closed:
            headers = {"Authorization": f"Bearer {self.key}"} if self.key else {}
            self._http = aiohttp.ClientSession(
                headers=headers,
                timeout=aiohttp.ClientTimeout(total=self.timeout),
                connector=aiohttp.TCPConnector(limit=self.concurrency),
            )
        return self._http

    async def close(self) -> None:
        """Closes the connections; a later session opens new ones."""
        if self._http is not None:
            await self._http.close()


class EndpointSession:
    """Keeps the messages of one episode. Token counts are the endpoint's own (`usage`), where it reports them."""

    def __init__(self, policy: EndpointPolicy, messages: list[dict], seed: int):
        self.policy, self.messages, self.seed = policy, messages, seed
        self.log = None
        self.context_tokens: int | None = None
        self.sampled_tokens = 0

    async def act(self, max_tokens: int) -> Turn:
        reply = await self.policy.complete(self.messages, max_tokens, self.seed)
        try:
            choice = reply["choices"][0]
            text = _message_text(choice["message"])
        except (KeyError, IndexError, TypeError) as error:
            raise PolicyError(
                f"{self.policy.url}: expected choices[0].message in the reply, got {repr(reply)[:300]}"
            ) from error
        usage = reply.get("usage") or {}
        if "completion_tokens" in usage:
            self.sampled_tokens += usage["completion_tokens"]
            self.context_tokens = usage.get("prompt_tokens", 0) + usage["completion_tokens"]
        self.messages.append({"role": "assistant", "content": text})
        return Turn(text, "length" if choice.get("finish_reason") == "length" else "stop")

    async def observe(self, texts: list[str], *, tail: str = "") -> None:
        blocks = [f"<tool_response>\n{text}\n</tool_response>" for text in texts]
        self.messages.append({"role": "user", "content": "\n".join(blocks + ([tail] if tail else []))})

    async def close(self) -> None:
        return None


def _message_text(message: dict) -> str:
    """An endpoint's message in our one format: thought, content, tool calls."""
    text = message.get("content") or ""
    thought = message.get("reasoning_content") or message.get("reasoning") or ""
    if thought and "<think>" not in text:
        text = f"<think>{thought.strip()}</think>\n{text}"
    for call in message.get("tool_calls") or []:
        function = call["function"]
        arguments = function.get("arguments") or "{}"
        try:
            arguments = json.loads(arguments) if isinstance(arguments, str) else arguments
        except ValueError:  # the model's mistake: shown to it by the parser of the episode loop
            text += f'\n<tool_call>\n{{"name": {json.dumps(function["name"])}, "arguments": {arguments}}}\n</tool_call>'
        else:
            text += "\n" + chat.tool_call_text(function["name"], arguments)
    return text.strip()


def _json_object(text: str, url: str) -> dict:
    try:
        value = json.loads(text)
    except ValueError:
        value = None
    if not isinstance(value, dict):
        raise PolicyError(f"{url}: expected a JSON object, got {text[:200]!r}; is this an OpenAI-compatible endpoint?")
    return value


def _error_text(text: str) -> str:
    try:
        error = json.loads(text)["error"]
        return str(error["message"] if isinstance(error, dict) else error)[:300]
    except (ValueError, KeyError, TypeError):
        return text[:300]


def _advice(status: int) -> str:
    return {
        401: "; set the API key's environment variable",
        403: "; the key may not use this model",
        404: "; check the base URL and the model's name",
    }.get(status, "")
