"""Reads a run directory into plain data for the report.

A part that does not exist yet is None or empty; the report then names the command that makes it. A damaged file is a
UserError.
"""

import collections
import dataclasses
import datetime
import json
import math
import os
import platform
import re
import subprocess
from collections.abc import Iterable, Iterator
from importlib import metadata
from pathlib import Path
from typing import Any

from stepdr_jax import files
from stepdr_jax.evaluation import results
from stepdr_jax.evaluation.results import Result
from stepdr_jax.reporting.measures import flatten_row
from stepdr_jax.runtime import stages
from stepdr_jax.runtime.layout import RunLayout

STEP_KEYS = ("step", "iteration")


@dataclasses.dataclass(frozen=True)
class Curves:
    """metrics.jsonl of one stage and seed: x positions and one list per metric (NaN where a row lacks it)."""

    x: list[float]
    values: dict[str, list[float]]


@dataclasses.dataclass
class Run:
    """Everything the report reads. Keys of nested dicts: seed, then stage."""

    layout: RunLayout
    seeds: list[int]
    curves: dict[int, dict[str, Curves]]
    qa: dict[int, dict[str, Curves]]  # of evaluation checkpoints, over training tokens
    events: dict[int, dict[str, list[dict[str, Any]]]]  # the event log of a training stage
    done: dict[int, dict[str, dict[str, Any]]]
    evaluated: dict[str, list[Result]]  # stage -> rows of all seeds
    data: dict[str, Any]
    iterations: dict[int, list[Path]]  # ppo episode files in order
    ledger: dict[str, dict[str, Any]]  # the quickstart's: "offline_web" or "seed0.sft" -> seconds, peak_bytes
    teacher_episodes: list[dict[str, Any]]  # without renamed copies

    @property
    def first_seed(self) -> int:
        return self.seeds[0] if self.seeds else 0


def collect_run(run_dir: str | os.PathLike) -> Run:
    """Reads everything under `run_dir`, which may still be empty."""
    layout = RunLayout.of_run_dir(run_dir)
    seeds = layout.seeds()
    ledger = files.read_json(layout.ledger) if layout.ledger.exists() else {}
    episodes = read_teacher_episodes(layout)
    run = Run(layout, seeds, {}, {}, {}, {}, {}, collect_data(layout, episodes), {}, ledger, episodes)
    for seed in seeds:
        learned = {
            stage.name: layout.stage(stage.name, seed) for stage in stages.STAGES if stage.unit and stage.planned
        }
        trained = {name: learned[name] for name in stages.trained()}
        run.curves[seed] = {
            name: read_curves(files.read_jsonl(stage.metrics))
            for name, stage in learned.items()
            if stage.metrics.exists()
        }
        run.qa[seed] = {
            name: read_curves(row | {"step": row["tokens"]} for row in files.read_jsonl(stage.qa_rows))
            for name, stage in trained.items()
            if stage.qa_rows.exists()
        }
        run.events[seed] = {
            name: files.read_jsonl(stage.events) for name, stage in trained.items() if stage.events.exists()
        }
        run.done[seed] = {name: files.read_json(stage.done) for name, stage in learned.items() if stage.done.exists()}
        for name in stages.evaluated():
            rows = layout.evaluated(name, seed)
            if rows.exists():
                run.evaluated.setdefault(name, []).extend(results.read_results(rows))
        run.iterations[seed] = sorted(learned["ppo"].iterations.glob("[0-9]*.jsonl"))
    run.evaluated = {name: run.evaluated[name] for name in stages.evaluated() if name in run.evaluated}
    return run


def read_curves(rows: Iterable[dict[str, Any]]) -> Curves:
    """Turns rows into curves over `step` or `iteration`; of rows with the same x (a resumed stage) the last counts."""
    by_x: dict[float, dict[str, float]] = {}
    for index, row in enumerate(rows):
        flat = flatten_row(row)
        x = next((flat.pop(key) for key in STEP_KEYS if key in flat), float(index))
        by_x[x] = by_x.get(x, {}) | flat
    xs = sorted(by_x)
    names = list(dict.fromkeys(name for x in xs for name in by_x[x]))
    return Curves(xs, {name: [by_x[x].get(name, math.nan) for x in xs] for name in names})


# ------------------------------------------------------------------------------------------------------------- data


