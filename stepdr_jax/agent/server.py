"""An engine behind OpenAI's HTTP interface, so that any client can talk to a checkpoint.

    GET  /v1/models, /health
    POST /v1/completions        prompt as text or ids; "return_token_ids" adds ids to the choice, "logprobs" their logs
    POST /v1/chat/completions   messages and tools in the chat format that the model was trained on

Sampling takes max_tokens, temperature (0: the most probable token) and seed; a model's own stop ids end a turn. What
would change the distribution (top_p, penalties, stop strings, several choices) is refused, not ignored. With "stream"
the whole turn comes as one event.
"""

import asyncio
import hmac
import itertools
import json
import random
import signal
import time
from collections.abc import Sequence
from typing import Any

from aiohttp import web

from stepdr_jax.agent import prompts
from stepdr_jax.engine.engine import Engine, EngineError, Generation, SampleParams
from stepdr_jax.errors import UserError
from stepdr_jax.records import Message
from stepdr_jax.tokens import chat
from stepdr_jax.tokens.tokenizer import Tokenizer

MAX_BODY = 16 << 20  # bytes
NEUTRAL = {
    "top_p": (1,),
    "n": (1,),
    "best_of": (1,),
    "presence_penalty": (0,),
    "frequency_penalty": (0,),
    "top_k": (-1, 0),
}
UNKNOWN_TO_US = ("stop", "logit_bias", "response_format", "suffix", "echo", "min_p", "repetition_penalty")
_FINISH = {"stop": "stop", "length": "length", "full": "length"}


class BadRequest(Exception):
    """What the client must change."""


def make_app(
    engine: Engine, tokenizer: Tokenizer, *, model: str, max_len: int, token: str = "", vocab_size: int = 0
) -> web.Application:
    """Returns the application.

    Args:
        engine: samples; sessions are named by this application.
        tokenizer: of the engine's model.
        model: the name it is served under.
        max_len: tokens of prompt and reply together.
        token: bearer token that all but /health must carry; empty for none.
        vocab_size: rows of the model's embedding, which may be more than the tokenizer has; 0 for the tokenizer's.
    """
    return _Server(engine, tokenizer, model, max_len, token, vocab_size or tokenizer.vocab_size).app


def serve_app(app: web.Application, host: str, port: int) -> None:
    """Serves until SIGINT or SIGTERM; prints the address when it answers. Raises UserError when the port is taken."""
    asyncio.run(_serve(app, host, port))


async def _serve(app, host, port):
    runner = web.AppRunner(app)
    await runner.setup()
    stopped = asyncio.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        asyncio.get_running_loop().add_signal_handler(number, stopped.set)
    try:
        await web.TCPSite(runner, host, port).start()
        print(f"http://{host}:{runner.addresses[0][1]}/v1", flush=True)
        await stopped.wait()
    except OSError as error:
        raise UserError(f"cannot listen on {host}:{port}: {error.strerror}; name another --port, or 0") from None
    finally:
        await runner.cleanup()


