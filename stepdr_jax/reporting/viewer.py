"""Episodes as plain JSON for the trajectory viewer of the report and of the trajectory page.

Text in episodes comes from web pages and models and is untrusted: it travels as data (`pages.render.embed_json`), and
the page's script displays it with textContent only.
"""

import json
import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from stepdr_jax.evaluation.results import Result
from stepdr_jax.pages.render import render_page
from stepdr_jax.records import RubricSet, Task, Trajectory, Verdict
from stepdr_jax.text.citations import cited_ids

MAX_BYTES = 3_000_000  # of embedded JSON
TAGS = re.compile(r"<(think|tool_call|answer)>(.*?)(?:</\1>|\Z)", re.DOTALL)
SCRIPTS = ("page.js", "viewer_tokens.js", "viewer_episode.js", "viewer.js")
STYLES = ("style.css", "viewer.css")
KINDS = {"think": "thought", "tool_call": "call", "answer": "answer"}


def split_segments(content: str) -> list[tuple[str, str]]:
    """Splits an assistant turn into (thought | call | answer | text, text) in order; unclosed tags run to the end."""
    out, at = [], 0
    for match in TAGS.finditer(content):
        out += [("text", content[at : match.start()]), (KINDS[match[1]], match[2])]
        at = match.end()
    out.append(("text", content[at:]))
    return [(kind, text.strip()) for kind, text in out if text.strip()]


def distinct_citations(text: str | None) -> list[str]:
    """Citation ids of a text in order of first appearance."""
    return list(dict.fromkeys(id_ for id_ in cited_ids(text or "") if id_))


def episode_row(
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
    """One episode for the page. `where` names its stage or iteration for readers."""
    rubrics = {rubric.rid: rubric for rubric in rubric_set.rubrics} if rubric_set else {}
    steps = []
    for message in trajectory.messages:
        step: dict[str, Any] = {"role": message.role}
        if message.role == "assistant":
            step["parts"] = split_segments(message.content)
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
            [j.rid, getattr(rubrics.get(j.rid), "criterion", ""), j.weight, j.role, j.verdict, j.score, j.reason]
            + [getattr(rubrics.get(j.rid), "fatal", False)]
            for j in verdict.judgments
        ]
    if not trajectory.kept:
        out["dropped"] = trajectory.drop_reason or "no reason given"
    if missing:
        out["missing"] = missing
    if tokens:
        out["tokens"] = dict(tokens)
    out["outcome"] = episode_outcome(out)
    return out


def episode_outcome(row: Mapping[str, Any]) -> str:
    """How the episode ended, for the page's filter."""
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


def evaluated_episode(result: Result, task: Task | None, rubric_set: RubricSet | None, where: str) -> dict[str, Any]:
    return episode_row(
        result.trajectory,
        result.verdict,
        where=where,
        seed=result.seed,
        task=task,
        rubric_set=rubric_set,
        missing=result.missing,
    )


def rollout_episode(
    row: Mapping[str, Any], log: Mapping[str, Any] | None, *, seed: int | None, tasks: Mapping, rubrics: Mapping
) -> dict[str, Any]:
    """A recorded episode of PPO.

    Args:
        row: of an iteration's .jsonl (rl/recordings.py).
        log: the arrays of its token log; None when only the row's own lists are available, which few episodes have.
        tasks, rubrics: by task id; this one may be absent.
    """
    trajectory = Trajectory.model_validate(row["trajectory"])
    missing = None
    if row.get("masked"):
        missing = f"{row['masked']}: {trajectory.metadata.get('cause', 'no cause given')}"
    series = {name: row.get(field) for name, field in SERIES.items()}
    if log is not None and series["sampler"] is None:
        series["sampler"] = log["logprobs"]
    ids, sampled, version = (
        row[name] if row.get(name) is not None else None if log is None else log[name]
        for name in ("tokens", "sampled", "version")
    )
    out = episode_row(
        trajectory,
        Verdict.model_validate(row["verdict"]) if row.get("verdict") else None,
        where=f"PPO, iteration {row['iteration']}",
        seed=seed,
        task=tasks.get(trajectory.task_id),
        rubric_set=rubrics.get(trajectory.task_id),
        tokens=None if ids is None else token_detail(ids, sampled, series, version),
        missing=missing,
    )
    place = (seed, row["iteration"], row["index"])
    out |= {"link": "-".join(str(part) for part in place if part is not None), "iteration": row["iteration"]}
    if row.get("masked"):
        out["masked"] = row["masked"]
    return out


SERIES = {"advantage": "advantages", "value": "values", "trainer": "logprobs", "sampler": "sampler_logprobs"}


def token_detail(
    ids: Sequence[int],
    sampled: Sequence[bool],
    series: Mapping[str, Sequence[float] | None],
    version: Sequence[int] | None = None,
) -> dict[str, Any]:
    """An episode's token ids and per-token numbers, rounded: {"ids", "runs", "version", <name of a series>...}.

    `runs` are the lengths of alternating runs of observed and sampled tokens, observed first. Only sampled tokens have
    numbers.

    Args:
        series: name -> numbers [T]; None or another length: left out.
        version: of the weights that sampled each token.
    """
    flags = [bool(flag) for flag in sampled]
    runs, now = [0], False
    for flag in flags:
        if flag != now:
            runs.append(0)
            now = flag
        runs[-1] += 1
    out: dict[str, Any] = {"ids": [int(id_) for id_ in ids], "runs": runs}
    for name, numbers in series.items():
        if numbers is not None and len(numbers) == len(flags):
            digits = 7 if name in ("trainer", "sampler") else 4  # gaps between those two are small differences
            out[name] = [_short(v, digits) for v, flag in zip(numbers, flags, strict=True) if flag]
    if version is not None and len(version) == len(flags):
        out["version"] = [int(v) for v, flag in zip(version, flags, strict=True) if flag]
    return out


def token_texts(ids: Iterable[int], piece: Callable[[int], bytes]) -> dict[str, str | list[int]]:
    """Token id -> text, or bytes where a token is not whole characters (frequent in Chinese)."""
    out: dict[str, str | list[int]] = {}
    for id_ in sorted(set(ids)):
        raw = piece(id_)
        try:
            out[str(id_)] = raw.decode()
        except UnicodeDecodeError:
            out[str(id_)] = list(raw)
    return out


def take_in_turn(groups: Sequence[Sequence[dict[str, Any]]], max_bytes: int = MAX_BYTES) -> list[dict[str, Any]]:
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


def stratify(rows: Iterable[Any], key: Callable[[Any], Any]) -> list[Any]:
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


def render_viewer_page(template: str, context: Mapping[str, Any]) -> str:
    """A page with the styles and scripts of the viewer."""
    return render_page(template, context, styles=STYLES, scripts=SCRIPTS)


def _short(value: float | None, digits: int = 4) -> float | None:
    if value is None or not math.isfinite(value):
        return None
    return float(f"{float(value):.{digits}g}")