def read_teacher_episodes(layout: RunLayout) -> list[dict[str, Any]]:
    """Trajectories that the teacher ran, kept and dropped; their renamed copies are left out."""
    path = layout.corpus / "trajectories.jsonl"
    return [row for row in _rows(path) if "copy_of" not in row.get("metadata", {})] if path.exists() else []


def _rows(path: Path) -> Iterator[dict[str, Any]]:
    """Rows of a large JSONL file, one at a time; the corpus is written whole or not at all."""
    with open(path) as lines:
        for line in lines:
            yield json.loads(line)


def collect_data(layout: RunLayout, teacher_episodes: list[dict[str, Any]]) -> dict[str, Any]:
    """Counts of the corpus, the packed data and the tokenizer; a key is absent when its file is."""
    out: dict[str, Any] = {}
    corpus = layout.corpus
    if layout.corpus_card.exists():
        out["card"] = files.read_json(layout.corpus_card)
    if layout.tasks.exists():
        rows = files.read_jsonl(layout.tasks)
        out["tasks"] = _count((row["kind"], row["lang"], row.get("split", "train")) for row in rows)
    if teacher_episodes:
        kept = [row for row in teacher_episodes if row.get("kept", True)]
        out["trajectories"] = {
            "kept": len(kept),
            "dropped": len(teacher_episodes) - len(kept),
            "kept_by_capability": dict(collections.Counter(row.get("capability") or "other" for row in kept)),
            "dropped_by_reason": dict(
                collections.Counter(
                    _reason(row.get("drop_reason")) for row in teacher_episodes if not row.get("kept", True)
                ).most_common()
            ),
        }
    if out.get("card", {}).get("synthetic_documents"):
        out["synthetic_documents"] = out["card"]["synthetic_documents"]
    elif (path := corpus / "synthetic_documents.jsonl").exists():
        out["synthetic_documents"] = dict(collections.Counter(row["component"] for row in _rows(path)))
    if (corpus / "documents.jsonl").exists():
        with open(corpus / "documents.jsonl", "rb") as lines:
            out["documents"] = sum(1 for _ in lines)
    if layout.tokenizer.exists():
        spec = files.read_json(layout.tokenizer)
        out["tokenizer"] = len(spec.get("model", {}).get("vocab", {})) + len(spec.get("added_tokens", []))
    if layout.data_card.exists():
        out["prepared"] = files.read_json(layout.data_card)
    return out


def _reason(text: str | None) -> str:
    """A drop reason without details: the text before a colon or a number."""
    return re.split(r"[:(\d]", text or "no reason given")[0].strip() or "other"


def _count(keys: Iterable[tuple[str, str, str]]) -> list[dict[str, Any]]:
    counts = collections.Counter(keys)
    return [dict(kind=k, lang=lang, split=split, count=n) for (k, lang, split), n in sorted(counts.items())]


# ---------------------------------------------------------------------------------------------------------- machine


def describe_machine() -> dict[str, str]:
    """The machine of this process and its versions; unknown ones are omitted."""
    out = {"system": f"{platform.system()} {platform.release()}", "python": platform.python_version()}
    try:
        text = Path("/proc/cpuinfo").read_text()
        names = re.findall(r"^model name\s*:\s*(.+)$", text, re.MULTILINE)
        out["processor"] = names[0].strip() if names else platform.processor()
        memory = re.search(r"MemTotal:\s*(\d+)", Path("/proc/meminfo").read_text())
        if memory:
            out["memory"] = f"{int(memory[1]) / 2**20:.0f} GiB"
    except OSError:
        out["processor"] = platform.processor()
    out["cores"] = str(len(os.sched_getaffinity(0)))
    for package in ("jax", "flax", "optax", "numpy"):
        try:
            out[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    commit = _git("rev-parse", "--short=12", "HEAD")
    if commit:
        out["commit"] = commit + (
            " with local changes" if _git("status", "--porcelain", "--untracked-files=no") else ""
        )
    return out


def _git(*arguments: str) -> str:
    try:
        here = Path(__file__).parent
        done = subprocess.run(["git", *arguments], cwd=here, capture_output=True, text=True, timeout=10, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout.strip() if done.returncode == 0 else ""


def local_time() -> str:
    return datetime.datetime.now().astimezone().strftime("%Y-%m-%d %H:%M %Z")
