"""Dialogue: chat messages (OpenAI's and Hugging Face's form) and ShareGPT's conversations, as trajectories.

Only assistant messages are ever learned; "train": false or "weight": 0 takes one of them out of the loss.
"""

import json
from typing import Any

from stepdr_jax.data.sources.fields import common, parsed
from stepdr_jax.records import content_id
from stepdr_jax.tokens.chat import tool_call_text

ROLES = {
    "system": "system",
    "user": "user",
    "human": "user",
    "assistant": "assistant",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "model": "assistant",
    "function_call": "assistant",
    "tool": "tool",
    "function": "tool",
    "observation": "tool",
    "function_response": "tool",
}


def dialogue(line: bytes) -> dict:
    """A line {"messages": [{"role", "content"}]} or {"conversations": [{"from", "value"}]}."""
    row = parsed(line)
    return from_row(row) | common(row)


def from_row(row: dict) -> dict:
    """Returns the trajectory row of a parsed object. Raises ValueError for turns that make no dialogue."""
    turns = row.get("messages", row.get("conversations"))
    if not isinstance(turns, list) or not turns:
        raise ValueError("expected messages (or conversations), a list of turns")
    messages = [_message(turn, number) for number, turn in enumerate(turns, 1)]
    if isinstance(row.get("system"), str) and row["system"] and messages[0]["role"] != "system":
        messages.insert(0, {"role": "system", "content": row["system"]})
    return {"trajectory": trajectory(row.get("id"), "dialogue", messages)}


def trajectory(id_: Any, policy: str, messages: list[dict], **fields) -> dict:
    """Returns a `records.Trajectory` as a dict. Raises ValueError where the chat format could not write the turns."""
    first = next((index for index, message in enumerate(messages) if message["role"] == "assistant"), None)
    if first is None:
        raise ValueError("there is no assistant message")
    if any(message["role"] == "tool" for message in messages[:first]):
        raise ValueError("a tool's message stands before the first assistant message")
    if not any(message["role"] == "user" for message in messages[:first]):
        raise ValueError("the first assistant message has no user message before it")
    for before, after in zip(messages, messages[1:], strict=False):
        if before["role"] == after["role"] == "assistant":
            raise ValueError("two assistant messages follow each other")
    name = str(id_) if id_ not in (None, "") else content_id("", [message["content"] for message in messages])
    return dict(id=name, task_id=name, policy=policy, messages=messages, finish="answered") | fields


def _message(turn: Any, number: int) -> dict:
    if not isinstance(turn, dict):
        raise ValueError(f"turn {number}: expected an object")
    said = turn.get("role", turn.get("from"))
    if said not in ROLES:
        raise ValueError(f"turn {number}: expected a role such as user or assistant, got {said!r}")
    content = turn.get("content", turn.get("value"))
    if isinstance(content, list):  # parts, of which only text can be read
        if not all(isinstance(part, dict) and isinstance(part.get("text"), str) for part in content):
            raise ValueError(f"turn {number}: expected text parts only")
        content = "\n".join(part["text"] for part in content)
    calls = turn.get("tool_calls") or []
    if said == "function_call":
        calls, content = [{"function": json.loads(content)}], ""
    if not isinstance(content or "", str):
        raise ValueError(f"turn {number}: expected its content as text")
    text = "\n".join([*([content] if content else []), *(_call(call, number) for call in calls)])
    if not text and ROLES[said] != "tool":
        raise ValueError(f"turn {number}: it is empty")
    message = {"role": ROLES[said], "content": text}
    learned = turn.get("train", turn.get("weight", 1))
    if ROLES[said] == "assistant" and not learned:
        message["train"] = False
    return message


def _call(call: dict, number: int) -> str:
    function = call.get("function", call)
    arguments = function.get("arguments", {})
    if isinstance(arguments, str):
        arguments = json.loads(arguments or "{}")
    if not isinstance(function.get("name"), str) or not isinstance(arguments, dict):
        raise ValueError(f"turn {number}: expected a tool call with a name and arguments as an object")
    return tool_call_text(function["name"], arguments)
