"""Held-out evaluation: metrics by stage, paired differences, breakdowns."""

import itertools
import math
from collections.abc import Mapping
from typing import Any

from stepdr_jax.evaluation import results, statistics
from stepdr_jax.evaluation.statistics import Interval
from stepdr_jax.pages import plots
from stepdr_jax.pages.plots import Dot
from stepdr_jax.pages.wording import KIND_TITLES, LANG_TITLES, count_of, table
from stepdr_jax.reporting.collect import Run
from stepdr_jax.reporting.sections.headline import interval_note, stage_dots
from stepdr_jax.reporting.sections.wording import Section, value_cell
from stepdr_jax.runtime.stages import title_of


def stage_differences(run: Run) -> dict[tuple[str, str], dict[str, statistics.Paired]]:
    """(before, after) -> metric -> paired difference, for consecutive evaluated stages."""
    pairs = itertools.pairwise(run.evaluated)
    return {
        (before, after): {
            name: statistics.paired(
                results.values(run.evaluated[before], results.BY_NAME[name]),
                results.values(run.evaluated[after], results.BY_NAME[name]),
            )
            for name in ("reward", "correct", "cited", "turns", "tokens")
        }
        for before, after in pairs
    }


def evaluation_section(
    run: Run,
    summaries: Mapping[str, Mapping[str, Interval]],
    paired: Mapping[tuple[str, str], Mapping[str, statistics.Paired]],
    breakdowns: Mapping[str, Mapping[str, Mapping[str, Mapping[str, Interval]]]],
) -> Section:
    if not run.evaluated:
        return {"present": False}
    seeds = sorted({row.seed for rows in run.evaluated.values() for row in rows})
    tasks = len({row.task_id for rows in run.evaluated.values() for row in rows})
    several = len(seeds) > 1
    section: Section = {"present": True, "several_seeds": several, "notes": []}
    section["sentence"] = (
        f"Every stage{f' and each of {len(seeds)} seeds' if several else ''} is evaluated on the same "
        f"{count_of(tasks, 'held-out task')}, with the same episode loop, tools, budgets and judge. Correct: the "
        "answer states the known value (open report tasks have none). Cited: the answer has citations, and all of them "
        "resolve to a passage that the episode observed. Recovered: share of tool errors and malformed turns after "
        "which a call succeeded or the answer came."
    )
    head = ["Stage", *(metric.title for metric in results.METRICS), "Episodes"]
    rows = []
    for stage, summary in summaries.items():
        measured = sum(row.missing is None for row in run.evaluated[stage])
        rows.append(
            [
                title_of(stage),
                *(value_cell(summary[metric.name], metric.unit) for metric in results.METRICS),
                {"value": f"{measured:,}", "range": _missing(len(run.evaluated[stage]) - measured)},
            ]
        )
    section["table"] = table(head, rows, dense=True)
    section["notes"].append(
        f"Below each value: its 95\u00a0% interval, by bootstrap over tasks{' and seeds' if several else ''}. "
        "Cost of 1,000 episodes: tokens times the configured price, in an arbitrary unit."
    )
    for stage, evaluated in run.evaluated.items():
        causes = results.missing_causes(evaluated)
        if causes:
            told = "; ".join(f"{cause} ({count})" for cause, count in causes.items())
            section["notes"].append(
                f"{title_of(stage)}: episodes without a measurement, excluded and not counted as 0: {told}."
            )
    section["figures"] = [
        plots.dot_chart(
            [(title_of(stage), stage_dots(run, stage, metric)) for stage in run.evaluated],
            title=metric.title,
            x_label={"share": "share of episodes", "ratio": "share of errors"}.get(metric.unit, metric.title.lower()),
            x_range=(0, 1) if metric.unit in ("share", "ratio") else None,
            note=interval_note(run),
        )
        for metric in (results.BY_NAME[name] for name in ("cited", "answered", "recovered", "turns"))
    ]
    section["differences"] = _difference_table(paired) if paired else None
    section["paired_figures"] = _difference_figures(paired) if ("sft", "ppo") in paired else []
    section["breakdowns"] = [
        _breakdown_table(breakdowns, field, titles, head)
        for field, titles, head in (("kind", KIND_TITLES, "Kind"), ("lang", LANG_TITLES, "Language"))
    ]
    return section


