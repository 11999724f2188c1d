"""What the episode loop does with whatever a policy writes and whatever breaks."""

import asyncio

import pytest

from stepdr_jax.agent.budget import Limits
from stepdr_jax.agent.policy import Turn
from stepdr_jax.agent.react import run_episode
from stepdr_jax.records import Finish, Task, Trajectory
from tests.agent.scripted import ANSWER, AUSTRIA, LIMITS, TASK, ScriptedPolicy, TableTools, broken, result, search


def run(policy, tools=None, limits=LIMITS, task=TASK, **kwargs):
    return asyncio.run(run_episode(task, policy, tools or TableTools(), limits, **kwargs))


def test_searches_and_answers():
    policy = ScriptedPolicy("<think>I search.</think>\n" + search("capital of Austria"), ANSWER)
    tools, events = TableTools(), []
    trajectory = run(policy, tools, seed=7, on_event=events.append).trajectory
    assert trajectory.finish == Finish.ANSWERED
    assert trajectory.answer == "The capital of Austria is Vienna. \\cite{web_bakotefi}"
    assert [m.role for m in trajectory.messages] == ["system", "user", "assistant", "tool", "assistant"]
    assert trajectory.messages[0].content == "You are a research agent. Today is 2026-06-01."
    assert trajectory.sources()["web_bakotefi"].text == AUSTRIA.text
    assert tools.calls == [("0.0", "batch_web_surfer", {"queries": ["capital of Austria"]})]
    assert tools.budgets["seed"] == 7
    assert trajectory.messages[3].tool_call_id == trajectory.messages[2].tool_calls[0].id == "0.0"
    assert [e.kind for e in events] == ["thought", "call", "observation", "answer", "finish"]
    assert trajectory.stats["turns"] == 2 and trajectory.stats["tool_calls"] == 1
    assert policy.closed and tools.closed


def test_a_trajectory_survives_its_own_json():
    trajectory = run(ScriptedPolicy(search("x"), ANSWER)).trajectory
    assert Trajectory.model_validate_json(trajectory.model_dump_json()) == trajectory


def test_several_calls_of_a_turn_run_in_order_and_are_observed_together():
    policy = ScriptedPolicy(search("a") + "\n" + search("b"), ANSWER)
    tools = TableTools({"a": result("first"), "b": result("second")})
    run(policy, tools)
    assert [c[0] for c in tools.calls] == ["0.0", "0.1"]
    assert policy.observed == [(["first", "second"], "")]


@pytest.mark.parametrize("malformed", ["I wonder.", '<tool_call>\n{"name": \n</tool_call>', ""])
def test_a_malformed_turn_is_answered_with_what_to_write_instead(malformed):
    policy = ScriptedPolicy(malformed, ANSWER)
    tools = TableTools()
    trajectory = run(policy, tools).trajectory
    (texts, _tail) = policy.observed[0]
    assert "Format error" in texts[0] and "<answer>" in texts[0]
    assert trajectory.finish == Finish.ANSWERED and tools.calls == []
    assert trajectory.messages[2].error == "format"
    assert trajectory.stats["format_errors"] == 1 and trajectory.stats["recovered"] == 1


def test_malformed_to_the_end_is_a_format_outcome():
    trajectory = run(ScriptedPolicy(*["hm"] * 4)).trajectory
    assert trajectory.finish == Finish.FORMAT and trajectory.stats["turns"] == 4


def test_the_last_turn_is_told_to_answer_and_calls_in_it_are_not_made():
    policy, tools = ScriptedPolicy(*[search("a")] * 4), TableTools()
    limits = Limits(max_turns=4, max_turn_tokens=50, max_episode_tokens=400, max_tool_calls=9, wall_seconds=5.0)
    trajectory = run(policy, tools, limits).trajectory
    assert [tail for _, tail in policy.observed] == ["", "", "Answer now."]
    assert trajectory.finish == Finish.MAX_TURNS and len(tools.calls) == 3
    assert trajectory.messages[-2].role == "user" and trajectory.messages[-2].content == "Answer now."


def test_a_chinese_episode_is_spoken_to_in_chinese():
    task = Task(id="t2", kind="fact", lang="zh", query="奥地利的首都是什么？", as_of="2026-06-01")
    policy = ScriptedPolicy("嗯", search("a"), search("a"), ANSWER)
    trajectory = run(policy, task=task).trajectory
    assert trajectory.messages[0].content == "你是研究智能体。今天是2026-06-01。"
    assert policy.observed[0][0][0].startswith("格式错误") and policy.observed[-1][1] == "现在回答。"


def test_when_no_call_is_left_the_policy_is_told_and_further_calls_end_the_episode():
    policy = ScriptedPolicy(search("a") + search("b") + search("c"), search("d"))
    tools = TableTools()
    trajectory = run(policy, tools).trajectory
    assert policy.observed[0][1] == "Answer now."
    assert trajectory.finish == Finish.BUDGET and len(tools.calls) == 3


