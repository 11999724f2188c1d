"""Where PPO's rollouts come from: online, sampled against tools and judged, or replayed from recordings."""

import asyncio
import dataclasses
import functools
import time
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Protocol

import jax
from ml_collections import ConfigDict

from stepdr_jax.agent import react, runner
from stepdr_jax.agent.budget import Limits
from stepdr_jax.agent.policy import EnginePolicy
from stepdr_jax.agent.tools import Tools
from stepdr_jax.engine import factory
from stepdr_jax.engine.engine import JaxEngine
from stepdr_jax.engine.remote import RemoteEngine
from stepdr_jax.errors import UserError
from stepdr_jax.judge.judges import Judge
from stepdr_jax.models.qwen2 import Qwen2Config
from stepdr_jax.records import RubricSet, Task
from stepdr_jax.rl import hosts, recordings, rollouts
from stepdr_jax.rl.learner import Params
from stepdr_jax.rl.placement import DevicePlacement
from stepdr_jax.rl.rollouts import Rollout
from stepdr_jax.runtime import distributed
from stepdr_jax.sharding import memory
from stepdr_jax.tokens.tokenizer import Tokenizer
from tools_env.client import ToolInfraError

ROUNDS = 3  # an iteration's masked episodes are sampled at most so often, then the run stops
PREEMPTION_POLL_SECONDS = 0.2  # while episodes are sampled
READY_SECONDS = 30.0  # for a tool host that others run to come back between rounds


@dataclasses.dataclass(frozen=True)
class PPOInputs:
    """What PPO reads from a run directory (`loop.read_inputs`).

    read_actor: reads the parameters that the policy starts with. origin: identifies them and the tasks; compared when a
    run continues. connect_tools: set once the tool host runs.
    """

    tokenizer: Tokenizer
    model: Qwen2Config
    read_actor: Callable[[], Params]
    tasks: Sequence[Task]
    rubric_sets: dict[str, RubricSet]
    judge: Judge
    origin: str
    connect_tools: Callable[[], Tools] | None = None
    run_episode: runner.EpisodeLoop = react.run_episode


class RolloutSource(Protocol):
    """Where the loop gets rollouts from.

    collective_lock: held while this process runs programs of all processes, which must run in the same order in all.
    """

    collective_lock: asyncio.Lock

    async def rollouts(self, iteration: int) -> list[Rollout]: ...

    async def sleep(self) -> None: ...

    async def update_weights(self, params: Params, version: int) -> None: ...

    def stats(self) -> dict[str, float]: ...

    async def close(self) -> None: ...


Timed = tuple[list[Rollout], float]  # with the seconds that sampling took


def start_sampling(source: RolloutSource, iteration: int) -> asyncio.Task[Timed]:
    """Starts to sample an iteration in the background."""

    async def timed() -> Timed:
        began = time.monotonic()
        return await source.rollouts(iteration), time.monotonic() - began

    return asyncio.create_task(timed())


async def wait_unless_preempted(sampling: asyncio.Task[Timed], preemption: distributed.Preemption) -> Timed | None:
    """The result of `sampling`; None when the process is preempted: a single process then abandons the iteration.

    Several processes look only when all have their rollouts: they must stop at the same iteration.
    """
    if jax.process_count() == 1:
        while not sampling.done() and not preemption.reached():
            await asyncio.wait([sampling], timeout=PREEMPTION_POLL_SECONDS)
        if not sampling.done():
            await cancel_sampling(sampling)
            return None
    sampled = await sampling
    return None if preemption.reached() else sampled


async def cancel_sampling(sampling: asyncio.Task[Timed]) -> None:
    sampling.cancel()
    await asyncio.wait([sampling])


def build_engine(
    config: ConfigDict, inputs: PPOInputs, params: Params, *, version: int, placement: DevicePlacement
) -> JaxEngine | RemoteEngine:
    """The sampler that `config.sampler` describes, with the actor's parameters of `version`, in whatever memory."""
    return factory.make_engine(
        config,
        memory.copied(params, memory.DEVICE),
        inputs.model,
        inputs.tokenizer,
        version=version,
        devices=placement.sampler_devices,
        weight_sync_bytes=placement.bucket_bytes,
    )


