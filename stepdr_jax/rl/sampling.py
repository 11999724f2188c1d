"""Where PPO's episodes come from: live, sampled against tools and judged, or recorded by an earlier run."""

import asyncio
import dataclasses
import functools
import time
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Protocol

import jax
from ml_collections import ConfigDict

from stepdr_jax.agent import react
from stepdr_jax.agent.budget import Limits
from stepdr_jax.agent.policy import EnginePolicy
from stepdr_jax.agent.tools import Tools
from stepdr_jax.errors import UserError
from stepdr_jax.judge.judges import Judge
from stepdr_jax.models.qwen2 import Qwen2Config
from stepdr_jax.records import RubricSet, Task
from stepdr_jax.rl import hosts, recordings, rollouts
from stepdr_jax.rl.roles import Roles
from stepdr_jax.rl.rollouts import Episode
from stepdr_jax.runtime import distributed
from stepdr_jax.sharding import memory
from stepdr_jax.tokens.tokenizer import Tokenizer
from stepdr_jax.training import sampler
from tools_env.client import ToolInfraError

ROUNDS = 3  # times an iteration's masked episodes are sampled again before the run stops
HEARD = 0.2  # seconds after which a notice to end is heard while episodes are sampled
READY_SECONDS = 30.0  # given to a tool host that is not ours to come back between rounds


@dataclasses.dataclass(frozen=True)
class Parts:
    """What the loop works with; `prepare` reads it from a run directory.

    actor: reads the parameters that the policy begins with. origin: a name for them and for the tasks, compared when a run is continued.
    """

    tokenizer: Tokenizer
    model: Qwen2Config
    actor: Callable[[], dict]
    tasks: Sequence[Task]
    rubric_sets: dict[str, RubricSet]
    judge: Judge
    origin: str
    tools: Callable[[], Tools] | None = None  # known once the tool host runs
    run_episode: Any = react.run_episode


class Source(Protocol):
    """What the loop asks for episodes. devices: held by whoever runs programs of all processes, in the same order in all."""

    devices: asyncio.Lock

    async def episodes(self, iteration: int) -> list[Episode]: ...

    async def rest(self) -> None: ...

    async def take(self, params: dict, version: int) -> None: ...

    def stats(self) -> dict[str, float]: ...

    async def close(self) -> None: ...


def start(source: Source, iteration: int) -> asyncio.Task:
    """Begins to sample an iteration: (episodes, seconds that it took)."""

    async def timed() -> tuple[list[Episode], float]:
        began = time.monotonic()
        return await source.episodes(iteration), time.monotonic() - began

    return asyncio.create_task(timed())


async def unless_told(sampling_now: asyncio.Task, notice: distributed.Preemption):
    """What the task gives; None when this process is told to end, and then an iteration in the middle is given up.

    Several processes look only when all have their episodes: they have to stop at the same place.
    """
    while jax.process_count() == 1 and not sampling_now.done() and not notice.reached():
        await asyncio.wait([sampling_now], timeout=HEARD)
    if jax.process_count() == 1 and not sampling_now.done():
        sampling_now.cancel()
        await asyncio.wait([sampling_now])
        return None
    sampled = await sampling_now
    return None if notice.reached() else sampled