class _Server:
    def __init__(self, engine, tokenizer, model, max_len, token, vocab_size):
        self.engine, self.tokenizer, self.model, self.max_len = engine, tokenizer, model, max_len
        self.vocab_size = vocab_size
        self._bearer = f"Bearer {token}".encode() if token else b""
        self._names = itertools.count()
        self.app = web.Application(client_max_size=MAX_BODY, middlewares=[_errors, self._authorised])
        self.app.router.add_get("/health", self.health)
        self.app.router.add_get("/v1/models", self.models)
        self.app.router.add_post("/v1/completions", self.completions)
        self.app.router.add_post("/v1/chat/completions", self.chat_completions)

    @web.middleware
    async def _authorised(self, request, handler):
        given = request.headers.get("Authorization", "").encode("utf-8", "surrogateescape")
        if self._bearer and request.path != "/health" and not hmac.compare_digest(given, self._bearer):
            return _error(401, "invalid_request_error", "no or a wrong token; send Authorization: Bearer TOKEN")
        return await handler(request)

    async def health(self, request):
        return web.json_response({"status": "ok"} | self.engine.stats())

    async def models(self, request):
        row = {
            "id": self.model,
            "object": "model",
            "created": 0,
            "owned_by": "stepdr_jax",
            "max_model_len": self.max_len,
        }
        return web.json_response({"object": "list", "data": [row]})

    async def completions(self, request):
        body = await self._body(request)
        prompt = body.get("prompt")
        if isinstance(prompt, str):
            ids = self.tokenizer.encode(prompt)
        elif isinstance(prompt, list) and all(type(i) is int and 0 <= i < self.vocab_size for i in prompt):
            ids = prompt
        else:
            raise BadRequest(f"prompt: expected text or ids below {self.vocab_size}, got {_short(prompt)}")
        generation = await self._generate(ids, body)
        choice = {"index": 0, "text": self._text(generation), "finish_reason": _FINISH[generation.finish]}
        choice["logprobs"] = None
        if body.get("logprobs") is not None:
            texts = [self.tokenizer.decode([i]) for i in generation.ids]
            choice["logprobs"] = {"tokens": texts, "token_logprobs": list(generation.logprobs)}
        if body.get("return_token_ids"):
            choice["token_ids"] = list(generation.ids)
        return await self._reply(request, body, "text_completion", choice, ids, generation)

    async def chat_completions(self, request):
        body = await self._body(request)
        tools = _functions(body.get("tools"))
        ids = conversation_ids(self.tokenizer, _messages(body.get("messages")), tools)
        generation = await self._generate(ids, body)
        text = self._text(generation)
        message: dict[str, Any] = {"role": "assistant", "content": text}
        finish = _FINISH[generation.finish]
        parsed = chat.parse_assistant(text)
        if tools and parsed.tool_calls and not parsed.error:
            message["content"] = text[: text.index("<tool_call>")].strip() or None
            message["tool_calls"] = [
                {
                    "id": f"call_{call.id}",
                    "type": "function",
                    "function": {"name": call.name, "arguments": json.dumps(call.arguments, ensure_ascii=False)},
                }
                for call in parsed.tool_calls
            ]
            finish = "tool_calls"
        choice = {"index": 0, "message": message, "finish_reason": finish, "logprobs": None}
        if body.get("logprobs"):
            pairs = zip(generation.ids, generation.logprobs, strict=True)
            rows = [{"token": self.tokenizer.decode([i]), "logprob": value, "top_logprobs": []} for i, value in pairs]
            choice["logprobs"] = {"content": rows}
        return await self._reply(request, body, "chat.completion", choice, ids, generation)

    async def _body(self, request) -> dict:
        try:
            body = await request.json()
        except ValueError:
            body = None
        if not isinstance(body, dict):
            raise BadRequest("expected a JSON object as the request's body")
        if body.get("model") not in (None, "", self.model):
            raise BadRequest(f"model: this server has {self.model!r}, got {_short(body['model'])}")
        for name in UNKNOWN_TO_US:
            if body.get(name):
                raise BadRequest(f"{name}: this server does not change its distribution or its stops; leave it out")
        for name, allowed in NEUTRAL.items():
            if body.get(name) is not None and body[name] not in allowed:
                raise BadRequest(f"{name}: expected {allowed[0]} or nothing, got {_short(body[name])}")
        return body

    async def _generate(self, ids: list[int], body: dict) -> Generation:
        room = self.max_len - len(ids)
        limit = body.get("max_completion_tokens") or body.get("max_tokens") or room
        if not ids:
            raise BadRequest("expected a prompt that is not empty")
        if room < 1:
            raise BadRequest(f"the prompt has {len(ids)} tokens, this model's context {self.max_len} with the reply")
        temperature = body.get("temperature", 1.0)
        if type(limit) is not int or limit < 1:
            raise BadRequest(f"max_tokens: expected a number from 1 up, got {_short(limit)}")
        if isinstance(temperature, bool) or not isinstance(temperature, int | float) or not 0 <= temperature <= 100:
            raise BadRequest(f"temperature: expected a number from 0 up, got {_short(temperature)}")
        seed = body.get("seed")
        if seed is not None and type(seed) is not int:
            raise BadRequest(f"seed: expected an integer, got {_short(seed)}")
        seed = random.getrandbits(31) if seed is None else seed % (1 << 31)
        name = f"http {next(self._names)}"
        try:
            return await self.engine.generate(name, ids, SampleParams(limit, seed, float(temperature)))
        finally:
            await self.engine.close(name)

    def _text(self, generation: Generation) -> str:
        ids = generation.ids[:-1] if generation.finish == "stop" else generation.ids
        return self.tokenizer.decode(ids)

    async def _reply(self, request, body, kind, choice, ids, generation):
        usage = {"prompt_tokens": len(ids), "completion_tokens": len(generation.ids)}
        reply = {
            "id": f"{kind.split('.')[0]}-{next(self._names)}",
            "object": kind,
            "created": int(time.time()),
            "model": self.model,
            "choices": [choice],
            "usage": usage | {"total_tokens": sum(usage.values())},
        }
        if not body.get("stream"):
            return web.json_response(reply)
        if "message" in choice:
            delta = choice.pop("message")
            for number, call in enumerate(delta.get("tool_calls", ())):
                call["index"] = number
            choice["delta"], reply["object"] = delta, "chat.completion.chunk"
        stream = web.StreamResponse(headers={"Content-Type": "text/event-stream", "Cache-Control": "no-cache"})
        await stream.prepare(request)
        await stream.write(f"data: {json.dumps(reply, ensure_ascii=False)}\n\ndata: [DONE]\n\n".encode())
        await stream.write_eof()
        return stream