class OnlineRollouts:
    """Samples an iteration's episodes with the current weights, and records them before they are used.

    Recordings of an earlier run with the same settings, killed before its next checkpoint, are used instead of
    sampling: an iteration is a function of the settings, so the episodes would be the same.

    Args:
        engine: samples; released with `sleep` while the learner works, if the placement says so.
        directory: of the recordings.
        fingerprint: identifies all settings that episodes are a function of.
        placement: of learner and sampler.
    """

    def __init__(
        self,
        config: ConfigDict,
        inputs: PPOInputs,
        engine: JaxEngine | RemoteEngine,
        *,
        directory: Path,
        fingerprint: str,
        placement: DevicePlacement,
    ):
        if inputs.connect_tools is None:
            raise ValueError("inputs.connect_tools is not set")
        self.config, self.inputs, self.directory, self.fingerprint = config, inputs, directory, fingerprint
        self.engine, self.placement, self.collective_lock = engine, placement, asyncio.Lock()
        self.tools = inputs.connect_tools()
        self._collect = functools.partial(
            rollouts.collect_rollouts,
            policy=EnginePolicy(self.engine, inputs.tokenizer, config.ppo.temperature, name="ppo"),
            tools=self.tools.client,
            judge=inputs.judge,
            rubric_sets=inputs.rubric_sets,
            limits=Limits.from_config(config.agent),
            prompt=config.agent.prompt,
            as_of=config.offline_web.as_of,
            concurrency=config.sampler.max_num_seqs,
            truncated=config.ppo.truncated_reward,
            run_episode=inputs.run_episode,
        )

    async def rollouts(self, iteration: int) -> list[Rollout]:
        """The rollouts of one iteration. Raises UserError when too many of them stay masked."""
        config, inputs = self.config, self.inputs
        known = {task.id: task for task in inputs.tasks}
        recorded = hosts.read_on_lead(
            lambda: recordings.load_rollouts(self.directory, iteration, known, self.fingerprint), known
        )
        if recorded is not None:
            return recorded
        chosen = rollouts.choose_tasks(
            len(inputs.tasks), config.ppo.prompts_per_iteration, seed=config.seed, iteration=iteration
        )
        tasks = [inputs.tasks[index] for index in chosen for _ in range(config.ppo.samples_per_prompt)]
        seeds = [rollouts.episode_seed(config.seed, iteration, index) for index in range(len(tasks))]
        episodes = await self._collect_enough(tasks, seeds, iteration)
        if distributed.is_lead():
            recordings.save_rollouts(self.directory, iteration, episodes, self.fingerprint)
        return episodes

    async def sleep(self) -> None:
        """Frees the sampler's memory before the learner works, if they share devices."""
        if self.placement.sampler_sleeps:
            await self.engine.sleep()

    async def update_weights(self, params: Params, version: int) -> None:
        """Gives the sampler the weights after `version` iterations, for everything sampled from now on."""
        if version != self.engine.version or self.engine.sleeping:
            await self.engine.update_weights(memory.copied(params, memory.DEVICE), version)

    def stats(self) -> dict[str, float]:
        held = self.engine.stats()
        if isinstance(self.engine, RemoteEngine):
            own = {"sampler_weights_sent_again": held["weights_sent_again"]}
        else:
            own = {"sampler_evictions": held["evictions"], "sampler_pages_peak": held["pages_peak"] / held["num_pages"]}
        return {"tool_host_restarts": self.tools.restarts} | own

    async def close(self) -> None:
        await self.tools.close()
        await self.inputs.judge.close()
        if isinstance(self.engine, RemoteEngine):
            await self.engine.stop()

    async def _collect_enough(self, tasks: Sequence[Task], seeds: Sequence[int], iteration: int) -> list[Rollout]:
        """Collects an iteration; while too large a share is masked, samples masked episodes again, with their seeds.

        Raises UserError after ROUNDS rounds: a batch of the surviving episodes alone is biased.
        """
        episodes = await hosts.collect_over_hosts(self._collect, self.collective_lock, tasks, seeds)
        for tried in range(1, ROUNDS + 1):
            masked = [episode.index for episode in episodes if episode.masked is not None]
            if len(masked) <= self.config.ppo.max_masked_share * len(episodes):
                return episodes
            causes = Counter(_cause(episodes[index]) for index in masked).most_common(1)
            share = f"{len(masked)} of {len(episodes)} episodes of iteration {iteration} are masked"
            share += f", mostly by {causes[0][0]}"
            if tried == ROUNDS:
                break
            distributed.print_once(f"ppo  {share}; sampling them again")
            try:
                await (await self.tools.client()).wait_ready(READY_SECONDS)
            except ToolInfraError as error:
                raise UserError(f"{share}; {error}; restart the tool host and run the same command") from None
            again = await hosts.collect_over_hosts(
                self._collect,
                self.collective_lock,
                [tasks[index] for index in masked],
                [seeds[index] for index in masked],
                before=[episodes[index] for index in masked],
            )
            for index, episode in zip(masked, again, strict=True):
                episodes[index] = dataclasses.replace(episode, index=index)
        raise UserError(
            f"{share}, more than ppo.max_masked_share = {self.config.ppo.max_masked_share} after {ROUNDS} rounds; "
            "correct the cause, then run the same command: it continues from the last checkpoint"
        )


def _cause(episode: Rollout) -> str:
    return f"{episode.masked} ({episode.trajectory.metadata.get('cause', 'no cause given')})"


class ReplayedRollouts:
    """Rollouts that an earlier run recorded, whatever the current weights.

    Args:
        directory: the recordings, of any run over the same tasks.
        command: that makes them, for the error where there are none.
    """

    def __init__(self, inputs: PPOInputs, directory: Path, *, command: str = "python -m launch.ppo"):
        self.directory, self._tasks = directory, {task.id: task for task in inputs.tasks}
        self.count, self.collective_lock = 0, asyncio.Lock()
        while recordings.recording_paths(directory, self.count)[1].exists():
            self.count += 1
        if not self.count:
            raise UserError(f"{directory} has no recorded iterations; run {command} first")

    async def rollouts(self, iteration: int) -> list[Rollout]:
        return recordings.load_rollouts(self.directory, iteration, self._tasks) or []

    async def sleep(self) -> None:
        pass

    async def update_weights(self, params: Params, version: int) -> None:
        pass

    def stats(self) -> dict[str, float]:
        return {}

    async def close(self) -> None:
        pass
