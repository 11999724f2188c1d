"""The trajectory page: the recorded episodes of PPO iterations in one HTML file, token by token.

The list of episodes is unpacked when the page opens; everything else is in compressed blocks, each of which is unpacked
when one of its episodes is shown. Nothing is fetched, so the file can be copied from a cluster and opened anywhere.
"""

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from stepdr_jax import files
from stepdr_jax.errors import UserError
from stepdr_jax.pages.render import embed_json, pack_json
from stepdr_jax.pages.wording import count_of
from stepdr_jax.reporting import viewer
from stepdr_jax.reporting.collect import local_time
from stepdr_jax.rl import recordings
from stepdr_jax.tokens.tokenizer import Tokenizer

BLOCK_BYTES = 400_000  # of JSON: small enough to unpack at a key press, large enough to compress well
LISTED = (
    "link",
    "iteration",
    "where",
    "seed",
    "task",
    "kind",
    "lang",
    "finish",
    "outcome",
    "masked",
    "reward",
    "correct",
)
QUERY_CHARACTERS = 200  # of the question, in the list


def select_iterations(directory: Path, wanted: str = "") -> list[int]:
    """The recorded iterations of a folder, in order.

    Args:
        wanted: "" all of them, "12" one, "0,10-19,59" some.

    Raises UserError when there are none, or `wanted` names one that is not there.
    """
    there = sorted(int(path.stem) for path in directory.glob("*.jsonl") if path.stem.isdigit())
    if not there:
        raise UserError(f"{directory}: expected recorded iterations (0000.jsonl, 0000.npz, ...), found none")
    if not wanted:
        return there
    chosen: set[int] = set()
    for part in wanted.split(","):
        match = re.fullmatch(r"\s*(\d+)(?:-(\d+))?\s*", part)
        if not match:
            raise UserError(f"--only: expected iterations such as 12 or 0,10-19,59, got {wanted!r}")
        chosen.update(range(int(match[1]), int(match[2] or match[1]) + 1))
    missing = sorted(chosen - set(there))
    if missing:
        raise UserError(f"--only: iteration {missing[0]} is not in {directory}, which has {there[0]} to {there[-1]}")
    return sorted(chosen)


def write_trajectories_page(
    directory: Path,
    out: Path,
    *,
    iterations: Sequence[int],
    tokenizer: Tokenizer,
    tasks: Mapping[str, Any],
    rubrics: Mapping[str, Any],
    title: str,
    seed: int | None = None,
    max_bytes: int = 40_000_000,
) -> dict[str, int]:
    """Writes the page; returns counts: episodes, shown, bytes.

    Args:
        directory: of recordings. tasks, rubrics: by task id; without them the page shows the trajectory's own
        question and no criteria. max_bytes: of packed episodes. Every iteration gets an equal share, episodes with
        values first; the page says how
            many were omitted.

    Raises UserError when a recording is damaged.
    """
    packed, rows, ids, seen = [], [], set(), 0
    sizes: dict[str, list[np.ndarray]] = {}
    for number, iteration in enumerate(iterations):
        held = _recorded(directory, iteration)
        seen += len(held)
        held.sort(key=lambda pair: "values" not in pair[0])  # stable
        left = max_bytes * (number + 1) / len(iterations) - sum(map(len, packed))
        for block in _blocks(recordings.recording_paths(directory, iteration)[0], held, seed, tasks, rubrics):
            text = pack_json([_body(row) for row in block])
            if len(text) > left and packed:
                break
            left -= len(text)
            for at, row in enumerate(block):
                rows.append(_listed(row, len(packed), at))
                tokens = row.get("tokens", {})
                ids.update(tokens.get("ids", ()))
                for name, values in _numbers(tokens).items():
                    sizes.setdefault(name, []).append(np.abs(values))
            packed.append(text)
    rows.sort(key=lambda row: (row["iteration"], row["index"]))
    detailed = sum(row.get("detailed", False) for row in rows)
    page = viewer.render_viewer_page(
        "trajectories.html.j2",
        dict(
            title=title,
            sentence=_sentence(iterations, rows, seen, detailed),
            written=f"{directory}, {local_time()}",
            rows=pack_json(rows),
            vocabulary=pack_json(viewer.token_texts(ids, tokenizer.piece)),
            scales=embed_json({name: _scale(values) for name, values in sizes.items()}),
            blocks=packed,
            first=max(range(len(rows)), key=lambda i: _interest(rows[i]), default=0),
        ),
    )
    files.write_atomic(out, page)
    return {"episodes": seen, "shown": len(rows), "bytes": len(page.encode())}


