"""Rows of evaluated episodes, and metrics with intervals over sets of rows, by kind and language."""

import dataclasses
import os
from collections.abc import Callable, Iterable, Mapping

from stepdr_jax import records
from stepdr_jax.evaluation import statistics
from stepdr_jax.evaluation.statistics import Interval

BREAKDOWN_RESAMPLES = 2_000  # per cell of a table by kind or language; the headline uses statistics.RESAMPLES


class Result(records.Record):
    """One held-out episode. `missing` names the cause when nothing could be measured; the row then has no reward."""

    index: int  # task_index * samples + sample: the order of the file
    task_index: int
    sample: int
    stage: str
    seed: int  # training seed
    sampling_seed: int
    fingerprint: str  # of checkpoint, tasks and settings; rows of another fingerprint are not mixed in
    task_id: str
    kind: str
    lang: str
    query: str
    trajectory: records.Trajectory
    verdict: records.Verdict
    finish: str
    reward: float | None = None
    correct: bool | None = None
    cited: bool | None = None
    turns: int = 0
    tool_calls: int = 0
    errors: int = 0  # tool errors and malformed turns
    recovered: int = 0  # of those, followed by a successful call or the answer
    tokens: float | None = None
    cost: float | None = None  # tokens x price
    wall_seconds: float = 0.0
    attempts: int = 1
    missing: str | None = None


@dataclasses.dataclass(frozen=True)
class Metric:
    """One column: value of an episode (None: says nothing), or a ratio of two sums."""

    name: str
    title: str
    unit: str  # share, score, count, tokens, price, seconds, difference
    value: Callable[[Result], float | None]
    weight: Callable[[Result], float] | None = None  # denominator of a ratio


def _flag(value: bool | None) -> float | None:
    return None if value is None else float(value)


METRICS = (
    Metric("reward", "Reward", "score", lambda r: r.reward),
    Metric("correct", "Correct", "share", lambda r: _flag(r.correct)),
    Metric("cited", "Cited", "share", lambda r: _flag(r.cited)),
    Metric("answered", "Answered", "share", lambda r: float(r.finish == "answered")),
    Metric("recovered", "Recovered", "ratio", lambda r: float(r.recovered), lambda r: float(r.errors)),
    Metric("errors", "Errors", "count", lambda r: float(r.errors)),
    Metric("turns", "Turns", "count", lambda r: float(r.turns)),
    Metric("tokens", "Tokens", "tokens", lambda r: r.tokens),
    Metric("cost", "Cost", "price", lambda r: r.cost),
)
BY_NAME = {metric.name: metric for metric in METRICS}


def read_results(path: str | os.PathLike) -> list[Result]:
    """Reads rows in index order; raises UserError for a missing or damaged file."""
    return sorted(records.read_records(path, Result), key=lambda result: result.index)


def values(results: Iterable[Result], metric: Metric) -> statistics.Values:
    """seed -> task -> values, missing episodes left out."""
    out: dict[str, dict[str, list[float | None]]] = {}
    for result in results:
        by_task = out.setdefault(str(result.seed), {})
        if result.missing is None:
            by_task.setdefault(result.task_id, []).append(metric.value(result))
    return out


def measure(results: Iterable[Result], metric: Metric, **settings) -> Interval:
    """One metric over rows of one stage and any seeds; crossed bootstrap interval."""
    results = [result for result in results if result.missing is None]
    if metric.weight is not None:
        weights: dict[str, dict[str, list[float]]] = {}
        for result in results:
            weights.setdefault(str(result.seed), {}).setdefault(result.task_id, []).append(metric.weight(result))
        return statistics.sums_ratio(values(results, metric), weights, **settings)
    average = statistics.share if metric.unit == "share" else statistics.mean
    return average(values(results, metric), **settings)


def summary(results: Iterable[Result], **settings) -> dict[str, Interval]:
    """Every metric by name."""
    results = list(results)
    return {metric.name: measure(results, metric, **settings) for metric in METRICS}


def breakdown(results: Iterable[Result], field: str, names: Iterable[str] = ("reward", "correct", "cited")):
    """field value ("kind" or "lang") -> metric name -> interval, in order of the field's values."""
    groups: dict[str, list[Result]] = {}
    for result in results:
        groups.setdefault(getattr(result, field), []).append(result)
    return {
        key: {name: measure(groups[key], BY_NAME[name], resamples=BREAKDOWN_RESAMPLES) for name in names}
        for key in sorted(groups)
    }


def missing_causes(results: Iterable[Result]) -> Mapping[str, int]:
    """Cause -> number of episodes that could not be measured."""
    causes: dict[str, int] = {}
    for result in results:
        if result.missing is not None:
            causes[result.missing] = causes.get(result.missing, 0) + 1
    return causes
