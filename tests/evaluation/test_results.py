"""Metrics of evaluated rows."""

import math

from stepdr_jax.evaluation import results
from stepdr_jax.evaluation.results import Result
from stepdr_jax.records import Trajectory, Verdict


def row(task="a", seed=0, **fields):
    trajectory = Trajectory(id="t", task_id=task, policy="p", messages=[], finish="answered")
    base = dict(index=0, task_index=0, sample=0, stage="sft", seed=seed, sampling_seed=0, fingerprint="", task_id=task)
    base |= dict(kind="fact", lang="en", query="", trajectory=trajectory, verdict=Verdict(reward=None, judgments=[]))
    return Result(**(base | dict(finish="answered") | fields))


def test_recovered_is_a_share_of_errors_not_of_episodes():
    rows = [row("a", errors=3, recovered=3), row("b", errors=1, recovered=0), row("c")]
    assert results.measure(rows, results.BY_NAME["recovered"]).mean == 0.75


def test_recovered_without_errors_is_unknown():
    assert math.isnan(results.measure([row("a"), row("b")], results.BY_NAME["recovered"]).mean)


def test_open_tasks_say_nothing_about_correctness():
    rows = [row("a", correct=True), row("b", correct=None), row("c", correct=False)]
    interval = results.measure(rows, results.BY_NAME["correct"])
    assert interval.mean == 0.5 and interval.clusters == 2


def test_missing_rows_count_in_no_metric():
    rows = [row("a", reward=1.0), row("b", missing="infra_failed: x", finish="infra_failed")]
    summary = results.summary(rows)
    assert summary["answered"].mean == 1.0 and summary["reward"].n == 1


def test_breakdown_by_kind_and_language():
    rows = [row("a", reward=1.0, lang="zh"), row("b", reward=0.0), row("c", reward=0.5)]
    assert results.breakdown(rows, "lang")["en"]["reward"].mean == 0.25
    assert list(results.breakdown(rows, "lang")) == ["en", "zh"]