def _interest(row: Mapping[str, Any]) -> tuple:
    """Rank for the episode to show first: with values, late in training, with many turns."""
    return (row.get("detailed", False), row["iteration"], row.get("turns") or 0, row.get("reward") or 0)


def _recorded(directory: Path, iteration: int) -> list[tuple[dict, dict | None]]:
    rows, logs = recordings.recording_paths(directory, iteration)
    if logs.exists():
        return recordings.read_recording(directory, iteration)[1]
    return [(row, None) for row in files.read_jsonl(rows)]  # the token logs of this iteration were not copied


def _blocks(rows: Path, held, seed, tasks, rubrics) -> Iterator[list[dict]]:
    block, size = [], 0
    for number, (row, log) in enumerate(held):
        try:
            made = viewer.rollout_episode(row, log, seed=seed, tasks=tasks, rubrics=rubrics) | {"index": row["index"]}
        except (KeyError, TypeError, ValueError) as error:
            said = " ".join(str(error).split())[:160]
            raise UserError(
                f"{rows} row {number + 1}: expected a recorded episode, got something else ({said})"
            ) from None
        block.append(made)
        size += len(json.dumps(block[-1], ensure_ascii=False))
        if size >= BLOCK_BYTES:
            yield block
            block, size = [], 0
    if block:
        yield block


def _listed(row: dict[str, Any], block: int, at: int) -> dict[str, Any]:
    """What the list shows, filters and sorts by, and the block that has the rest."""
    out = {name: row[name] for name in (*LISTED, "index") if row.get(name) is not None}
    out |= {"query": row["query"][:QUERY_CHARACTERS], "seed": row["seed"], "block": block, "at": at}
    out |= {name: row["stats"].get(field) for name, field in (("sampled", "sampled_tokens"), ("turns", "turns"))}
    numbers = _numbers(row.get("tokens", {}))
    if "value" in numbers:
        out["detailed"] = True
    if "gap" in numbers and numbers["gap"].size:
        out["gap"] = float(f"{np.abs(numbers['gap']).max():.4g}")
    return out


def _body(row: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in row.items() if name not in LISTED}


def _numbers(tokens: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """The series of an episode that the page can color by."""
    out = {name: np.asarray(tokens[name], float) for name in ("advantage", "value", "sampler") if name in tokens}
    if "trainer" in tokens and "sampler" in tokens:
        out["gap"] = np.asarray(tokens["trainer"], float) - out["sampler"]
    return {name: values[np.isfinite(values)] for name, values in out.items()}


def _scale(values: list[np.ndarray]) -> float:
    """The value of the strongest color in all episodes: one token in a hundred is beyond it."""
    joined = np.concatenate(values)
    return float(f"{np.quantile(joined, 0.99):.2g}") if joined.size else 0.0


def _sentence(iterations: Sequence[int], rows: Sequence[dict], seen: int, detailed: int) -> str:
    several = len(iterations) > 1
    where = f"iterations {iterations[0]} to {iterations[-1]}" if several else f"iteration {iterations[0]}"
    said = f"{count_of(len(rows), 'episode')} of {where}, {detailed:,} with values and advantages."
    if len(rows) < seen:
        omitted = f" {seen - len(rows):,} more were omitted to keep this file small"
        said += f"{omitted}; --only=ITERATION shows a single iteration."
    return said