class Live:
    """Samples an iteration's episodes with the weights it has, and records them before they are used.

    What is recorded already, by a run of the same settings that was killed before its next checkpoint, is not sampled
    again: everything an iteration does is a function of the settings, so it would be the same.

    Args:
        params: the actor's, in whatever memory.
        version: of these weights.
        directory: of the recordings.
        mark: names all settings that episodes are a function of.
        roles: who works where.
    """

    def __init__(
        self, config: ConfigDict, parts: Parts, params: dict, *, version: int, directory: Path, mark: str, roles: Roles
    ):
        settings = config.ppo
        self.config, self.parts, self.directory, self.mark = config, parts, directory, mark
        self.roles, self.devices = roles, asyncio.Lock()
        self.engine = sampler.make_engine(
            config,
            memory.copied(params, memory.DEVICE),
            parts.model,
            parts.tokenizer,
            version=version,
            devices=roles.sampler,
            transfer_bytes=roles.transfer_bytes,
        )
        self.tools = parts.tools()
        self._collect = functools.partial(
            rollouts.collect,
            policy=EnginePolicy(self.engine, parts.tokenizer, settings.temperature, name="ppo"),
            tools=self.tools.client,
            judge=parts.judge,
            rubric_sets=parts.rubric_sets,
            limits=Limits.from_config(config.agent),
            prompt=config.agent.prompt,
            as_of=config.offline_web.as_of,
            concurrency=config.sampler.max_num_seqs,
            unfinished=settings.truncated_reward,
            run_episode=parts.run_episode,
        )

    async def episodes(self, iteration: int) -> list[Episode]:
        """The episodes of one iteration. Raises UserError when too many of them stay broken."""
        config, parts = self.config, self.parts
        known = {task.id: task for task in parts.tasks}
        recorded = hosts.of_lead(lambda: recordings.load(self.directory, iteration, known, self.mark), known)
        if recorded is not None:
            return recorded
        chosen = rollouts.choose_tasks(
            len(parts.tasks), config.ppo.prompts_per_iteration, seed=config.seed, iteration=iteration
        )
        tasks = [parts.tasks[index] for index in chosen for _ in range(config.ppo.samples_per_prompt)]
        seeds = [rollouts.episode_seed(config.seed, iteration, index) for index in range(len(tasks))]
        episodes = await self._enough(tasks, seeds, iteration)
        if distributed.is_lead():
            recordings.save(self.directory, iteration, episodes, self.mark)
        return episodes

    async def rest(self) -> None:
        """The learner works next: where it does so by turns with the sampler, that gives its memory back."""
        if self.roles.by_turns:
            await self.engine.release()

    async def take(self, params: dict, version: int) -> None:
        """Takes the weights that `version` iterations of learning made, for what is sampled from now on."""
        if version != self.engine.version or self.engine.released:
            await self.engine.update_weights(memory.copied(params, memory.DEVICE), version)

    def stats(self) -> dict[str, float]:
        held = self.engine.stats()
        pages = {"sampler_pages_peak": held["pages_peak"] / held["pages"]} if held.get("pages") else {}
        return {"tool_host_restarts": self.tools.restarts, "sampler_evictions": held["evictions"]} | pages

    async def close(self) -> None:
        await self.tools.close()
        await self.parts.judge.close()

    async def _enough(self, tasks: Sequence[Task], seeds: Sequence[int], iteration: int) -> list[Episode]:
        """Collects an iteration; while too large a share is masked, the masked episodes are sampled again, with their seeds.

        Raises UserError after ROUNDS rounds: a batch of what happened to survive is a biased one.
        """
        episodes = await hosts.collect(self._collect, self.devices, tasks, seeds)
        for tried in range(1, ROUNDS + 1):
            masked = [episode.index for episode in episodes if episode.masked is not None]
            if len(masked) <= self.config.ppo.max_masked_share * len(episodes):
                return episodes
            causes = Counter(_cause(episodes[index]) for index in masked).most_common(1)
            share = f"{len(masked)} of {len(episodes)} episodes of iteration {iteration} are masked, mostly by {causes[0][0]}"
            if tried == ROUNDS:
                break
            distributed.print_once(f"ppo  {share}; sampling them again")
            try:
                await (await self.tools.client()).wait_ready(READY_SECONDS)
            except ToolInfraError as error:
                raise UserError(f"{share}; {error}; start the tool host again and run the same command") from None
            again = await hosts.collect(
                self._collect,
                self.devices,
                *([of[index] for index in masked] for of in (tasks, seeds)),
                before=[episodes[index] for index in masked],
            )
            for index, episode in zip(masked, again, strict=True):
                episodes[index] = dataclasses.replace(episode, index=index)
        raise UserError(
            f"{share}, more than ppo.max_masked_share = {self.config.ppo.max_masked_share} after {ROUNDS} rounds; mend "
            "that, then run the same command: it continues from the last checkpoint"
        )


def _cause(episode: Episode) -> str:
    return f"{episode.masked} ({episode.trajectory.metadata.get('cause', 'no cause given')})"


class Recorded:
    """Episodes that an earlier run recorded; weights change nothing in them.

    Args:
        directory: the recordings, of any run over the same tasks.
    """

    def __init__(self, parts: Parts, directory: Path):
        self.directory, self._tasks = directory, {task.id: task for task in parts.tasks}
        self.count, self.devices = 0, asyncio.Lock()
        while recordings.paths(directory, self.count)[1].exists():
            self.count += 1
        if not self.count:
            raise UserError(f"{directory} has no recorded iterations; run python -m launch.ppo first")

    async def episodes(self, iteration: int) -> list[Episode]:
        return recordings.load(self.directory, iteration, self._tasks)

    async def rest(self) -> None:
        pass

    async def take(self, params: dict, version: int) -> None:
        pass

    def stats(self) -> dict[str, float]:
        return {}

    async def close(self) -> None:
        pass
