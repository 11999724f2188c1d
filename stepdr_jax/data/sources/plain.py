"""Rows of your own JSONL, of synthesis, of question sets with URLs, and plain text files."""

import json
from pathlib import Path

import pydantic

from stepdr_jax.data.sources import dialogue
from stepdr_jax.data.sources.fields import common, parsed, text
from stepdr_jax.records import Trajectory
from stepdr_jax.text.scripts import question_language


def any_row(line: bytes) -> dict:
    """A row of your own data: {"text"}, {"prompt", "completion"} or {"messages"}.

    A prompt and its completion become one user and one assistant turn, and only the completion is learned, unless the
    row says "chat": false or "loss": "all".
    """
    row = parsed(line)
    if "messages" in row or "conversations" in row:
        return dialogue.from_row(row) | common(row)
    if "text" in row:
        return common(row) | {"text": text(row["text"], "text")}
    if "prompt" in row and "completion" in row:
        return common(row) | _pair(row, chat=True, loss="completion")
    raise ValueError("expected a field text, or prompt and completion, or messages")


def _pair(row: dict, **default) -> dict:
    loss, chat = row.get("loss", default["loss"]), row.get("chat", default["chat"])
    if loss not in ("all", "completion"):
        raise ValueError(f"expected loss all or completion, got {loss!r}")
    if not isinstance(chat, bool):
        raise ValueError(f"expected chat true or false, got {chat!r}")
    pair = {name: text(row[name], name) for name in ("prompt", "completion")}
    return pair | {"loss": loss, "chat": chat}


def synthesis_documents(line: bytes) -> dict:
    """Row of corpus/synthetic_documents.jsonl.

    {id, component, capability, lang, text} or {id, component, capability, lang, prompt, completion, loss, chat}.
    """
    row = parsed(line)
    if not isinstance(row.get("component"), str):
        raise ValueError("expected an object with a field 'component'")
    fields = ("text",) if "text" in row else ("prompt", "completion")
    if not all(isinstance(row.get(field), str) for field in fields):
        raise ValueError("expected text, or prompt and completion, as strings")
    loss = row.get("loss", "all")
    if loss not in ("all", "completion") or (loss == "completion" and "text" in row):
        raise ValueError(f"expected loss all, or completion for a row with one, got {loss!r}")
    own = {field: row[field] for field in fields}
    pair = {} if "text" in row else {"loss": loss, "chat": bool(row.get("chat"))}
    return common(row) | own | pair


def synthesis_trajectory(line: bytes) -> dict | None:
    """A row of corpus/trajectories.jsonl; those that synthesis did not keep are skipped."""
    try:
        trajectory = Trajectory.model_validate_json(line)
    except pydantic.ValidationError as error:
        first = error.errors()[0]
        raise ValueError(f"field {'.'.join(map(str, first['loc']))!r}: {first['msg']}") from None
    if not trajectory.kept:
        return None
    if not any(message.role == "assistant" for message in trajectory.messages):
        raise ValueError(f"kept trajectory {trajectory.id} has no assistant message")
    question = next((message.content for message in trajectory.messages if message.role == "user"), "")
    return dict(
        id=trajectory.id,
        components=list(dict.fromkeys(trajectory.metadata.get("components", []))),
        capability=trajectory.capability,
        lang=trajectory.metadata.get("lang") or question_language(question),
        trajectory=json.loads(line),
    )


def url_qa(line: bytes) -> dict:
    """A question, its answer and the pages that support it (WebShaper's {id, question, answer, urls}); the answer is
    learned.

    Answers may be a text or a list of accepted ones, of which the first is written.
    """
    row = parsed(line)
    answer = row["answer"][0] if isinstance(row["answer"], list) and row["answer"] else row["answer"]
    urls = row.get("urls") or ([row["url"]] if row.get("url") else [])
    if not urls or not all(isinstance(url, str) and "://" in url for url in urls):
        raise ValueError("field 'urls': expected a list of one URL or more")
    pages = "\n".join(dict.fromkeys(urls))
    question = text(row["question"], "question")
    prompt = {"prompt": f"{pages}\n\n{question}", "completion": text(str(answer), "answer")}
    return common(row) | prompt | {"loss": "completion", "chat": True, "provenance": urls[0]}


def text_file(record: dict) -> dict:
    """A plain text file as one document."""
    return {"text": text(record["text"], "text"), "provenance": Path(record["path"]).name}
