"""The episodes that a report carries for its trajectory viewer: a bounded, stratified sample as plain JSON.

Text in episodes comes from web pages and models and is untrusted: it travels as data (`embed` escapes it for a script element)
and the page's script puts it on screen with textContent only.
"""

import json
import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from stepdr_jax.evaluation.results import Result
from stepdr_jax.records import RubricSet, Task, Trajectory, Verdict

MAX_BYTES = 3_000_000  # of embedded JSON
CITATION = re.compile(r"\\cite\{([^{}]*)\}")
TAGS = re.compile(r"<(think|tool_call|answer)>(.*?)(?:</\1>|\Z)", re.DOTALL)
KINDS = {"think": "thought", "tool_call": "call", "answer": "answer"}


def segments(content: str) -> list[tuple[str, str]]:
    """Splits an assistant turn into (thought | call | answer | text, text) in order; unclosed tags run to the end."""
    out, at = [], 0
    for match in TAGS.finditer(content):
        out += [("text", content[at : match.start()]), (KINDS[match[1]], match[2])]
        at = match.end()
    out.append(("text", content[at:]))
    return [(kind, text.strip()) for kind, text in out if text.strip()]


def cited(text: str | None) -> list[str]:
    """Citation ids of a text in order of first appearance."""
    ids = (part.strip() for match in CITATION.finditer(text or "") for part in match[1].split(","))
    return list(dict.fromkeys(id_ for id_ in ids if id_))


def episode(
    trajectory: Trajectory,
    verdict: Verdict | None,
    *,
    where: str,
    seed: int | None,
    task: Task | None,
    rubric_set: RubricSet | None = None,
    tokens: Mapping[str, Any] | None = None,
    missing: str | None = None,
) -> dict[str, Any]:
    """One episode for the page. `where` is the stage or iteration as a person would say it."""
    criteria = {rubric.rid: rubric.criterion for rubric in rubric_set.rubrics} if rubric_set else {}
    steps = []
    for message in trajectory.messages:
        step: dict[str, Any] = {"role": message.role}
        if message.role == "assistant":
            step["parts"] = segments(message.content)
        else:
            step["text"] = message.content
        if message.error:
            step["error"] = message.error
        if message.role == "assistant" and not message.train:
            step["untrained"] = True
        if message.sources:
            step["sources"] = [source.id for source in message.sources]
        steps.append(step)
    out: dict[str, Any] = {
        "id": trajectory.id,
        "where": where,
        "seed": seed,
        "task": trajectory.task_id,
        "kind": task.kind if task else trajectory.capability or "",
        "lang": task.lang if task else "",
        "query": task.query if task else next((m.content for m in trajectory.messages if m.role == "user"), ""),
        "finish": str(trajectory.finish),
        "steps": steps,
        "sources": {
            source.id: [source.url, source.title, source.authority, source.published_at or "", source.text]
            for source in trajectory.sources().values()
        },
        "stats": {name: _short(value) for name, value in trajectory.stats.items()},
    }
    gold = task.answer if task else None
    if gold is not None:
        out["gold"] = gold.value
    if verdict is not None:
        out |= {"reward": _short(verdict.reward), "correct": verdict.correct, "cited": verdict.cited}
        out["rubrics"] = [
            [j.rid, criteria.get(j.rid, ""), j.weight, j.role, j.verdict, j.score, j.reason] for j in verdict.judgments
        ]
    if not trajectory.kept:
        out["dropped"] = trajectory.drop_reason or "no reason given"
    if missing:
        out["missing"] = missing
    if tokens:
        out["tokens"] = dict(tokens)
    out["outcome"] = outcome(out)
    return out


def outcome(row: Mapping[str, Any]) -> str:
    """One word for the filter: how the episode went."""
    if row.get("dropped"):
        return "dropped"
    if row.get("missing"):
        return "masked"
    if row["finish"] != "answered":
        return "no answer"
    if row.get("correct") is not None:
        return "correct" if row["correct"] else "wrong"
    if row.get("reward") is None:
        return "kept"
    return "full reward" if row["reward"] >= 1 else "part reward"


def from_result(result: Result, task: Task | None, rubric_set: RubricSet | None, where: str) -> dict[str, Any]:
    return episode(
        result.trajectory,
        result.verdict,
        where=where,
        seed=result.seed,
        task=task,
        rubric_set=rubric_set,
        missing=result.missing,
    )


def token_texts(ids: Sequence[int], decode: Callable[[Sequence[int]], str]) -> list[str]:
    """Text of each token; a character that spans several tokens stands at the last of them, the others are empty."""
    out, start = [], 0
    for end in range(1, len(ids) + 1):
        text = decode(ids[start:end])
        if text.endswith("\ufffd") and end - start < 4 and end < len(ids):
            out.append("")
            continue
        out.append(text)
        start = end
    return out


def token_detail(
    ids: Sequence[int],
    sampled: Sequence[bool],
    decode: Callable[[Sequence[int]], str],
    series: Mapping[str, Sequence[float] | None],
) -> dict[str, Any]:
    """Token texts with per-token numbers, short enough to embed.

    Args:
        series: name ("value", "advantage", "logprob") -> numbers [T]; None or a wrong length leaves it out. Numbers of given
            tokens are not kept: nothing was decided there.
    """
    out: dict[str, Any] = {
        "text": token_texts(ids, decode),
        "sampled": "".join("1" if flag else "0" for flag in sampled),
    }
    for name, numbers in series.items():
        if numbers is not None and len(numbers) == len(ids):
            out[name] = [_short(v) for v, flag in zip(numbers, sampled, strict=True) if flag]
    return out


def choose(groups: Sequence[Sequence[dict[str, Any]]], max_bytes: int = MAX_BYTES) -> list[dict[str, Any]]:
    """Takes episodes from every group in turn, each group in its own order, until the JSON would pass `max_bytes`."""
    taken: list[list[dict[str, Any]]] = [[] for _ in groups]
    size, rank = 0, 0
    while any(rank < len(group) for group in groups):
        for index, group in enumerate(groups):
            if rank < len(group):
                cost = len(json.dumps(group[rank], ensure_ascii=False).encode()) + 2
                if size + cost > max_bytes:
                    return [row for rows in taken for row in rows]
                size += cost
                taken[index].append(group[rank])
        rank += 1
    return [row for rows in taken for row in rows]


def spread(rows: Iterable[Any], key: Callable[[Any], Any]) -> list[Any]:
    """Reorders rows so that every prefix has as many different keys as it can: round robin over strata."""
    strata: dict[Any, list[Any]] = {}
    for row in rows:
        strata.setdefault(key(row), []).append(row)
    queues = [strata[name] for name in sorted(strata, key=str)]
    out, rank = [], 0
    while any(rank < len(queue) for queue in queues):
        out += [queue[rank] for queue in queues if rank < len(queue)]
        rank += 1
    return out


def embed(value: Any) -> str:
    """JSON that is safe inside <script type="application/json">: no character that could end the element."""
    text = json.dumps(value, ensure_ascii=False, separators=(",", ":"), allow_nan=False)
    for character, escaped in (
        ("<", "\\u003c"),
        (">", "\\u003e"),
        ("&", "\\u0026"),
        ("\u2028", "\\u2028"),
        ("\u2029", "\\u2029"),
    ):
        text = text.replace(character, escaped)
    return text


def _short(value: float | None) -> float | None:
    if value is None or not math.isfinite(value):
        return None
    return float(f"{float(value):.4g}")
