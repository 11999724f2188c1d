"""Intervals for evaluation numbers: bootstrap over tasks (and training seeds), paired differences, Wilson for shares.

Episodes of one task are not independent, so tasks are resampled, never episodes. Training seeds answer the same tasks:
with several of them tasks and seeds are resampled independently of each other (a crossed bootstrap), which also carries
the variation between trainings. Everything is a deterministic function of the data and `seed`; numpy only.

A missing value is None or NaN and is left out of numerator and denominator alike; it is never a 0.
"""

import dataclasses
import functools
import math
from collections.abc import Mapping, Sequence
from statistics import NormalDist

import numpy as np

CONFIDENCE = 0.95
RESAMPLES = 10_000


@dataclasses.dataclass(frozen=True)
class Interval:
    """A mean with its interval. `n` counts values, `clusters` the tasks they come from; NaN where nothing is known."""

    mean: float
    low: float
    high: float
    n: int
    clusters: int

    @property
    def excludes_zero(self) -> bool:
        return self.low > 0 or self.high < 0


NOTHING = Interval(math.nan, math.nan, math.nan, 0, 0)


@dataclasses.dataclass(frozen=True)
class Paired:
    """The mean difference between two stages on the same tasks.

    `fixed_seeds` resamples tasks only: how sure are we for these trainings. `crossed` resamples seeds too: how sure are
    we for another training. With one seed the two are the same.
    """

    crossed: Interval
    fixed_seeds: Interval
    per_seed: dict[str, Interval]
    unpaired: int  # (task, seed) cells that only one of the two stages has


