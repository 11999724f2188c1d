"""Episodes against a real tool host on whose calls both planes of faults fall, and one that is killed under them."""

import asyncio
import contextlib
import os
import re
import signal

import numpy as np
import pytest

from stepdr_jax.agent.budget import Limits
from stepdr_jax.agent.policy import EnginePolicy
from stepdr_jax.agent.tools import Tools
from stepdr_jax.engine.fake import FakeEngine
from stepdr_jax.records import Answer, Rubric, RubricSet, Task
from stepdr_jax.rl import rollouts
from stepdr_jax.tokens import chat
from stepdr_jax.tokens.tokenizer import Tokenizer
from tests.rl import faulty
from tests.tools_env.conftest import write_offline_web
from tools_env.process import ToolHost
from tools_env.service.host import start_host
from tools_env.service.settings import HostSettings


def append(mark: str) -> str:
    return chat.tool_call_text("file", {"op": "append", "path": "notes.md", "content": mark})


TURNS = [
    append("<a>"),
    chat.tool_call_text("batch_web_surfer", {"queries": ["capital of Austria"]}),
    append("<b>"),
    chat.tool_call_text("file", {"op": "read", "path": "notes.md"}),
    "<answer>The capital of Austria is Vienna.</answer>",
    "<answer>The capital of Austria is Graz.</answer>",
    "<answer>I do not know.</answer>",
]
TOKENIZER = Tokenizer.train(TURNS, 340)
LIMITS = Limits(max_turns=6, max_turn_tokens=200, max_episode_tokens=1024, max_tool_calls=8, wall_seconds=60.0)
EPISODES = 48
TASKS = [
    Task(id=f"t{i}", kind="fact", lang="en", query="capital", answer=Answer(value="Vienna")) for i in range(EPISODES)
]


def rubrics(task: Task) -> RubricSet:
    rows = [
        Rubric(rid=f"{task.id}/{name}", criterion="c", weight=weight, role=role, check={"kind": kind, "any": [text]})
        for name, weight, role, kind, text in (
            ("value", 5, "explicit", "states", "Vienna"),
            ("name", 3, "implicit", "states", "Austria"),
            ("loop", 2, "implicit", "states", "is"),
            ("graz", -4, "negative", "states_wrong", "Graz"),
        )
    ]
    return RubricSet(id="r" + task.id, task_id=task.id, rubrics=rows)


RUBRICS = {task.id: rubrics(task) for task in TASKS}


def policy():
    """Writes, searches, writes, reads, and answers one way or another by its seed."""

    def script(session, ids, params):
        turn = sum(1 for id_ in ids if id_ == TOKENIZER.im_start) // 2 - 1
        return chat.assistant_ids(TOKENIZER, TURNS[turn if turn < 4 else 4 + params.seed % 3])

    return EnginePolicy(FakeEngine(script, stop_ids=(TOKENIZER.im_end,)), TOKENIZER)


@contextlib.asynccontextmanager
async def hosted(world, **faults):
    host = await start_host(HostSettings(offline_web=str(world), web_port=9, drain=0.5, cache_failure_seconds=0.0))
    tools = faulty.FaultyTools(host.address, **faults)
    try:
        yield tools
    finally:
        await tools.close()
        await host.stop()


async def collected(tools, judge, tasks=TASKS, **keywords):
    seeds = list(range(100, 100 + len(tasks)))
    return await rollouts.collect_rollouts(tasks, seeds, policy(), tools.client, judge, RUBRICS, LIMITS, **keywords)


def run_with(world, judge, **faults):
    async def main():
        async with hosted(world, **faults) as tools:
            return await collected(tools, judge), tools.faulty.replies_lost

    return asyncio.run(main())


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return write_offline_web(tmp_path_factory.mktemp("world"))


@pytest.fixture(scope="module")
def struck(world):
    """A tenth of everything breaks: replies on their way, episodes for good, what the model reads; and the judge."""
    judge = faulty.FaultyJudge(fails=0.05, drops=0.05, max_missing=0.3)
    episodes, lost = run_with(world, judge, lost=0.1, broken=0.1, visible=faulty.VISIBLE)
    assert lost > 0 and judge.dropped > 0
    return episodes