def _missing(count: int) -> str:
    return f"{count} missing" if count else ""


def _difference_table(paired: Mapping[tuple[str, str], Mapping[str, statistics.Paired]]) -> Section:
    rows = []
    for (before, after), by_metric in paired.items():
        row: list[Any] = [f"{title_of(before)} → {title_of(after)}"]
        for name in ("reward", "correct", "cited"):
            row.append(value_cell(by_metric[name].crossed, "difference"))
        for name in ("turns", "tokens"):
            interval = by_metric[name].crossed
            row.append(
                {"value": _signed(interval.mean), "range": f"{_signed(interval.low)} to {_signed(interval.high)}"}
            )
        rows.append(row)
    return table(["Step", "Reward", "Correct", "Cited", "Turns", "Tokens"], rows)


def _signed(value: float) -> str:
    if not math.isfinite(value):
        return "–"
    digits = 0 if abs(value) >= 100 else 1 if abs(value) >= 10 else 2
    return f"{value:+,.{digits}f}".replace("-", "−")


def _difference_figures(paired: Mapping[tuple[str, str], Mapping[str, statistics.Paired]]) -> list[str]:
    out = []
    for name in ("reward", "correct"):
        found = paired[("sft", "ppo")][name]
        several = len(found.per_seed) > 1
        rows = [(f"seed {seed}", [Dot(i.mean, i.low, i.high)]) for seed, i in found.per_seed.items()]
        if several:
            fixed, crossed = found.fixed_seeds, found.crossed
            rows.append(("all seeds, tasks resampled", [Dot(fixed.mean, fixed.low, fixed.high, colour=2)]))
            rows.append(("all seeds, both resampled", [Dot(crossed.mean, crossed.low, crossed.high, colour=1)]))
        title = f"PPO minus SFT: {results.BY_NAME[name].title.lower()}"
        out.append(
            plots.dot_chart(
                rows, title=title, x_label="paired difference", zero=True, note="Whiskers: 95\u00a0% interval."
            )
        )
    return out


def _breakdown_table(breakdowns, field: str, titles: Mapping[str, str], head: str) -> Section:
    stages = list(breakdowns)
    keys = list(dict.fromkeys(key for stage in stages for key in breakdowns[stage][field]))
    rows = []
    for key in keys:
        for name in ("reward", "correct"):
            cells = [breakdowns[stage][field].get(key, {}).get(name, statistics.NOTHING) for stage in stages]
            if all(cell.n == 0 for cell in cells):
                continue
            metric = results.BY_NAME[name]
            label = {
                "value": f"{titles.get(key, key)}: {metric.title.lower()}",
                "range": count_of(max(cell.clusters for cell in cells), "task"),
            }
            rows.append([label, *(value_cell(cell, metric.unit) for cell in cells)])
    return table([head, *(title_of(stage) for stage in stages)], rows)


LIMITS = (
    "The model is tiny, and the offline web is small: its pages are written from a few sentence patterns over real "
    "facts. That the model learns to search and cite here shows that the parts of the recipe work together, not how "
    "well any of them works at scale.",
    "The judge is a program that checks answers for known values and citations. It cannot judge style, depth or "
    "reasoning; a high reward means that its criteria are met, no more.",
    "Held-out tasks ask about entities that no training task asks about, but with the same sentence patterns, "
    "relations and tools.",
    "There are few seeds and one offline web. The intervals cover the choice of tasks and, with several seeds, of "
    "training runs; they do not cover the choice of offline web, templates or settings.",
    "None of these numbers can be compared with published results of large models.",
    "Cost and time are those of this machine and this model size.",
)
