"""Thousands of episodes at once from one process against a real tool host: their cost, and whether any stays waiting.

    python -m launch.bench.episodes --episodes=2000

The episodes are those of PPO (the episode loop, token sessions, the client of the tool host, the judge); only the model
is a script that thinks for a random time, writes a note, searches, reads its notes back and answers. Every episode must
end answered, with its own notes whole, and judged right. The tool host is a process over config.run_dir's world.

Prints one JSON object: calls a second, latencies of calls, how late the event loop wakes (a timer of 10 ms, measured
all the time), how long an episode waited in all for anything but its model, and processor time and memory of this
process an episode.
"""

import asyncio
import json
import os
import random
import resource
import time

import psutil
from absl import flags

from launch import entry, tool_host
from stepdr_jax.agent.budget import Limits
from stepdr_jax.agent.policy import EnginePolicy
from stepdr_jax.agent.react import run_episode
from stepdr_jax.agent.tools import Tools
from stepdr_jax.engine.fake import FakeEngine
from stepdr_jax.errors import UserError
from stepdr_jax.judge.judges import ProgrammaticJudge
from stepdr_jax.records import Answer, Rubric, RubricSet, Task
from stepdr_jax.rl import rollouts
from stepdr_jax.tokens import chat
from stepdr_jax.tokens.tokenizer import Tokenizer
from tools_env.check.load import process_tree

_EPISODES = flags.DEFINE_integer("episodes", 2000, "at once", lower_bound=1)
_THINK = flags.DEFINE_float("think", 4.0, "mean seconds that a turn takes to sample")
_WORKERS = flags.DEFINE_integer("workers", 1, "processes of the tool host", lower_bound=1)

TICK = 0.01  # seconds
LIMITS = Limits(max_turns=8, max_turn_tokens=400, max_episode_tokens=8192, max_tool_calls=8, wall_seconds=600.0)


def turn_text(turn: int, name: str) -> str:
    """What the script says: each episode writes and reads back its own name."""
    note = {"op": "append", "path": "notes.md", "content": f"<{name}>"}
    calls = [
        ("file", note),
        ("batch_web_surfer", {"queries": [f"capital {name}"]}),
        ("file", note),
        ("file", {"op": "read", "path": "notes.md"}),
    ]
    return chat.tool_call_text(*calls[turn]) if turn < len(calls) else f"<answer>notes of {name}</answer>"


class ThinkingEngine(FakeEngine):
    """Takes its time over every turn: an exponential draw by session and turn."""

    def __init__(self, tokenizer: Tokenizer, think: float):
        super().__init__(self._turn, stop_ids=(tokenizer.im_end,))
        self.tokenizer, self.think = tokenizer, think
        self.thought: dict[int, float] = {}  # by seed

    def _turn(self, session, ids, params):
        turn = ids.count(self.tokenizer.im_start) // 2 - 1
        return chat.assistant_ids(self.tokenizer, turn_text(turn, f"e{params.seed}"))

    async def generate(self, session, new_ids, params):
        turn = f"{params.seed} {len(self.sessions.get(session, ()))}"
        seconds = random.Random(turn).expovariate(1 / self.think)
        self.thought[params.seed] = self.thought.get(params.seed, 0.0) + seconds
        await asyncio.sleep(seconds)
        return await super().generate(session, new_ids, params)


class Watched:
    """A client whose sessions note how long each call took."""

    def __init__(self, client, seconds: list[float]):
        self._client, self._seconds = client, seconds

    async def open_session(self, *arguments, **settings):
        self._session = await self._client.open_session(*arguments, **settings)
        return self

    async def call(self, *arguments, **settings):
        began = time.monotonic()
        try:
            return await self._session.call(*arguments, **settings)
        finally:
            self._seconds.append(time.monotonic() - began)

    async def close(self):
        await self._session.close()


async def lateness(late: list[float]) -> None:
    """Appends by how much each tick came too late, until it is cancelled."""
    while True:
        began = time.monotonic()
        await asyncio.sleep(TICK)
        late.append(time.monotonic() - began - TICK)


def percentiles(values: list[float]) -> dict[str, float]:
    """Milliseconds: the median, the 99th of a hundred, and the largest."""
    ordered = sorted(values)
    return {name: round(1000 * ordered[min(int(share * len(ordered)), len(ordered) - 1)], 1)
            for name, share in (("p50", 0.5), ("p99", 0.99), ("max", 1.0))}  # fmt: skip


async def measure(host, tokenizer: Tokenizer, count: int, think: float) -> dict:
    tools, seconds, late, waited = Tools(host.address, call_timeout=60.0, host=host), [], [], []
    engine = ThinkingEngine(tokenizer, think)
    tasks = [Task(id=f"t{i}", kind="fact", lang="en", query="Write, search, read.", answer=Answer(value=f"e{i}"))
             for i in range(count)]  # fmt: skip
    checks = {
        task.id: RubricSet(
            id="r",
            task_id=task.id,
            rubrics=[Rubric(rid="own", criterion="c", weight=1, role="explicit",
                            check={"kind": "states", "any": [task.answer.value]})],
        )
        for task in tasks
    }  # fmt: skip

    async def episode(task, policy, client, limits, **settings):
        began = time.monotonic()
        done = await run_episode(task, policy, Watched(client, seconds), limits, **settings)
        waited.append(time.monotonic() - began - engine.thought[settings["seed"]])
        return done

    async def run(some):
        return await rollouts.collect_rollouts(
            some,
            [int(task.id[1:]) for task in some],
            EnginePolicy(engine, tokenizer),
            tools.client,
            ProgrammaticJudge(),
            checks,
            LIMITS,
            concurrency=len(some),
            attempts=1,
            run_episode=episode,
        )

    process = psutil.Process()
    await run(tasks[:8])  # imports, connections
    before, cpu, began = process.memory_info().rss, sum(process.cpu_times()[:2]), time.monotonic()
    seconds.clear(), waited.clear(), engine.thought.clear()
    watching = asyncio.create_task(lateness(late))
    episodes = await run(tasks)
    wall = time.monotonic() - began
    watching.cancel()
    await tools.close()
    for number, done in enumerate(episodes):
        notes = [
            m.content for m in done.trajectory.messages if m.role == "tool" and f"<e{number}><e{number}>" in m.content
        ]
        if done.masked or done.scored.reward != 1.0 or len(notes) != 1:
            raise UserError(f"episode {number} is wrong: {done.trajectory.finish}, {done.trajectory.metadata}")
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return {
        "episodes_at_once": count,
        "seconds": round(wall, 1),
        "calls_per_second": round(len(seconds) / wall),
        "call_ms": percentiles(seconds),
        "event_loop_late_ms": percentiles(late),
        "cpu_ms_an_episode": round(1000 * (sum(process.cpu_times()[:2]) - cpu) / count, 1),
        "kilobytes_an_episode": round((peak - before) / count / 1024),
        "host_megabytes": round(sum(psutil.Process(p).memory_info().rss for p in process_tree(host.pid)) / 2**20),
        "episode_waited_ms": percentiles(waited),
        "load": round(os.getloadavg()[0], 1),
    }


def main(config) -> None:
    texts = [turn_text(turn, "e123") for turn in range(5)]
    tokenizer = Tokenizer.train(texts, 360)
    with tool_host.start(config, "bench_episodes", workers=_WORKERS.value, queue=2 * _EPISODES.value) as host:
        print(json.dumps(asyncio.run(measure(host, tokenizer, _EPISODES.value, _THINK.value)), indent=1))


if __name__ == "__main__":
    entry.run(main, __doc__)
