"""The loop: it learns, it continues after a kill with the same bits, and failures never become a reward."""

import dataclasses
import shutil

import pytest

from stepdr_jax import files
from stepdr_jax.errors import UserError
from stepdr_jax.rl import loop, recordings, rollout_metrics, sampling
from stepdr_jax.runtime import provenance
from stepdr_jax.training import state
from tests.rl import toy


def table(config):
    found = files.read_jsonl(loop.ppo_layout(config).directory / "metrics.jsonl")
    return [{name: value for name, value in row.items() if name not in rollout_metrics.TIMINGS} for row in found]


def episodes(config, iteration):
    return files.read_jsonl(loop.ppo_layout(config).directory / "iterations" / f"{iteration:04d}.jsonl")


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    config = toy.config(tmp_path_factory.mktemp("run"))
    done = loop.train_ppo(config, toy.inputs(config))
    return config, done


class Killed(BaseException):
    """What `kill -9` leaves on disk: nothing after this point is written."""


def test_a_killed_run_continues_to_the_same_bits(uninterrupted, tmp_path):
    before, done = uninterrupted
    config = toy.config(tmp_path)
    calls = 0

    async def dies_in_iteration_3(*arguments, **keywords):
        nonlocal calls
        calls += 1
        if calls == 3 * 8 + 5:
            raise Killed
        return await toy.run_episode(*arguments, **keywords)

    with pytest.raises(Killed):
        loop.train_ppo(config, toy.inputs(config, run_episode=dies_in_iteration_3))
    assert [row["iteration"] for row in table(config)] == [0, 1, 2]  # 2 is past the checkpoint and will be made again
    calls, sampled = -10_000, -10_000
    again = loop.train_ppo(config, toy.inputs(config, run_episode=dies_in_iteration_3))
    assert calls - sampled == 8  # iteration 3; 2 was recorded
    assert again["params_sha256"] == done["params_sha256"]
    assert table(config) == table(before)
    assert [episodes(config, i) for i in range(4)] == [episodes(before, i) for i in range(4)]


def test_recorded_episodes_make_the_same_weights_again_and_others_with_other_settings(uninterrupted):
    config, done = uninterrupted
    assert loop.replay_ppo(config, toy.inputs(config))["params_sha256"] == done["params_sha256"]
    kept = files.read_jsonl(loop.replay_layout(config).directory / "metrics.jsonl")
    assert [row["reward"] for row in kept] == [row["reward"] for row in table(config)]
    shutil.rmtree(loop.replay_layout(config).directory)
    other = config.copy_and_resolve_references()
    other.ppo.gae_lambda = 0.5
    assert loop.replay_ppo(other, toy.inputs(other))["params_sha256"] != done["params_sha256"]
    assert loop.finished(config) == done


def test_recordings_that_cannot_be_used_are_named(uninterrupted, tmp_path):
    config, _ = uninterrupted
    directory = loop.ppo_layout(config).directory / "iterations"
    tasks = {task.id: task for task in toy.inputs(config).tasks}
    assert recordings.load_rollouts(directory, 99, tasks) is None
    assert recordings.load_rollouts(directory, 0, tasks, "of other settings") is None
    with pytest.raises(UserError, match="'t[0-9]' is not known"):
        recordings.load_rollouts(directory, 0, {})
    for path in recordings.recording_paths(directory, 0):
        shutil.copy(path, tmp_path)
    rows_path, logs_path = recordings.recording_paths(tmp_path, 0)
    whole = logs_path.read_bytes()
    logs_path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(UserError, match="is damaged.*delete it"):
        recordings.load_rollouts(tmp_path, 0, tasks)
    logs_path.write_bytes(whole)
    rows_path.write_text("")
    with pytest.raises(UserError, match="0 episodes, 8 token logs"):
        recordings.load_rollouts(tmp_path, 0, tasks)
    with pytest.raises(UserError, match="no recorded iterations"):
        sampling.ReplayedRollouts(toy.inputs(config), tmp_path / "nowhere")


