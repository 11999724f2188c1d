"""Weights one iteration old: whatever is faster, killed or preempted, the same weights sample the same episodes."""

import asyncio
import os
import signal
import time

import pytest

from configs import base, miniature
from stepdr_jax import configuration, files
from stepdr_jax.errors import UserError
from stepdr_jax.rl import learner, loop, recordings, rollout_metrics
from stepdr_jax.runtime import checkpoint, distributed
from tests.rl import toy

STALE = dict(staleness=1, tis_cap=2.0)


def table(config):
    found = files.read_jsonl(loop.ppo_layout(config).directory / "metrics.jsonl")
    return [{name: value for name, value in row.items() if name not in rollout_metrics.TIMINGS} for row in found]


def recorded(config, iteration):
    return recordings.recording_paths(loop.ppo_layout(config).directory / "iterations", iteration)[1]


def wait_for(reached) -> None:
    deadline = time.monotonic() + 60
    while not reached():
        assert time.monotonic() < deadline
        time.sleep(0.01)


@pytest.fixture(scope="module")
def learner_waits(tmp_path_factory):
    """A run whose learner never ends before the next iteration is sampled."""
    config = toy.config(tmp_path_factory.mktemp("run"), **STALE).unlock()
    config.log.tensorboard = True
    config.lock()
    update = learner.update

    def slow(state, batch, learning, iteration, *others):
        wait_for(lambda: iteration == 3 or recorded(config, iteration + 1).exists())
        return update(state, batch, learning, iteration, *others)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(learner, "update", slow)
        done = loop.train_ppo(config, toy.inputs(config))
    return config, done


def test_the_sampler_is_one_version_behind_and_every_token_says_so(learner_waits):
    config, _ = learner_waits
    tasks = {task.id: task for task in toy.inputs(config).tasks}
    for iteration, version in enumerate((0, 0, 1, 2)):
        logs = [e.log.arrays() for e in recordings.load_rollouts(recorded(config, 0).parent, iteration, tasks)]
        assert {v for log in logs for v in log["version"][log["sampled"]].tolist()} == {version}
    assert [(row["staleness/mean"], row["staleness/max"]) for row in table(config)] == [(0, 0), (1, 1), (1, 1), (1, 1)]
    # Iteration 1 is the first that trains the actor: from 2 on the learner has newer weights than sampled.
    gaps = [row["logprob_gap/max"] for row in table(config)]
    assert max(gaps[:2]) < 1e-3 < min(gaps[2:])


def test_rows_are_in_the_event_file_too(learner_waits):
    [events] = (loop.ppo_layout(learner_waits[0]).directory / "tensorboard").iterdir()
    content = events.read_bytes()
    assert content.count(b"logprob_gap/max") == 4 and b"staleness/mean" in content


def test_whoever_is_faster_the_results_are_the_same(learner_waits, monkeypatch, tmp_path):
    before, done = learner_waits
    config, learnt, update = toy.config(tmp_path, **STALE), [], learner.update

    def counted(*arguments):
        found = update(*arguments)
        learnt.append(arguments[3])
        return found

    async def waits_for_the_learner(*arguments, seed, **keywords):
        calls.append(seed)
        iteration = (len(calls) - 1) // 8
        while len(learnt) < iteration:
            await asyncio.sleep(0.01)
        return await toy.run_episode(*arguments, seed=seed, **keywords)

    calls = []
    monkeypatch.setattr(learner, "update", counted)
    assert (
        loop.train_ppo(config, toy.inputs(config, run_episode=waits_for_the_learner))["params_sha256"]
        == (done["params_sha256"])
    )
    assert table(config) == table(before)


@pytest.mark.parametrize("kept", ["recordings", "none"])
def test_killed_in_both_at_once_it_goes_on_with_the_same_weights(learner_waits, tmp_path, kept):
    before, done = learner_waits
    config, calls = toy.config(tmp_path, **STALE), []

    async def dies_in_iteration_3(*arguments, **keywords):
        calls.append(0)
        if len(calls) == 3 * 8 + 5:
            raise KeyboardInterrupt
        return await toy.run_episode(*arguments, **keywords)

    with pytest.raises(KeyboardInterrupt):
        loop.train_ppo(config, toy.inputs(config, run_episode=dies_in_iteration_3))
    assert checkpoint.saved_steps(loop.ppo_layout(config).directory / "checkpoints") == [2]
    if kept == "none":  # iteration 2 was sampled with weights that nobody has any more, but for the checkpoint
        for iteration in range(4):
            recorded(config, iteration).unlink(missing_ok=True)
    assert loop.train_ppo(config, toy.inputs(config))["params_sha256"] == done["params_sha256"]
    assert table(config) == table(before)


@pytest.mark.parametrize("staleness", [0, 1])
def test_told_to_end_it_saves_where_it_is_and_loses_no_more_than_the_iteration_in_flight(
    learner_waits, tmp_path, staleness
):
    before, done = learner_waits
    config = toy.config(tmp_path, checkpoint_every=100, **(STALE if staleness else {}))
    calls = []

    async def told_in_iteration_2(*arguments, **keywords):
        calls.append(0)
        if len(calls) == 2 * 8 + 3:
            os.kill(os.getpid(), signal.SIGTERM)
        if len(calls) > 2 * 8:
            await asyncio.sleep(3600)  # an episode that nobody can wait for
        return await toy.run_episode(*arguments, **keywords)

    with pytest.raises(distributed.Preempted) as ended:
        loop.train_ppo(config, toy.inputs(config, run_episode=told_in_iteration_2))
    assert ended.value.code == distributed.RESTART
    home = loop.ppo_layout(config).directory
    assert checkpoint.saved_steps(home / "checkpoints") == [2] and len(table(config)) == 2
    assert [row["event"] for row in files.read_jsonl(home / "events.jsonl")] == ["start", "preempted"]
    again = loop.train_ppo(config, toy.inputs(config))
    assert len(table(config)) == 4
    if staleness:
        assert again["params_sha256"] == done["params_sha256"] and table(config) == table(before)


def test_stale_episodes_need_weighing():
    config = miniature.get_config().unlock()
    config.ppo.staleness = 1
    with pytest.raises(UserError, match="ppo.tis_cap: expected a number above 0 where ppo.staleness is 1"):
        configuration.check_values(config, base.FIELDS)
    config.ppo.tis_cap = 2.0
    configuration.check_values(config, base.FIELDS)
    config.ppo.staleness = 2
    with pytest.raises(UserError, match="ppo.staleness: expected one of 0, 1, got 2"):
        configuration.check_values(config, base.FIELDS)
