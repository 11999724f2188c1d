"""The chat format (Qwen2.5's ChatML): messages to ids by pieces that only append, and an assistant's text to its parts.

An episode's ids are `prompt_ids`, then per turn the assistant's own ids and `observation_ids`. The assistant's closing
<|im_end|> belongs to the assistant; the newline after it belongs to the observation. So a sampled turn and a teacher's
turn leave the same ids, and nothing is tokenised twice.
"""

import dataclasses
import json
import re
from collections.abc import Sequence
from typing import Any

from stepdr_jax.records import Message, ToolCall, Trajectory
from stepdr_jax.tokens.log import TokenLog
from stepdr_jax.tokens.tokenizer import Tokenizer

_CALL_TAG = re.compile(r"(</?tool_call>)")
_TAG = re.compile(r"</?(?:think|tool_call|answer)>")


@dataclasses.dataclass(frozen=True)
class ParsedTurn:
    """An assistant's turn taken apart. With `error` set nothing should run: the error goes back to the model."""

    thought: str = ""
    tool_calls: tuple[ToolCall, ...] = ()
    answer: str | None = None
    error: str | None = None


def tool_call_text(name: str, arguments: dict[str, Any]) -> str:
    """Returns one <tool_call> block as an assistant writes it."""
    call = json.dumps({"name": name, "arguments": arguments}, ensure_ascii=False)
    return f"<tool_call>\n{call}\n</tool_call>"


def _header(tok: Tokenizer, role_and_text: str) -> list[int]:
    return [tok.im_start, *tok.encode(role_and_text)]


def _closed(tok: Tokenizer, role: str, text: str) -> list[int]:
    return [*_header(tok, f"{role}\n{text}"), tok.im_end, *tok.encode("\n")]


def prompt_ids(tok: Tokenizer, messages: Sequence[Message]) -> list[int]:
    """Returns ids of system and user messages, up to and including the header of the assistant's turn.

    Raises ValueError for other roles: what follows a turn is appended by `observation_ids`, never rendered again.
    """
    ids = []
    for message in messages:
        if message.role not in ("system", "user"):
            raise ValueError(f"expected system and user messages in a prompt, got {message.role}")
        ids += _closed(tok, message.role, message.content)
    return ids + _header(tok, "assistant\n")


def observation_ids(tok: Tokenizer, texts: Sequence[str], *, closed: bool, tail: str = "") -> list[int]:
    """Returns the ids that the harness appends after an assistant's turn, up to the next turn's header.

    Args:
        texts: tool results, one <tool_response> each; may be empty when `tail` says what the model needs.
        closed: the turn ended with a sampled <|im_end|>; if not (cut by length), it is appended here.
        tail: text after the tool results in the same user turn, e.g. a format error or a budget notice.
    """
    blocks = [f"<tool_response>\n{text}\n</tool_response>" for text in texts] + ([tail] if tail else [])
    before = [] if closed else [tok.im_end]
    return [*before, *tok.encode("\n"), *_closed(tok, "user", "\n".join(blocks)), *_header(tok, "assistant\n")]


def assistant_ids(tok: Tokenizer, content: str) -> list[int]:
    """Returns ids of an assistant's text with its closing <|im_end|>; <tool_call> tags become their control ids."""
    ids = []
    for piece in _CALL_TAG.split(content):
        ids += [tok.control[piece]] if piece in ("<tool_call>", "</tool_call>") else tok.encode(piece)
    return [*ids, tok.im_end]


def trajectory_tokens(tok: Tokenizer, trajectory: Trajectory) -> TokenLog:
    """Returns the log of a teacher's trajectory: assistant messages with `train` are supervised, all else is observed.

    Messages after the last assistant message are left out. User text that follows tool results shares their turn, as
    `observation_ids(tail=...)` writes it. Raises ValueError for a trajectory without an assistant message.
    """
    messages = trajectory.messages
    turns = [index for index, message in enumerate(messages) if message.role == "assistant"]
    if not turns:
        raise ValueError(f"trajectory {trajectory.id} has no assistant message")
    log = TokenLog()
    log.observed(prompt_ids(tok, messages[: turns[0]]))
    for index, following in zip(turns, [*turns[1:], None], strict=True):
        ids = assistant_ids(tok, messages[index].content)
        (log.supervised if messages[index].train else log.observed)(ids)
        if following is not None:
            between = messages[index + 1 : following]
            texts = [message.content for message in between if message.role == "tool"]
            tail = "\n".join(message.content for message in between if message.role != "tool")
            log.observed(observation_ids(tok, texts, closed=True, tail=tail))
    return log


