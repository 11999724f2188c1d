"""Limits of an iteration: each stops the run in a line that names it, or leaves the actor unchanged."""

import dataclasses
import math

import jax
import numpy as np
import pytest

from stepdr_jax import files
from stepdr_jax.errors import UserError
from stepdr_jax.rl import guards, loop, rollout_metrics
from stepdr_jax.runtime import checkpoint
from tests.rl import toy

NEVER = guards.Guard()


def config_with(run_dir, **limits):
    return toy.config(run_dir, guard=toy.NO_GUARD | limits)


def table(config):
    found = files.read_jsonl(loop.ppo_layout(config).directory / "metrics.jsonl")
    return [{name: value for name, value in row.items() if name not in rollout_metrics.TIMINGS} for row in found]


def test_each_limit_is_named_with_its_value_and_what_is_absent_breaks_none():
    every = guards.Guard(max_kl=0.5, min_entropy=0.02, max_repetition=0.7)
    assert every.problem({"entropy": 0.02, "repetition": 0.7, "kl_after": 0.5}) is None
    assert every.problem({"entropy": 0.3, "repetition": None}) is None
    assert every.problem({"entropy": 0.01}) == "entropy 0.01 is below ppo.guard.min_entropy = 0.02"
    assert every.problem({"repetition": 0.75}) == "repetition 0.75 is above ppo.guard.max_repetition = 0.7"
    assert every.problem({"kl_after": 2.0}) == "kl_after 2 is above ppo.guard.max_kl = 0.5"
    assert "nan" in every.problem({"entropy": math.nan}) and "inf" in every.problem({"kl_after": math.inf})
    assert NEVER.problem({"entropy": 0.0, "repetition": 1.0, "kl_after": math.nan}) is None


@pytest.fixture(scope="module")
def unguarded(tmp_path_factory):
    config = config_with(tmp_path_factory.mktemp("run"))
    return config, loop.train_ppo(config, toy.inputs(config))


@pytest.mark.parametrize("metric, field", [("entropy", "min_entropy"), ("kl_after", "max_kl")])
def test_a_broken_limit_stops_the_run_and_a_wider_one_continues_it_to_the_same_bits(unguarded, tmp_path, metric, field):
    _, done = unguarded
    limits = {"min_entropy": 100.0, "max_kl": 1e-12}
    config = config_with(tmp_path, **{field: limits[field]})
    # Iteration 0 trains only the critic: no limit holds there.
    with pytest.raises(UserError, match=rf"iteration 1: {metric} .*ppo.guard.{field} = .*--config.ppo.guard.{field}="):
        loop.train_ppo(config, toy.inputs(config))
    assert len(table(config)) == 1
    [event] = [e for e in files.read_jsonl(loop.ppo_layout(config).directory / "events.jsonl") if e["event"] == "guard"]
    assert event["step"] == 2 and metric in event["reason"]
    wider = config_with(tmp_path)
    assert loop.train_ppo(wider, toy.inputs(wider))["params_sha256"] == done["params_sha256"]


@pytest.mark.parametrize("field, limit", [("min_entropy", 100.0), ("max_kl", 1e-12)])
def test_a_skipped_update_leaves_the_actor_as_it_was_while_the_critic_learns(unguarded, tmp_path, field, limit):
    whole, _ = unguarded
    config = config_with(tmp_path, action="skip", **{field: limit})
    loop.train_ppo(config, toy.inputs(config))
    assert [row["guarded_updates"] for row in table(config)] == [0, 1, 1, 1]
    tree = checkpoint.restore_checkpoint(loop.ppo_layout(config).directory / "checkpoints", _abstract(config)).tree
    for name, leaf in jax.tree_util.tree_leaves_with_path(toy.inputs(config).read_actor()):
        np.testing.assert_array_equal(leaf, _at(tree["params"], name))
    assert all(int(count) == 0 for count in _counts(tree["params_moments"]))
    assert all(int(count) == 8 for count in _counts(tree["critic_moments"]))
    assert table(config)[1]["value_loss"] == table(whole)[1]["value_loss"]


def test_a_guard_that_changes_nothing_changes_nothing(unguarded, tmp_path):
    whole, done = unguarded
    config = config_with(tmp_path, action="skip", max_kl=1e3, min_entropy=1e-9, max_repetition=1.0)
    assert loop.train_ppo(config, toy.inputs(config))["params_sha256"] == done["params_sha256"]
    found = table(config)
    measured = [row.pop("kl_after", None) for row in found]
    assert found == table(whole)
    assert measured[0] is None and all(0 < kl < 1 for kl in measured[1:])


def test_episodes_that_repeat_themselves_are_counted_and_stop_the_run(tmp_path):
    config = config_with(tmp_path, max_repetition=0.4)

    async def says_it_again(task, *arguments, **keywords):
        done = await toy.run_episode(task, *arguments, **keywords)
        if len(task.query) > 2:  # texts of 20 equal words in most of the tasks
            message = done.trajectory.messages[0].model_copy(update={"content": "again " * 20})
            trajectory = done.trajectory.model_copy(update={"messages": [message]})
            done = dataclasses.replace(done, trajectory=trajectory)
        return done

    with pytest.raises(UserError, match=r"repetition (0\.\d+|1) is above ppo.guard.max_repetition = 0.4.*iterations/"):
        loop.train_ppo(config, toy.inputs(config, run_episode=says_it_again))
    assert 0 < table(config)[0]["repetition"] <= 1


def _abstract(config):
    from stepdr_jax.rl import learner, placement

    parts = toy.inputs(config)
    who = placement.DevicePlacement.from_config(config)
    return placement.abstract_state(parts.model, learner.PPOConfig.from_config(config, parts.model, who.mesh), who.mesh)


def _at(tree, path):
    for key in path:
        tree = tree[key.key]
    return tree


def _counts(moments):
    return [
        leaf
        for path, leaf in jax.tree_util.tree_leaves_with_path(moments)
        if jax.tree_util.keystr(path).endswith("count")
    ]