def test_a_refused_call_is_observed_and_exhausts_the_budget():
    policy = ScriptedPolicy(search("a") + search("b") + search("c") + search("d"), ANSWER)
    trajectory = run(policy).trajectory
    assert [m.error for m in trajectory.messages if m.role == "tool"] == [None, None, None, "budget_exhausted"]
    assert trajectory.finish == Finish.ANSWERED


def test_a_tool_error_is_an_observation_and_counts_as_recovered_after_a_good_call():
    tools = TableTools({"bad": result("http://x.test: HTTP 503", "tool_error")})
    trajectory = run(ScriptedPolicy(search("bad"), search("good"), ANSWER), tools).trajectory
    assert trajectory.messages[3].error == "tool_error"
    assert trajectory.stats["tool_errors"] == 1 and trajectory.stats["recovered"] == 1


def test_an_error_nobody_recovered_from_is_not_counted_as_recovered():
    tools = TableTools({"bad": result("no", "bad_arguments")})
    trajectory = run(ScriptedPolicy(*[search("good")] + [search("bad")] * 2, "hm"), tools).trajectory
    assert trajectory.stats["tool_errors"] == 2 and trajectory.stats["recovered"] == 0


def test_turns_are_offered_what_the_context_leaves_and_a_full_context_ends_the_episode():
    policy = ScriptedPolicy(*[search("a")] * 4, context_tokens=330)
    trajectory = run(policy).trajectory
    assert policy.asked == [50] and trajectory.finish == Finish.MAX_TOKENS
    policy = ScriptedPolicy(Turn("<answer>half an ans", "length"), context_tokens=370)
    assert run(policy).trajectory.finish == Finish.MAX_TOKENS and policy.asked == [30]
    assert run(ScriptedPolicy(Turn("", "full"))).trajectory.finish == Finish.MAX_TOKENS


def test_a_turn_cut_by_its_own_limit_is_told_so_and_goes_on():
    policy = ScriptedPolicy(Turn("<think>long long", "length"), ANSWER)
    assert run(policy).trajectory.finish == Finish.ANSWERED
    assert "50 tokens" in policy.observed[0][0][0]


def test_an_answer_beside_calls_is_malformed_and_nothing_is_called():
    policy, tools = ScriptedPolicy(search("a") + "\n" + ANSWER, ANSWER), TableTools()
    trajectory = run(policy, tools).trajectory
    assert trajectory.finish == Finish.ANSWERED and trajectory.stats["format_errors"] == 1
    assert "got both" in policy.observed[0][0][0] and tools.calls == []


def test_a_broken_tool_host_is_infrastructure_not_a_policy_outcome():
    trajectory = run(ScriptedPolicy(search("a")), TableTools({"a": broken()})).trajectory
    assert trajectory.finish == Finish.INFRA_FAILED and not trajectory.finish.is_policy_outcome
    assert "tool host is gone" in trajectory.metadata["cause"]
    assert len(trajectory.messages) == 3


def test_a_broken_engine_is_infrastructure_with_its_cause():
    policy, tools = ScriptedPolicy(RuntimeError("device lost")), TableTools()
    trajectory = run(policy, tools).trajectory
    assert trajectory.finish == Finish.INFRA_FAILED
    assert trajectory.metadata["cause"].startswith("RuntimeError: device lost")
    assert policy.closed and tools.closed


def test_an_engine_that_times_out_by_itself_is_not_mistaken_for_the_wall_clock():
    assert run(ScriptedPolicy(TimeoutError("engine"))).trajectory.finish == Finish.INFRA_FAILED


def test_the_wall_clock_stops_a_hanging_policy():
    limits = Limits(max_turns=4, max_turn_tokens=50, max_episode_tokens=400, max_tool_calls=3, wall_seconds=0.05)
    policy = ScriptedPolicy(asyncio.sleep)
    assert run(policy, limits=limits).trajectory.finish == Finish.WALL_CLOCK
    assert policy.closed


def test_a_cancelled_episode_returns_as_cancelled_and_frees_its_sessions():
    async def cancel():
        policy, tools = ScriptedPolicy(search("a"), asyncio.sleep), TableTools()
        started = asyncio.Event()
        episode = asyncio.create_task(
            run_episode(TASK, policy, tools, LIMITS, on_event=lambda e: e.kind == "observation" and started.set())
        )
        await started.wait()
        episode.cancel()
        return (await episode).trajectory, policy, tools

    trajectory, policy, tools = asyncio.run(cancel())
    assert trajectory.finish == Finish.CANCELLED and len(trajectory.messages) == 4
    assert policy.closed and tools.closed


def test_limits_must_be_positive():
    with pytest.raises(ValueError, match="max_turns"):
        Limits(max_turns=0, max_turn_tokens=1, max_episode_tokens=1, max_tool_calls=1, wall_seconds=1)