def test_what_a_run_leaves(uninterrupted):
    config, done = uninterrupted
    assert loop.finished(config) == done and done["iterations"] == 4
    assert loop.run_ppo(config, start_host=None) == done  # finished: nothing is loaded, no tool host is started
    row = files.read_jsonl(loop.ppo_layout(config).directory / "metrics.jsonl")[-1]
    assert row["masked_share"] == 0 and row["masked/infra_failed"] == 0 and row["finish/answered"] == 1
    assert row["logprob_gap/max"] < 1e-3
    assert row["sampler_evictions"] == 0 and 0 < row["sampler_pages_peak"] <= 1
    assert row["kl"] == pytest.approx(0, abs=1e-6)
    saved = episodes(config, 3)
    assert [one["index"] for one in saved] == list(range(8))
    detailed = [one for one in saved if "tokens" in one]
    assert len(detailed) == recordings.DETAILED_EPISODES
    for one in detailed:
        assert len({len(one[name]) for name in ("tokens", "sampled", "logprobs", "values", "advantages")}) == 1
        assert {v for v, s in zip(one["version"], one["sampled"], strict=True) if s} == {3}
    params = state.load_params(config, config.seed, "ppo")
    assert params["embedding"].shape == (toy.TOKENIZER.vocab_size, 32)


def test_more_iterations_continue_a_finished_run_and_other_settings_are_refused(uninterrupted):
    config, _ = uninterrupted
    more = toy.config(config.run_dir, iterations=5)
    assert loop.finished(more) is None
    with pytest.raises(UserError, match="ppo.clip = 0.2, this config has 0.3"):
        loop.train_ppo(toy.config(config.run_dir, iterations=5, clip=0.3), toy.inputs(config))


def test_an_episode_broken_once_is_sampled_again_and_changes_nothing(uninterrupted, tmp_path):
    before, done = uninterrupted
    config = toy.config(tmp_path)
    tools = toy.ToyTools(broken=lambda seed, attempt: attempt == 1 and seed % 3 == 0)
    assert loop.train_ppo(config, toy.inputs(config, tools=tools))["params_sha256"] == done["params_sha256"]
    assert max(tools.attempts.values()) == 2


def test_episodes_that_stay_broken_are_masked_and_counted(tmp_path):
    config = toy.config(tmp_path, iterations=1, max_masked_share=0.6)
    loop.train_ppo(config, toy.inputs(config, tools=toy.ToyTools(broken=lambda seed, attempt: seed % 3 == 0)))
    saved = episodes(config, 0)
    masked = [one for one in saved if one["masked"]]
    assert 0 < len(masked) < 8
    assert all(one["reward"] is None and one["masked"] == "infra_failed" for one in masked)
    row = table(config)[0]
    kept = [one["reward"] for one in saved if not one["masked"]]
    assert row["masked/infra_failed"] == len(masked)
    assert row["reward"] == pytest.approx(sum(kept) / len(kept))


def test_too_many_masked_episodes_stop_the_run_with_one_sentence_and_a_whole_state(uninterrupted, tmp_path):
    _, done = uninterrupted
    config = toy.config(tmp_path)
    seeds = set()

    def dead_from_iteration_2(seed, attempt):
        seeds.add(seed)
        return len(seeds) > 16

    with pytest.raises(UserError, match=r"8 of 8 episodes of iteration 2 are masked.*toy host is down.*same command"):
        loop.train_ppo(config, toy.inputs(config, tools=toy.ToyTools(broken=dead_from_iteration_2)))
    assert loop.train_ppo(config, toy.inputs(config))["params_sha256"] == done["params_sha256"]


def test_too_many_prompts_are_named(tmp_path):
    config = toy.config(tmp_path, prompts_per_iteration=9)
    with pytest.raises(UserError, match="ppo.prompts_per_iteration: expected at most the 8"):
        loop.train_ppo(config, toy.inputs(config))


def test_reward_rises_on_a_toy_task(tmp_path):
    """From about one liked letter in 20 tokens to most of them."""
    config = toy.config(
        tmp_path,
        iterations=60,
        prompts_per_iteration=8,
        samples_per_prompt=4,
        actor_learning_rate=1e-2,
        critic_learning_rate=1e-2,
        microbatch_sequences=8,
        checkpoint_every=60,
    )
    loop.train_ppo(config, toy.inputs(config))
    rewards = [row["reward"] for row in table(config)]
    assert sum(rewards[:3]) / 3 < 0.25
    assert sum(rewards[-3:]) / 3 > 0.6


def test_every_setting_decides_or_is_free(tmp_path):
    """A new field of the config is compared between runs unless it is declared free."""
    config = toy.config(tmp_path)
    named = provenance.ppo_settings(config, toy.inputs(config).model, {}, "")
    assert {name.removeprefix("ppo.") for name in named if name.startswith("ppo.")} | set(
        provenance.PPO_MAY_CHANGE
    ) == set(config.ppo)
    assert not dataclasses.is_dataclass(named)