def conversation_ids(tok: Tokenizer, messages: Sequence[Message], functions: Sequence[dict] = ()) -> list[int]:
    """Returns the ids of a conversation up to the header of the assistant's next turn, as training writes them.

    Functions are described at the end of the first system message, or in one of their own. Raises BadRequest for a
    conversation that does not begin with what the assistant is asked.
    """
    messages = list(messages)
    if functions:
        system = messages.pop(0).content if messages and messages[0].role == "system" else ""
        section = prompts.tool_section(functions)
        messages.insert(0, Message(role="system", content=f"{system}\n\n{section}".strip()))
    turns = [index for index, message in enumerate(messages) if message.role == "assistant"]
    opening = messages[: turns[0]] if turns else messages
    if not opening or any(message.role == "tool" for message in opening):
        raise BadRequest("messages: expected a system or user message before the first turn of the assistant")
    ids = chat.prompt_ids(tok, opening)
    for index, following in itertools.pairwise([*turns, len(messages)]):
        between = messages[index + 1 : following]
        if not between:
            raise BadRequest("messages: expected a user or tool message after each turn of the assistant")
        texts = [message.content for message in between if message.role == "tool"]
        tail = "\n".join(message.content for message in between if message.role != "tool")
        ids += chat.assistant_ids(tok, messages[index].content)
        ids += chat.observation_ids(tok, texts, closed=True, tail=tail)
    return ids


def _messages(rows: Any) -> list[Message]:
    if not isinstance(rows, list) or not rows or not all(isinstance(row, dict) for row in rows):
        raise BadRequest(f"messages: expected a list of messages, got {_short(rows)}")
    found = []
    for number, row in enumerate(rows):
        role = {"developer": "system"}.get(row.get("role"), row.get("role"))
        content = row.get("content") or ""
        if isinstance(content, list):  # parts; ours are text alone
            if not all(isinstance(part, dict) and part.get("type") == "text" for part in content):
                raise BadRequest(f"messages[{number}].content: expected text, this model reads nothing else")
            content = "".join(str(part.get("text", "")) for part in content)
        if role not in ("system", "user", "assistant", "tool") or not isinstance(content, str):
            raise BadRequest(f"messages[{number}]: expected a role and text, got {_short(row)}")
        found.append(Message(role=role, content="\n".join([content, *_calls(number, row)]).strip("\n")))
    return found


def _calls(number: int, row: dict) -> list[str]:
    try:
        calls = [call["function"] for call in row.get("tool_calls") or []]
        return [chat.tool_call_text(call["name"], json.loads(call["arguments"] or "{}")) for call in calls]
    except (KeyError, TypeError, ValueError):
        raise BadRequest(f"messages[{number}].tool_calls: expected functions with a name and JSON arguments") from None


def _functions(tools: Any) -> list[dict]:
    try:
        return [{"name": t["function"]["name"], **t["function"]} for t in tools or ()]
    except (KeyError, TypeError):
        raise BadRequest(f"tools: expected a list of functions with names, got {_short(tools)}") from None


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 100 else text[:100] + "..."


@web.middleware
async def _errors(request, handler):
    """Errors in OpenAI's form: 400 what the client must change, 500 what broke here."""
    try:
        return await handler(request)
    except BadRequest as error:
        return _error(400, "invalid_request_error", str(error))
    except EngineError as error:
        return _error(500, "server_error", str(error))
    except web.HTTPException as error:
        return _error(error.status, "invalid_request_error", f"{request.method} {request.path}: {error.reason}")


def _error(status: int, kind: str, message: str) -> web.Response:
    return web.json_response({"error": {"message": message, "type": kind, "param": None, "code": None}}, status=status)