def parse_assistant(text: str, *, turn: int = 0) -> ParsedTurn:
    """Takes an assistant's text apart: thought, tool calls, answer, or what is wrong with it.

    Tags count where they stand: an answer inside <think> or inside a tool call's JSON is text. The call ids are
    "<turn>.<position>", unique within an episode when `turn` is its turn number. Never raises on any text.
    """
    thoughts: list[str] = []
    calls: list[ToolCall] = []
    answers: list[str] = []
    errors: list[str] = []
    position = 0
    while match := _TAG.search(text, position):
        tag, position = match.group(), match.end()
        if tag == "<tool_call>":
            number = len(calls) + 1
            call, position, error = _parse_call(text, position, number, f"{turn}.{len(calls)}")
            if error:
                errors.append(error)
            else:
                calls.append(call)
            continue
        if tag.startswith("</"):
            errors.append(f"{tag} stands without <{tag[2:]} before it")
            continue
        closing = f"</{tag[1:]}"
        end = text.find(closing, position)
        if end < 0:
            errors.append(f"{tag} is not closed by {closing}")
            end = len(text)
        elif tag == "<answer>":
            answers.append(text[position:end].strip())
        if tag == "<think>":
            thoughts.append(text[position:end].strip())
        position = end + len(closing)
    if len(answers) > 1:
        errors.append(f"expected one <answer>, got {len(answers)}")
    if answers and not answers[-1]:
        errors.append("<answer> is empty")
    if answers and calls:
        errors.append("expected tool calls or an <answer> in one turn, got both")
    if not (answers or calls or errors):
        errors.append("expected a <tool_call> or an <answer>, got neither")
    return ParsedTurn(
        thought="\n".join(thoughts),
        tool_calls=tuple(calls),
        answer=answers[-1] if answers else None,
        error=errors[0] if errors else None,
    )


def _parse_call(text: str, start: int, number: int, id_: str) -> tuple[ToolCall | None, int, str | None]:
    """Parses the call whose <tool_call> tag ends at `start`: (call, where to go on, error)."""
    closing = "</tool_call>"
    end = text.find(closing, start)
    after = len(text) if end < 0 else end + len(closing)
    body = text[start : after if end < 0 else end]
    lead = start + len(body) - len(body.lstrip())
    try:
        # Decoding from the tag on lets a closing tag stand inside a JSON string.
        value, stop = _DECODER.raw_decode(text, lead)
    except (ValueError, RecursionError) as error:
        if end < 0:
            return None, after, f"tool call {number}: <tool_call> is not closed by {closing}"
        where = f" at character {error.pos - start + 1}" if isinstance(error, json.JSONDecodeError) else ""
        reason = getattr(error, "msg", None) or str(error) or "nested too deeply"
        return None, after, f"tool call {number} is not valid JSON: {reason}{where}"
    rest = text[stop:].lstrip()
    if not rest.startswith(closing):
        if end < 0 or end < stop:
            return None, len(text), f"tool call {number}: <tool_call> is not closed by {closing}"
        return None, after, f"tool call {number} is not valid JSON: text after the object"
    after = len(text) - len(rest) + len(closing)
    if not isinstance(value, dict):
        return None, after, f"tool call {number}: expected a JSON object, got {_KIND[type(value)]}"
    for key, kind in (("name", str), ("arguments", dict)):
        if key not in value:
            return None, after, f"tool call {number}: {key!r} is missing"
        if not isinstance(value[key], kind):
            got = _KIND[type(value[key])]
            return None, after, f"tool call {number}: expected {key!r} to be {_KIND[kind]}, got {got}"
    if not value["name"].strip():
        return None, after, f"tool call {number}: 'name' is empty"
    try:  # what JSON escapes can say and UTF-8 or a protocol buffer cannot: half a surrogate pair, 1e999
        json.dumps(value, ensure_ascii=False, allow_nan=False).encode()
    except (ValueError, RecursionError):
        return None, after, f"tool call {number}: a string is not Unicode text or a number is not finite"
    return ToolCall(id=id_, name=value["name"].strip(), arguments=value["arguments"]), after, None


def _no_constant(name: str) -> None:
    raise ValueError(f"{name} is not a JSON number")


_DECODER = json.JSONDecoder(parse_constant=_no_constant)
_KIND = {
    dict: "an object",
    list: "a list",
    str: "a string",
    int: "a number",
    float: "a number",
    bool: "true or false",
    type(None): "null",
}
