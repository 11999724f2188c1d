"""Intervals: known values, coverage, clustering, pairing, determinism."""

import math

import numpy as np
import pytest

from stepdr_jax.evaluation import cost, statistics


def one_seed(values):
    return {"0": {f"t{i}": [v] for i, v in enumerate(values)}}


@pytest.mark.parametrize(
    ("successes", "n", "low", "high"),
    [(8, 10, 0.4902, 0.9433), (0, 20, 0.0, 0.1611), (20, 20, 0.8389, 1.0), (50, 100, 0.4038, 0.5962)],
)
def test_wilson_known_values(successes, n, low, high):
    # from statsmodels.stats.proportion.proportion_confint(method="wilson")
    interval = statistics.wilson(successes, n)
    assert interval.mean == successes / n
    assert interval.low == pytest.approx(low, abs=1e-4)
    assert interval.high == pytest.approx(high, abs=1e-4)


def test_wilson_of_nothing_is_unknown():
    assert math.isnan(statistics.wilson(0, 0).mean)


def test_bootstrap_mean_agrees_with_the_normal_interval():
    values = np.random.default_rng(0).normal(2.0, 1.0, 400)
    interval = statistics.mean(one_seed(values))
    half = 1.96 * values.std() / 20
    assert interval.mean == pytest.approx(values.mean())
    assert interval.low == pytest.approx(values.mean() - half, abs=0.01)
    assert interval.high == pytest.approx(values.mean() + half, abs=0.01)
    assert (interval.n, interval.clusters) == (400, 400)


def test_bootstrap_is_deterministic_and_seeded():
    values = one_seed(np.random.default_rng(5).random(40))
    assert statistics.mean(values) == statistics.mean(values)
    assert statistics.mean(values, seed=1) != statistics.mean(values, seed=2)


def test_repeating_episodes_of_a_task_does_not_narrow_its_interval():
    values = np.random.default_rng(1).random(30)
    once = statistics.mean(one_seed(values))
    often = statistics.mean({"0": {f"t{i}": [v] * 50 for i, v in enumerate(values)}})
    assert often.mean == pytest.approx(once.mean)
    assert often.high - often.low == pytest.approx(once.high - once.low, rel=1e-6)
    assert often.n == 1500 and often.clusters == 30


def test_missing_values_are_left_out_not_zero():
    interval = statistics.mean({"0": {"a": [1.0, None], "b": [math.nan], "c": [1.0]}})
    assert interval.mean == 1.0
    assert (interval.n, interval.clusters) == (2, 2)


def test_ratio_weighs_cells_by_their_denominator():
    interval = statistics.ratio(np.array([[1.0], [0.0], [9.0]]), np.array([[1.0], [0.0], [9.0]]))
    assert interval.mean == 1.0 and interval.clusters == 2


def test_share_at_the_edge_is_not_a_point():
    interval = statistics.share(one_seed([0.0] * 20))
    assert (interval.low, interval.high) == (0.0, pytest.approx(0.1611, abs=1e-4))
    assert statistics.share(one_seed([1.0] * 20)).low == pytest.approx(0.8389, abs=1e-4)


def test_one_task_has_a_mean_and_no_interval():
    interval = statistics.mean({"0": {"a": [0.5]}})
    assert interval.mean == 0.5 and math.isnan(interval.low)
    assert math.isnan(statistics.mean({}).mean)


def test_pairing_removes_the_variation_between_tasks():
    random = np.random.default_rng(2)
    base = random.random(60)
    before, after = one_seed(base), one_seed(base + 0.1)
    result = statistics.paired(before, after)
    assert result.crossed.mean == pytest.approx(0.1)
    assert result.crossed.low == pytest.approx(0.1) and result.crossed.excludes_zero
    assert result.crossed == result.fixed_seeds == result.per_seed["0"]


def test_paired_difference_uses_only_cells_that_both_stages_have():
    before = {"0": {"a": [0.0, 1.0], "b": [0.5], "c": [None]}, "1": {"a": [0.0]}}
    after = {"0": {"a": [1.0], "b": [0.5], "c": [1.0]}, "2": {"a": [1.0]}}
    result = statistics.paired(before, after)
    assert result.crossed.mean == pytest.approx(0.25)
    assert result.unpaired == 1
    assert list(result.per_seed) == ["0"]


def test_seeds_that_disagree_widen_the_crossed_interval():
    tasks = [f"t{i}" for i in range(100)]
    zero = {str(s): {t: [0.0] for t in tasks} for s in range(3)}
    noise = np.random.default_rng(3).normal(0, 0.1, (3, 100))
    after = {str(s): {t: [shift + noise[s, i]] for i, t in enumerate(tasks)} for s, shift in enumerate((0.0, 0.1, 0.5))}
    result = statistics.paired(zero, after)
    assert result.fixed_seeds.excludes_zero
    width = result.crossed.high - result.crossed.low
    assert width > 3 * (result.fixed_seeds.high - result.fixed_seeds.low)


def test_bootstrap_covers_the_truth_about_as_often_as_it_says():
    random = np.random.default_rng(4)
    hits = 0
    for trial in range(200):
        clusters = random.normal(0.5, 0.3, 40)
        values = {"0": {f"t{i}": list(c + random.normal(0, 0.1, 3)) for i, c in enumerate(clusters)}}
        interval = statistics.mean(values, resamples=500, seed=trial)
        hits += interval.low <= 0.5 <= interval.high
    assert 0.88 <= hits / 200 <= 0.99


def test_cost_is_tokens_times_price():
    assert cost.episode_cost({"sampled_tokens": 40.0, "observed_tokens": 460.0}, 2.0) == pytest.approx(1e-3)
    assert cost.episode_cost({"turns": 2.0}, 2.0) is None
