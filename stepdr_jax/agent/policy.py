"""Who acts in an episode: the protocol, the JAX (or any token-level) engine, and OpenAI-compatible endpoints.

A policy session keeps the episode's context. An engine session keeps token ids: what it sampled is what it sees again,
text is only rendered from ids. An endpoint session keeps messages, because that is all an endpoint offers.

Failures: `act` and `observe` raise on a broken engine or endpoint, never for what the model wrote. The episode loop
turns the exception into an infrastructure outcome, so no failure of ours is ever rewarded 0.
"""

import dataclasses
import json
from typing import TYPE_CHECKING, Any, Protocol

from stepdr_jax.endpoint import Endpoint, EndpointError
from stepdr_jax.records import Message
from stepdr_jax.tokens import chat
from stepdr_jax.tokens.log import TokenLog

if TYPE_CHECKING:
    from stepdr_jax.tokens.tokenizer import Tokenizer


@dataclasses.dataclass(frozen=True)
class Turn:
    """One assistant turn. `finish`: "stop" ended by the model, "length" by `max_tokens`, "full" context full."""

    text: str
    finish: str
    ids: tuple[int, ...] | None = None


class PolicySession(Protocol):
    """One episode's side of a policy.

    `log` is the token log, or None where no tokens are known. `context_tokens`, where a session has it, is the length
    of the context so far, given tokens that are still to be fed included; the loop cannot enforce a token budget
    without it.
    """

    @property
    def log(self) -> TokenLog | None: ...

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
        self.log.observed(self._unfed)
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


class EndpointPolicy:
    """A policy behind an OpenAI-compatible `/v1/chat/completions`.

    Tool calls travel as text in the ChatML convention of `prompts.system_prompt("full", ...)`; native `tool_calls` and
    `reasoning_content` in a reply are rewritten to that convention, so every trajectory has one format.

    Args:
        base_url: up to and including `/v1` (a missing `/v1` is added).
        model: model name at the endpoint.
        key: API key; empty sends no Authorization header.
        timeout, retries, backoff, concurrency: see `endpoint.Endpoint`.
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
        self.endpoint = Endpoint(
            base_url if base_url.endswith("/v1") else base_url + "/v1",
            key,
            timeout=timeout,
            retries=retries,
            backoff=backoff,
            concurrency=concurrency,
        )
        self.model, self.name, self.temperature = model, model, temperature

    def start(self, messages: list[Message], *, episode_id: str, seed: int) -> "EndpointSession":
        return EndpointSession(self, [{"role": m.role, "content": m.content} for m in messages], seed)

    async def complete(self, messages: list[dict], max_tokens: int, seed: int) -> dict[str, Any]:
        """Returns the reply's JSON body. Raises EndpointError."""
        body = {
            "model": self.model,
            "messages": messages,
            "max_tokens": max_tokens,
            "temperature": self.temperature,
            "seed": seed,
        }
        return await self.endpoint.post("/chat/completions", body)

    async def close(self) -> None:
        """Closes the connections; a later session opens new ones."""
        await self.endpoint.close()


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
            raise EndpointError(
                f"{self.policy.endpoint.base_url}: expected choices[0].message in the reply, got {repr(reply)[:300]}"
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