def texts(episode):
    return [message.content for message in episode.trajectory.messages]


def test_calls_whose_reply_was_lost_are_sent_again_and_take_effect_once(world, struck):
    """Every written mark stands once, and the episodes are those of a run that lost nothing."""
    for episode in struck:
        marks = [re.findall("<.>", text) for text in texts(episode)[2:] if text.startswith("<a>")]
        assert all(found in (["<a>"], ["<a>", "<b>"]) for found in marks)
    judge = faulty.FaultyJudge(fails=0.05, drops=0.05, max_missing=0.3)
    quiet, lost = run_with(world, judge, lost=0.0, broken=0.1, visible=faulty.VISIBLE)
    assert lost == 0
    assert [texts(episode) for episode in quiet] == [texts(episode) for episode in struck]
    assert [episode.scored for episode in quiet] == [episode.scored for episode in struck]


def test_what_the_model_sees_is_rewarded_and_what_broke_is_masked(struck):
    seen = [episode for episode in struck if episode.trajectory.stats["tool_errors"]]
    assert seen and any(episode.masked is None for episode in seen)  # an error it can read is part of its world
    masked = {episode.index for episode in struck if episode.masked == "infra_failed"}
    assert masked == {index for index in range(EPISODES) if faulty.struck(0.1, "broken", 100 + index)} != set()
    judged = {episode.index for episode in struck if episode.masked == "judge_failed"}
    assert judged and not judged & masked
    assert all(episode.scored.reward is None for episode in struck if episode.masked)


def test_a_rubric_without_a_verdict_is_in_neither_sum(struck):
    dropped = 0
    for episode in struck:
        if episode.masked is None:
            judged = [judgment for judgment in episode.scored.verdict.judgments if judgment.verdict != "error"]
            dropped += len(episode.scored.verdict.judgments) - len(judged)
            gained = sum(judgment.weight * judgment.score for judgment in judged)
            assert episode.scored.reward == gained / sum(j.weight for j in judged if j.weight > 0)
    assert dropped > 0


def test_the_learner_gets_the_surviving_episodes_and_of_the_others_nothing(struck):
    kept = [episode.index for episode in struck if episode.masked is None]
    whole = rollouts.rollout_arrays(struck, LIMITS.max_episode_tokens)
    alone = rollouts.rollout_arrays([struck[index] for index in kept], LIMITS.max_episode_tokens)
    lost = np.setdiff1d(np.arange(EPISODES), kept)
    for name, array in vars(whole).items():
        np.testing.assert_array_equal(array[kept], getattr(alone, name))
        assert not array[lost].any()


def test_episodes_whose_tool_host_is_killed_are_masked_and_run_again_on_the_next_one(world, tmp_path):
    """Signal 9 in the middle of all episodes: sessions and files are lost, so they start again with their seeds."""
    host = ToolHost(world, web_port=9, log_path=tmp_path / "log")
    host.start()
    tools = Tools(host.address, call_timeout=15.0, host=host)

    async def run(kill_at: int = 0):
        client, calls = await tools.client(), 0
        send = client._call

        async def counted(method, *arguments, **keywords):
            nonlocal calls
            calls += method == "CallTool"
            if method == "CallTool" and calls == kill_at:
                os.kill(host.pid, signal.SIGKILL)
            return await send(method, *arguments, **keywords)

        client._call = counted
        try:
            return await collected(tools, faulty.FaultyJudge(), TASKS[:6], attempts=1)
        finally:
            client._call = send
            await client.close()

    try:
        whole, struck, again = asyncio.run(run()), asyncio.run(run(kill_at=12)), asyncio.run(run())
    finally:
        host.stop()
    masked = [episode for episode in struck if episode.masked]
    assert masked and all(episode.masked == "infra_failed" for episode in masked)
    assert all("tool host" in episode.trajectory.metadata["cause"] for episode in masked)
    assert tools.restarts == 1
    assert [texts(episode) for episode in again] == [texts(episode) for episode in whole]
    assert [episode.scored for episode in again] == [episode.scored for episode in whole]
