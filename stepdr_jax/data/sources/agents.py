"""Trajectories in the Agent Data Protocol's standard form (neulab/agent-data-protocol, schema up to 1.2).

A trajectory is {id, content: [steps], details}. Steps are observations (text_observation, web_observation) and
actions (api_action: a function and its arguments; code_action: a language and code; message_action: text); an
action's `description` is the reasoning before it.
"""

from typing import Any

from stepdr_jax.data.sources import dialogue
from stepdr_jax.data.sources.fields import common, parsed
from stepdr_jax.tokens.chat import tool_call_text


def agent_data_protocol(line: bytes) -> dict:
    """Actions become assistant turns with <think> and <tool_call>, observations become tool results.

    Consecutive actions are one turn. An observation whose source is the agent is an assistant turn that is not trained
    on.
    """
    row = parsed(line)
    steps = row.get("content")
    if not isinstance(steps, list) or not steps:
        raise ValueError("expected content, a list of steps")
    messages: list[dict] = []
    answer, before = None, ""
    for number, step in enumerate(steps, 1):
        message = _message(step, number, before)
        if step["class_"] == "message_action":
            answer = str(step["content"])
        if step["class_"].endswith("_action"):
            before = step["class_"]
        last = messages[-1] if messages else None
        if last and last["role"] == message["role"] == "assistant":
            if last.get("train", True) != message.get("train", True):
                raise ValueError(f"step {number}: one assistant turn has both trained and untrained parts")
            last["content"] += "\n" + message["content"]
        else:
            messages.append(message)
    details = row.get("details") if isinstance(row.get("details"), dict) else {}
    own = common(row)
    own["license"] = str(details.get("license") or details.get("licence") or own.get("license", ""))
    return own | {"trajectory": dialogue.trajectory(row.get("id"), "adp", messages, answer=answer)}


def _message(step: Any, number: int, before: str) -> dict:
    """Returns a step as a message. `before`: class of the last action; an observation after a call is its result."""
    called = before in ("api_action", "code_action")
    if not isinstance(step, dict):
        raise ValueError(f"step {number}: expected an object")
    kind = step.get("class_")
    if kind == "text_observation":
        source = step.get("source")
        if source == "agent":
            return {"role": "assistant", "content": str(step["content"]), "train": False}
        if source == "environment" and not before:
            return {"role": "system" if step.get("name") == "system" else "user", "content": str(step["content"])}
        return {"role": "tool" if called or source == "environment" else "user", "content": str(step["content"])}
    if kind == "web_observation":
        page = step.get("axtree") or step.get("html")
        if not page:
            raise ValueError(f"step {number}: expected text in a web observation (axtree or html)")
        content = f"{step['url']}\n{page}" if step.get("url") else str(page)
        return {"role": "tool" if called else "user", "content": content}
    thought = f"<think>\n{step['description']}\n</think>\n" if step.get("description") else ""
    if kind == "api_action":
        return {"role": "assistant", "content": thought + tool_call_text(step["function"], dict(step["kwargs"]))}
    if kind == "code_action":
        code = tool_call_text(str(step.get("language") or "python"), {"code": str(step["content"])})
        return {"role": "assistant", "content": thought + code}
    if kind == "message_action":
        return {"role": "assistant", "content": thought + str(step["content"])}
    raise ValueError(f"step {number}: unknown class_ {kind!r}")
