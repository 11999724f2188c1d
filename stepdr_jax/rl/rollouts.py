"""Episodes for training: run concurrently, returned in order, and laid out as arrays.

Which episode gets which reward depends on its index and seed only, never on the order in which episodes end.
"""

import asyncio
import dataclasses
from collections.abc import Awaitable, Callable, Sequence

import numpy as np

from stepdr_jax.agent import react
from stepdr_jax.agent.budget import Limits
from stepdr_jax.agent.policy import Policy
from stepdr_jax.judge.judges import Judge
from stepdr_jax.records import Finish, RubricSet, Task, Trajectory
from stepdr_jax.rl import reward
from stepdr_jax.tokens.log import TokenLog
from tools_env.client import ToolsClient


@dataclasses.dataclass(frozen=True)
class Episode:
    """One finished episode of a batch. `log` is None when it broke before a token was sampled (then it is masked)."""

    index: int
    task: Task
    seed: int
    trajectory: Trajectory
    log: TokenLog | None
    scored: reward.Scored

    @property
    def masked(self) -> str | None:
        """Why the episode is masked, or None. One that sampled nothing has nothing to train on."""
        if self.scored.masked is None and (self.log is None or self.log.sampled_count == 0):
            return "empty"
        return self.scored.masked


@dataclasses.dataclass(frozen=True)
class EpisodeArrays:
    """Episodes row by row, padded behind to T. Masked episodes are rows like any other, with weight 0.

    tokens_ET int32; lengths_E int32; action_mask_ET bool, true at sampled tokens of unmasked episodes; logprobs_ET float32
    of the sampler (0 where given); rewards_E float32 (0 where masked); kept_E bool, true for unmasked episodes.
    """

    tokens_ET: np.ndarray
    lengths_E: np.ndarray
    action_mask_ET: np.ndarray
    logprobs_ET: np.ndarray
    rewards_E: np.ndarray
    kept_E: np.ndarray


def arrays(episodes: Sequence[Episode], max_len: int) -> EpisodeArrays:
    """Lays out token logs as arrays with T = max_len. Raises ValueError for a log longer than that.

    What follows the last sampled token (an observation that ended the episode) is left out: nothing depends on it.
    """
    E = len(episodes)
    tokens_ET = np.zeros((E, max_len), np.int32)
    action_mask_ET = np.zeros((E, max_len), bool)
    logprobs_ET = np.zeros((E, max_len), np.float32)
    lengths_E, rewards_E, kept_E = np.zeros(E, np.int32), np.zeros(E, np.float32), np.zeros(E, bool)
    for row, episode in enumerate(episodes):
        if episode.masked is not None:
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


async def collect(
    tasks: Sequence[Task],
    seeds: Sequence[int],
    policy: Policy,
    tools: Callable[[], Awaitable[ToolsClient]],
    judge: Judge,
    rubric_sets: dict[str, RubricSet],
    limits: Limits,
    *,
    prompt: str = "compact",
    as_of: str = "",
    concurrency: int = 64,
    attempts: int = 2,
    unfinished: str = "worst",
    run_episode=react.run_episode,
    before: Sequence[Episode] = (),
) -> list[Episode]:
    """Runs one episode per (task, seed) and returns them in that order.

    Raises what `tools` raises, after ending every other episode; what breaks inside an episode masks that episode.

    Args:
        tasks, seeds: of equal length; an episode's sampled tokens are a function of its task, its seed and the weights.
        policy: who acts.
        tools: returns a client of a healthy tool host; called before every attempt, so it may restart a dead one.
        judge: see `reward.score`.
        rubric_sets: by task id.
        limits, prompt, as_of: of the episode loop.
        concurrency: episodes at once; not above the sampler's slots, or sessions push each other out of the cache.
        attempts: how often an episode that infrastructure broke is run, with the same seed: the second attempt samples
            what the first would have. A judge that fails has made its own attempts.
        unfinished: rule of `reward.unfinished_reward`.
        run_episode: the episode loop.
        before: what came of the same tasks and seeds earlier; an episode that only lacks its verdict is not run again.
    """
    gate = asyncio.Semaphore(concurrency)

    async def one(index: int) -> Episode:
        task, seed = tasks[index], seeds[index]
        if before and before[index].scored.masked == Finish.JUDGE_FAILED:
            trajectory, log = before[index].trajectory, before[index].log
        else:
            async with gate:  # held while the sampler is needed, not while a judge thinks
                for _ in range(attempts):
                    done = await run_episode(task, policy, await tools(), limits, prompt=prompt, as_of=as_of, seed=seed)
                    trajectory, log = done.trajectory, done.log
                    if trajectory.finish == Finish.CANCELLED:
                        raise asyncio.CancelledError
                    if trajectory.finish.is_policy_outcome:
                        break
        scored = await reward.score(judge, task, rubric_sets.get(task.id), trajectory, unfinished)
        return Episode(index, task, seed, trajectory, log, scored)

    running = [asyncio.create_task(one(index)) for index in range(len(tasks))]
    try:
        return await asyncio.gather(*running)
    except BaseException:
        for task in running:
            task.cancel()
        await asyncio.gather(*running, return_exceptions=True)
        raise


def choose_tasks(count: int, prompts: int, *, seed: int, iteration: int) -> list[int]:
    """Indices of an iteration's tasks: arithmetic on (seed, iteration), so that resuming needs no replay.

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