def wilson(successes: int, n: int, confidence: float = CONFIDENCE) -> Interval:
    """Wilson's score interval of a share (E. B. Wilson, 1927); sensible at 0 and n successes too."""
    if not 0 <= successes <= n:
        raise ValueError(f"expected 0 <= successes <= n, got {successes} of {n}")
    if n == 0:
        return NOTHING
    z = NormalDist().inv_cdf((1 + confidence) / 2)
    share = successes / n
    centre = (share + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * math.sqrt(share * (1 - share) / n + z * z / (4 * n * n))
    low = 0.0 if successes == 0 else centre - half  # exactly, where rounding would leave 1e-17
    high = 1.0 if successes == n else centre + half
    return Interval(share, low, high, n, n)


def ratio(
    numerator_TS: np.ndarray,
    denominator_TS: np.ndarray,
    *,
    resample_seeds: bool = True,
    confidence: float = CONFIDENCE,
    resamples: int = RESAMPLES,
    seed: int = 0,
) -> Interval:
    """Bootstrap interval of sum(numerator) / sum(denominator), percentile method.

    Args:
        numerator_TS: float [tasks, seeds]; sums over the episodes of a cell.
        denominator_TS: float [tasks, seeds]; counts of the same cells, 0 where a cell has no episode.
        resample_seeds: resample columns too; False keeps them as they are.

    Returns:
        The interval; low and high are NaN with fewer than two tasks.
    """
    numerator_TS = np.asarray(numerator_TS, np.float64)
    denominator_TS = np.asarray(denominator_TS, np.float64)
    if numerator_TS.ndim != 2 or numerator_TS.shape != denominator_TS.shape:
        raise ValueError(f"expected two [tasks, seeds] arrays, got {numerator_TS.shape} and {denominator_TS.shape}")
    filled = denominator_TS > 0
    rows = filled.any(axis=1)
    numerator_TS, denominator_TS = np.where(filled, numerator_TS, 0.0)[rows], denominator_TS[rows]
    tasks, seeds = numerator_TS.shape
    if tasks == 0:
        return NOTHING
    count = round(denominator_TS.sum())
    mean = numerator_TS.sum() / denominator_TS.sum()
    if tasks < 2:
        return Interval(mean, math.nan, math.nan, count, tasks)
    weights_RT, weights_RS = _weights(tasks, seeds if resample_seeds else 1, resamples, seed)
    numerator_R = ((weights_RT @ numerator_TS) * weights_RS).sum(axis=1)
    denominator_R = ((weights_RT @ denominator_TS) * weights_RS).sum(axis=1)
    drawn_R = numerator_R[denominator_R > 0] / denominator_R[denominator_R > 0]
    low, high = np.quantile(drawn_R, [(1 - confidence) / 2, (1 + confidence) / 2])
    return Interval(float(mean), float(low), float(high), count, tasks)


@functools.lru_cache(maxsize=16)  # a report asks for the same draw many times; 10 MB each at 120 tasks
def _weights(tasks: int, seeds: int, resamples: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """How often each task and seed is drawn: float64 [resamples, tasks], [resamples, seeds] ([1, 1] for one seed)."""
    random = np.random.default_rng(seed)
    weights_RT = random.multinomial(tasks, np.full(tasks, 1 / tasks), size=resamples).astype(np.float64)
    if seeds == 1:
        return weights_RT, np.ones((1, 1))
    weights_RS = random.multinomial(seeds, np.full(seeds, 1 / seeds), size=resamples).astype(np.float64)
    return weights_RT, weights_RS


Values = Mapping[str, Mapping[str, Sequence[float | None]]]  # seed -> task -> one value per episode


def _cells(values: Values, tasks: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
    """Sums and counts [tasks, seeds] of the values that are there."""
    sums_TS, counts_TS = np.zeros((len(tasks), len(values))), np.zeros((len(tasks), len(values)))
    for column, seed in enumerate(values):
        for row, task in enumerate(tasks):
            kept = [float(v) for v in values[seed].get(task, ()) if v is not None and not math.isnan(v)]
            sums_TS[row, column], counts_TS[row, column] = sum(kept), len(kept)
    return sums_TS, counts_TS


def _tasks(*groups: Values) -> list[str]:
    return sorted({task for values in groups for by_task in values.values() for task in by_task})


def mean(values: Values, **settings) -> Interval:
    """Mean over episodes with a crossed bootstrap interval. `settings` go to `ratio`."""
    return ratio(*_cells(values, _tasks(values)), **settings)


def sums_ratio(numerators: Values, denominators: Values, **settings) -> Interval:
    """Sum of numerators over sum of denominators, both of the same episodes; see `share` for its edges."""
    tasks = _tasks(numerators, denominators)
    return _edged(ratio(_cells(numerators, tasks)[0], _cells(denominators, tasks)[0], **settings))


def share(values: Values, **settings) -> Interval:
    """As `mean`, for 0/1 values. When all are equal, so is every resample: then it is Wilson's interval over tasks."""
    return _edged(mean(values, **settings))


def _edged(interval: Interval) -> Interval:
    if interval.clusters and interval.mean in (0.0, 1.0):
        bound = wilson(round(interval.mean * interval.clusters), interval.clusters)
        return dataclasses.replace(interval, low=bound.low, high=bound.high)
    return interval


def paired(before: Values, after: Values, **settings) -> Paired:
    """Mean difference after - before over the (task, seed) cells that both have, each cell the mean of its episodes."""
    seeds = [seed for seed in before if seed in after]
    before, after = {seed: before[seed] for seed in seeds}, {seed: after[seed] for seed in seeds}
    tasks = _tasks(before, after)
    sums_before_TS, counts_before_TS = _cells(before, tasks)
    sums_after_TS, counts_after_TS = _cells(after, tasks)
    both_TS = (counts_before_TS > 0) & (counts_after_TS > 0)
    one_TS = (counts_before_TS > 0) ^ (counts_after_TS > 0)
    difference_TS = sums_after_TS / np.maximum(counts_after_TS, 1) - sums_before_TS / np.maximum(counts_before_TS, 1)
    difference_TS = np.where(both_TS, difference_TS, 0.0)
    ones_TS = both_TS.astype(np.float64)
    per_seed = {
        seed: ratio(difference_TS[:, i : i + 1], ones_TS[:, i : i + 1], **settings) for i, seed in enumerate(seeds)
    }
    return Paired(
        crossed=ratio(difference_TS, ones_TS, **settings),
        fixed_seeds=ratio(difference_TS, ones_TS, resample_seeds=False, **settings),
        per_seed=per_seed,
        unpaired=int(one_TS.sum()),
    )
