"""Rollouts: episodes with their rewards, run concurrently, returned in order, and laid out as arrays.

Shape suffixes: E episodes, T tokens of an episode.
"""

import dataclasses
from collections.abc import Sequence

import numpy as np

from stepdr_jax.agent import react, runner
from stepdr_jax.agent.budget import Limits
from stepdr_jax.agent.policy import Policy
from stepdr_jax.judge.judges import Judge
from stepdr_jax.judge.scored import Scored
from stepdr_jax.records import Finish, RubricSet, Task, Trajectory
from stepdr_jax.rl import reward
from stepdr_jax.tokens.log import TokenLog


@dataclasses.dataclass(frozen=True)
class Rollout:
    """One finished and scored episode. `log` is None when it failed before a token was sampled; it is then masked."""

    index: int
    task: Task
    seed: int
    trajectory: Trajectory
    log: TokenLog | None
    scored: Scored

    @property
    def masked(self) -> str | None:
        """Why the episode is masked, or None. An episode without a sampled token has nothing to train on."""
        if self.scored.masked is None and (self.log is None or self.log.sampled_count == 0):
            return "empty"
        return self.scored.masked


@dataclasses.dataclass(frozen=True)
class EpisodeArrays:
    """One episode a row, padded at the end to T. A masked episode is a row of zeros.

    tokens_ET int32; lengths_E int32; action_mask_ET bool, true at sampled tokens of unmasked episodes; logprobs_ET
    float32 of the sampler (0 where observed); rewards_E float32 (0 where masked); kept_E bool, true for unmasked
    episodes.
    """

    tokens_ET: np.ndarray
    lengths_E: np.ndarray
    action_mask_ET: np.ndarray
    logprobs_ET: np.ndarray
    rewards_E: np.ndarray
    kept_E: np.ndarray


def rollout_arrays(episodes: Sequence[Rollout], max_len: int) -> EpisodeArrays:
    """Lays out token logs as arrays with T = max_len. Raises ValueError for a longer log.

    Tokens after the last sampled one (an observation that ended the episode) are left out: nothing depends on them.
    """
    E = len(episodes)
    tokens_ET = np.zeros((E, max_len), np.int32)
    action_mask_ET = np.zeros((E, max_len), bool)
    logprobs_ET = np.zeros((E, max_len), np.float32)
    lengths_E, rewards_E, kept_E = np.zeros(E, np.int32), np.zeros(E, np.float32), np.zeros(E, bool)
    for row, episode in enumerate(episodes):
        if episode.masked is not None or episode.log is None:
            continue
        log = episode.log.arrays()
        length = int(np.flatnonzero(log["sampled"])[-1]) + 1
        if length > max_len:
            raise ValueError(f"episode {episode.trajectory.id} has {length} tokens, expected at most {max_len}")
        tokens_ET[row, :length] = log["tokens"][:length]
        action_mask_ET[row, :length] = log["sampled"][:length]
        logprobs_ET[row, :length] = log["logprobs"][:length]
        lengths_E[row], rewards_E[row], kept_E[row] = length, episode.scored.reward, True
    return EpisodeArrays(tokens_ET, lengths_E, action_mask_ET, logprobs_ET, rewards_E, kept_E)


async def collect_rollouts(
    tasks: Sequence[Task],
    seeds: Sequence[int],
    policy: Policy,
    tools: runner.ToolsProvider,
    judge: Judge,
    rubric_sets: dict[str, RubricSet],
    limits: Limits,
    *,
    prompt: str = "compact",
    as_of: str = "",
    concurrency: int = 64,
    attempts: int = 2,
    truncated: str = "worst",
    run_episode: runner.EpisodeLoop = react.run_episode,
    before: Sequence[Rollout] = (),
) -> list[Rollout]:
    """Runs one episode per (task, seed) and returns the rollouts in that order.

    Raises what `tools` raises, after ending every other episode; a failure inside an episode masks that episode.

    Args:
        tasks, seeds: of equal length; an episode's sampled tokens are a function of its task, its seed and the weights.
        policy, tools, limits, prompt, as_of, attempts, run_episode: of `runner.run_with_retries`.
        judge: see `reward.score`.
        rubric_sets: by task id.
        concurrency: episodes that sample at once; above the sampler's max_num_seqs, sessions evict each other's K/V.
        truncated: rule of `reward.truncated_reward`.
        before: earlier rollouts of the same tasks and seeds; an episode that only lacks its verdict is not run again.
    """

    async def sample(index: int) -> tuple[Trajectory, TokenLog | None]:
        if before and before[index].scored.masked == Finish.JUDGE_FAILED:
            return before[index].trajectory, before[index].log
        episode, _ = await runner.run_with_retries(
            tasks[index],
            policy,
            tools,
            limits,
            prompt=prompt,
            as_of=as_of,
            seed=seeds[index],
            attempts=attempts,
            run_episode=run_episode,
        )
        return episode.trajectory, episode.log

    async def score(index: int, sampled: tuple[Trajectory, TokenLog | None]) -> Rollout:
        task, (trajectory, log) = tasks[index], sampled
        scored = await reward.score(judge, task, rubric_sets[task.id], trajectory, truncated)
        return Rollout(index, task, seeds[index], trajectory, log, scored)

    jobs = {index: index for index in range(len(tasks))}
    return list((await runner.run_all(jobs, sample, score, concurrency=concurrency)).values())


def choose_tasks(count: int, prompts: int, *, seed: int, iteration: int) -> list[int]:
    """Indices of an iteration's tasks: a function of (seed, iteration), so a resumed run needs no saved position.

    Each pass over the `count` tasks has its own order; an iteration may span two passes.
    """
    start = iteration * prompts
    chosen = []
    orders: dict[int, np.ndarray] = {}
    for position in range(start, start + prompts):
        turn, place = divmod(position, count)
        if turn not in orders:
            orders[turn] = np.random.default_rng([seed, turn]).permutation(count)
        chosen.append(int(orders[turn][place]))
    return chosen


def episode_seed(seed: int, iteration: int, index: int) -> int:
    """The seed of an episode's sampling and tools, below 2**31; different for all (seed, iteration, index)."""
    return int(np.random.SeedSequence([seed, iteration, index]).generate_state(1)[0]) >> 1
