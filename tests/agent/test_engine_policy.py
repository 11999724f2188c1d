"""Token-in, token-out: what the engine sampled is in the log as it was sampled, and text is rendered from it."""

import asyncio

import pytest

from stepdr_jax.agent.budget import Limits
from stepdr_jax.agent.policy import EnginePolicy
from stepdr_jax.agent.react import run_episode
from stepdr_jax.engine.fake import FakeEngine
from stepdr_jax.records import Finish
from stepdr_jax.tokens import chat
from stepdr_jax.tokens.tokenizer import Tokenizer
from tests.agent.scripted import ANSWER, AUSTRIA, TableTools, broken, search
from tests.agent.test_react import TASK

LIMITS = Limits(max_turns=4, max_turn_tokens=400, max_episode_tokens=3000, max_tool_calls=3, wall_seconds=10.0)


@pytest.fixture(scope="module")
def tok():
    return Tokenizer.train([TASK.query, ANSWER, AUSTRIA.text, search("capital of Austria")] * 4, 400)


def episode(tok, turns, limits=LIMITS, tools=None):
    """`turns` are lists of ids, or exceptions."""
    turns = list(turns)

    def script(session, ids, params):
        item = turns.pop(0)
        if isinstance(item, Exception):
            raise item
        return item

    engine = FakeEngine(script, stop_ids=(tok.im_end, tok.endoftext), version=3)
    policy = EnginePolicy(engine, tok, 1.0, name="fake")
    return asyncio.run(run_episode(TASK, policy, tools or TableTools(), limits, seed=5)), engine


def test_the_log_is_prompt_turn_observation_turn_and_equals_the_rendered_trajectory(tok):
    first, last = chat.assistant_ids(tok, search("capital of Austria")), chat.assistant_ids(tok, ANSWER)
    done, engine = episode(tok, [first, last])
    log, trajectory = done.log, done.trajectory
    assert trajectory.finish == Finish.ANSWERED and trajectory.answer.startswith("The capital")
    assert log.tokens == chat.trajectory_tokens(tok, trajectory).tokens
    assert [log.tokens[a:b] for a, b, sampled in log.spans() if sampled] == [tuple(first), tuple(last)]
    arrays = log.arrays()
    assert set(arrays["version"][arrays["sampled"]]) == {3} and (arrays["logprobs"][arrays["sampled"]] == -1).all()
    assert trajectory.stats["sampled_tokens"] == len(first) + len(last)
    assert trajectory.stats["sampled_tokens"] + trajectory.stats["observed_tokens"] == len(log)
    assert len(engine.closed) == 1 and not engine.sessions


def test_the_engine_has_seen_exactly_the_log(tok):
    seen = []
    turns = [chat.assistant_ids(tok, search("a")), chat.assistant_ids(tok, ANSWER)]

    def script(session, ids, params):
        seen.append(ids)
        return turns[len(seen) - 1]

    policy = EnginePolicy(FakeEngine(script, stop_ids=(tok.im_end,)), tok)
    done = asyncio.run(run_episode(TASK, policy, TableTools(), LIMITS))
    assert done.log.tokens == seen[-1] + tuple(turns[-1])


def test_an_odd_sampled_spelling_is_kept_as_sampled(tok):
    # Single bytes instead of merged tokens: the same text, other ids.
    spelled = [
        i
        for byte in search("capital of Austria").removeprefix("<tool_call>").removesuffix("</tool_call>")
        for i in tok.encode(byte)
    ]
    first = [tok.tool_call_start, *spelled, tok.tool_call_end, tok.im_end]
    done, _ = episode(tok, [first, chat.assistant_ids(tok, ANSWER)])
    assert done.trajectory.finish == Finish.ANSWERED
    start, end, _ = next(span for span in done.log.spans() if span[2])
    assert done.log.tokens[start:end] == tuple(first) != tuple(chat.assistant_ids(tok, search("capital of Austria")))


def test_a_turn_cut_by_length_gets_its_end_from_the_harness(tok):
    cut = tok.encode("<think>The capital of")
    limits = Limits(max_turns=4, max_turn_tokens=len(cut), max_episode_tokens=3000, max_tool_calls=3, wall_seconds=10.0)
    done, _ = episode(tok, [cut] * 4, limits)
    assert done.trajectory.finish == Finish.FORMAT
    _, end, _ = next(span for span in done.log.spans() if span[2])
    assert done.log.tokens[end] == tok.im_end and not done.log.arrays()["sampled"][end]


def test_an_observation_that_no_turn_follows_is_not_in_the_log_so_the_budget_holds(tok):
    first = chat.assistant_ids(tok, search("capital of Austria"))
    prompt = len(chat.prompt_ids(tok, []))
    full, _ = episode(tok, [first, chat.assistant_ids(tok, ANSWER)])
    prompt = full.log.spans()[0][1]
    limits = Limits(4, 400, prompt + len(first) + 10, 3, 10.0)
    done, _ = episode(tok, [first], limits)
    assert done.trajectory.finish == Finish.MAX_TOKENS
    assert len(done.log) == prompt + len(first) <= limits.max_episode_tokens
    assert done.trajectory.messages[-1].role == "tool"


def test_a_failed_engine_or_tool_host_leaves_a_log_that_is_consistent_up_to_there(tok):
    first = chat.assistant_ids(tok, search("a"))
    done, _ = episode(tok, [first, RuntimeError("device lost")])
    assert done.trajectory.finish == Finish.INFRA_FAILED and len(done.log.spans()) == 2
    done, _ = episode(tok, [first], tools=TableTools({"a": broken()}))
    assert done.trajectory.finish == Finish.INFRA_FAILED and done.log.spans()[-1][2]
