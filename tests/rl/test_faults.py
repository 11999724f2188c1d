"""Broken tools, judges and engines: a run with them learns from its unmasked episodes alone."""

import dataclasses

import jax
import numpy as np
import pytest

from stepdr_jax import files
from stepdr_jax.engine import scheduler
from stepdr_jax.errors import UserError
from stepdr_jax.rl import loop, recordings
from tests.rl import faulty, toy

# ------------------------------------------------------------------------------------------- the loop, in the toy world

ITERATIONS = 6
# Neither set of minibatches divides the episodes that survive.
SPLIT = dict(
    iterations=ITERATIONS, actor_minibatches=2, critic_minibatches=3, critic_warmup_iterations=0, max_masked_share=0.9
)


class AwayJudge(toy.LetterJudge):
    """Raises on a tenth of the reports."""

    async def judge(self, task, rubric_set, trajectory):
        if faulty.struck(0.1, trajectory.id):
            raise RuntimeError("injected: the judge is away")
        return await super().judge(task, rubric_set, trajectory)


def broken_for_good(seed, attempt):
    return faulty.struck(0.15, seed)


def episodes_of(config, parts, iteration):
    tasks = {task.id: task for task in parts.tasks}
    return recordings.load_rollouts(loop.ppo_layout(config).directory / "iterations", iteration, tasks)


@pytest.fixture(scope="module")
def struck_run(tmp_path_factory):
    config = toy.config(tmp_path_factory.mktemp("struck"), **SPLIT)
    parts = toy.inputs(config, tools=toy.ToyTools(broken=broken_for_good), judge=AwayJudge())
    return config, parts, loop.train_ppo(config, parts)


def test_a_run_with_faults_ends_with_the_weights_that_its_surviving_episodes_make_alone(struck_run, tmp_path):
    """Bit for bit: a masked episode is in no loss, no mean, no whitening, no minibatch."""
    config, parts, done = struck_run
    alone = toy.config(tmp_path, **SPLIT)
    lost = 0
    for iteration in range(ITERATIONS):
        all_of_them = episodes_of(config, parts, iteration)
        kept = [episode for episode in all_of_them if episode.masked is None]
        lost += len(all_of_them) - len(kept)
        kept = [dataclasses.replace(episode, index=index) for index, episode in enumerate(kept)]
        recordings.save_rollouts(loop.ppo_layout(alone).directory / "iterations", iteration, kept, "survivors")
    assert lost >= 6
    assert loop.replay_ppo(alone, toy.inputs(alone))["params_sha256"] == done["params_sha256"]

    def rows(home):
        names = ("reward", "value_loss", "policy_loss", "entropy", "actor_grad_norm", "critic_grad_norm", "turns")
        return [[row[name] for name in names] for row in files.read_jsonl(home / "metrics.jsonl")]

    assert rows(loop.replay_layout(alone).directory) == rows(loop.ppo_layout(config).directory)


def test_every_cause_of_a_masked_episode_is_counted(struck_run):
    config, parts, _ = struck_run
    totals = {"infra_failed": 0, "judge_failed": 0}
    for iteration, row in enumerate(files.read_jsonl(loop.ppo_layout(config).directory / "metrics.jsonl")):
        masked = [episode for episode in episodes_of(config, parts, iteration) if episode.masked]
        for cause in totals:
            counted = sum(episode.masked == cause for episode in masked)
            assert row[f"masked/{cause}"] == counted
            totals[cause] += counted
        assert row["masked_share"] == len(masked) / row["episodes"]
        assert all(episode.scored.reward is None and episode.trajectory.metadata["cause"] for episode in masked)
    assert min(totals.values()) > 0


