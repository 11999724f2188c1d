"""Runs many episodes at once, for synthesis, reinforcement learning and evaluation.

`run_all` limits concurrency, skips what is recorded and stops at the first error; `run_with_retries` runs one episode.
A result depends on its job and seed only, never on the order in which episodes end.
"""

import asyncio
import types
from collections.abc import Awaitable, Callable, Mapping
from typing import Protocol, TypeVar

from stepdr_jax.agent import react
from stepdr_jax.agent.budget import Limits
from stepdr_jax.agent.policy import Policy
from stepdr_jax.agent.react import Episode
from stepdr_jax.records import Finish, Task
from tools_env.client import ToolsClient

Key = TypeVar("Key")
Job = TypeVar("Job")
Sampled = TypeVar("Sampled")
Result = TypeVar("Result")
ToolsProvider = Callable[[], Awaitable[ToolsClient]]


class EpisodeLoop(Protocol):
    """`react.run_episode`, or a replacement in a test."""

    async def __call__(
        self, task: Task, policy: Policy, tools: ToolsClient, limits: Limits, *, prompt: str, as_of: str, seed: int
    ) -> Episode: ...


async def run_all(
    jobs: Mapping[Key, Job],
    work: Callable[[Job], Awaitable[Sampled]],
    then: Callable[[Job, Sampled], Awaitable[Result]],
    *,
    concurrency: int,
    recorded: Mapping[Key, Result] = types.MappingProxyType({}),
    on_result: Callable[[Key, Result], None] = lambda key, result: None,
) -> dict[Key, Result]:
    """Runs `then(job, await work(job))` for every job that `recorded` lacks.

    Args:
        jobs: by key.
        work: what needs the sampler; at most `concurrency` run at once.
        then: what follows without the sampler, such as judging; not limited.
        recorded: results of an earlier run.
        on_result: called with each new result, in the order in which jobs end; reports progress and writes to disk.

    Returns:
        The results of all jobs, in the order of `jobs`.

    Raises the first exception of any job, after cancelling all others.
    """
    gate = asyncio.Semaphore(concurrency)
    results = dict(recorded)

    async def one(key: Key, job: Job) -> None:
        async with gate:
            sampled = await work(job)
        results[key] = await then(job, sampled)
        on_result(key, results[key])

    running = [asyncio.create_task(one(key, job)) for key, job in jobs.items() if key not in recorded]
    try:
        await asyncio.gather(*running)
    except BaseException:
        for task in running:
            task.cancel()
        await asyncio.gather(*running, return_exceptions=True)
        raise
    return {key: results[key] for key in jobs}


async def run_with_retries(
    task: Task,
    policy: Policy,
    tools: ToolsProvider,
    limits: Limits,
    *,
    prompt: str,
    as_of: str,
    seed: int,
    attempts: int = 2,
    pause: float = 0.0,
    run_episode: EpisodeLoop = react.run_episode,
) -> tuple[Episode, int]:
    """Runs one episode, again with the same seed if infrastructure broke it; returns (last episode, attempts made).

    Args:
        task, policy, limits, prompt, as_of, seed: of `react.run_episode`.
        tools: returns a client of a healthy tool host; called before every attempt, so it may restart a dead host.
        attempts: at most. The second attempt of a token-level policy samples what the first would have.
        pause: seconds before the second attempt, doubled for each further one.
        run_episode: the episode loop.

    Raises what `tools` raises, and CancelledError for a cancelled episode.
    """
    attempt = 1
    while True:
        episode = await run_episode(task, policy, await tools(), limits, prompt=prompt, as_of=as_of, seed=seed)
        finish = episode.trajectory.finish
        if finish == Finish.CANCELLED:
            raise asyncio.CancelledError
        if finish.is_policy_outcome or attempt == attempts:
            return episode, attempt
        await asyncio.sleep(pause * 2 ** (attempt - 1))
        attempt += 1