def test_faults_take_episodes_away_and_change_none_of_the_others(struck_run, tmp_path):
    """Before anything was learned from a thinner batch, what survives is what a run without faults has."""
    config, parts, _ = struck_run
    healthy = toy.config(tmp_path, **SPLIT | {"iterations": 1})
    loop.train_ppo(healthy, toy.inputs(healthy))
    for with_faults, without in zip(episodes_of(config, parts, 0), episodes_of(healthy, parts, 0), strict=True):
        assert without.masked is None
        if with_faults.masked is None:
            assert with_faults.scored == without.scored
            for name, array in without.log.arrays().items():
                np.testing.assert_array_equal(with_faults.log.arrays()[name], array)


def test_a_judge_that_comes_back_is_asked_again_without_sampling_again(struck_run, tmp_path):
    """With more than the limit masked, only the verdicts are made again."""
    config = toy.config(tmp_path, **SPLIT | {"iterations": 1, "max_masked_share": 0.3})
    asked, ran = [], []

    class Returning(toy.LetterJudge):
        async def judge(self, task, rubric_set, trajectory):
            asked.append(trajectory.id)
            if len(asked) <= 8:
                raise ConnectionError("refused")
            return await super().judge(task, rubric_set, trajectory)

    async def run_episode(*arguments, **keywords):
        ran.append(1)
        return await toy.run_episode(*arguments, **keywords)

    loop.train_ppo(config, toy.inputs(config, judge=Returning(), run_episode=run_episode))
    assert len(ran) == 8 and len(asked) == 16
    healthy = toy.config(tmp_path / "healthy", **SPLIT | {"iterations": 1})
    loop.train_ppo(healthy, toy.inputs(healthy))
    rows = [files.read_jsonl(loop.ppo_layout(one).directory / "iterations" / "0000.jsonl") for one in (config, healthy)]
    for row in (*rows[0], *rows[1]):
        row["trajectory"]["stats"].pop("wall_seconds", None)
    assert rows[0] == rows[1]


# --------------------------------------------------------------------------------------------- the engine breaks inside


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    config = toy.config(tmp_path_factory.mktemp("whole"), iterations=2)
    return loop.train_ppo(config, toy.inputs(config))


def breaking_steps(monkeypatch, when):
    """Makes the engine's programs fail where `when(number of the step)`, as they do when donated pages are gone."""
    step, count = scheduler.Pool.step, [0]

    def breaks(pool, weights, version):
        count[0] += 1
        if when(count[0]):
            jax.tree.map(lambda pages: pages.delete(), pool.kv_pages)
        return step(pool, weights, version)

    monkeypatch.setattr(scheduler.Pool, "step", breaks)
    return count


def test_an_engine_whose_programs_fail_samples_the_same_again_from_new_pages(whole, tmp_path, monkeypatch):
    count = breaking_steps(monkeypatch, lambda number: number in (2, 7))
    config = toy.config(tmp_path, iterations=2)
    causes = []

    async def run_episode(*arguments, **keywords):
        done = await toy.run_episode(*arguments, **keywords)
        causes.append(done.trajectory.metadata.get("cause"))
        return done

    done = loop.train_ppo(config, toy.inputs(config, run_episode=run_episode))
    broken = [cause for cause in causes if cause]
    assert count[0] > 7 and len(causes) == 16 + len(broken) and broken
    assert all("EngineError" in cause and "deleted" in cause for cause in broken)
    assert done["params_sha256"] == whole["params_sha256"]


def test_an_engine_that_stays_broken_stops_the_run_in_one_line_and_it_continues_later(whole, tmp_path, monkeypatch):
    config = toy.config(tmp_path, iterations=2, checkpoint_every=1)
    with monkeypatch.context() as patched:
        seen = []
        breaking_steps(patched, lambda number: bool(seen) or (number > 6 and not seen.append(number)))
        with pytest.raises(UserError) as error:
            loop.train_ppo(config, toy.inputs(config))
    message = str(error.value)
    assert "\n" not in message and "EngineError" in message and "same command" in message
    assert loop.train_ppo(config, toy.inputs(config))["params_sha256"] == whole["params_sha256"]
