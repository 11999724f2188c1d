"""Facts about the reflection loop and about episodes that come out of it."""

import asyncio

from stepdr_jax.records import Finish, Verdict
from stepdr_jax.synthesis import reflection
from tests.synthesis.episodes import PASSAGE, SOURCE, TASK, episode, search, shown

WRONG = r"The capital of Austria is Budapest. \cite{web_dufalomi}"
RIGHT = PASSAGE + r" \cite{web_bakotefi}"
SAID = "According to the feedback my answer is incorrect. I check the capital of Austria."


class Named:
    name = "expert"

    def start(self, messages, *, episode_id, seed):
        self.told = messages
        return None


def first():
    return episode(search(0, "capital of Austria"), shown(0), answer=WRONG, id="first", stats={"tool_calls": 1.0})


def second():
    return episode(search(0, "Austria", SAID), shown(0), answer=RIGHT, id="second", stats={"tool_calls": 1.0})


def test_the_history_is_kept_and_only_told_to_be_wrong():
    policy = Named()
    start = first().messages[:2]
    reflection.ContinuedPolicy(policy, first(), reflection.REFLECT["en"]).start(start, episode_id="e", seed=0)
    assert [m.role for m in policy.told] == ["system", "user", "assistant", "user", "assistant", "user"]
    assert policy.told[3].content.startswith("<tool_response>\n") and SOURCE.text in policy.told[3].content
    assert "Vienna" not in policy.told[-1].content


def test_a_corrected_episode_looks_spontaneous():
    merged = reflection.merge_attempts(first(), second(), "en")
    assert [m.role for m in merged.messages] == [
        "system",
        "user",
        "assistant",
        "tool",
        "assistant",
        "tool",
        "assistant",
    ]
    assert merged.messages[4].content.startswith(
        "<think>The capital of Austria is Budapest. Is that right? I check the capital of Austria.</think>\n<tool_call>"
    )
    assert merged.answer == RIGHT and merged.stats["tool_calls"] == 2.0 and merged.stats["turns"] == 3.0
    assert not reflection.has_induction(merged)
    assert [c.id for m in merged.messages for c in m.tool_calls] == ["0.0", "1.0"]
    assert [m.tool_call_id for m in merged.messages if m.role == "tool"] == ["0.0", "1.0"]
    assert first().messages[-1].content == f"<answer>{WRONG}</answer>"  # the attempts themselves are not changed


def solve(answers, max_reflections=3, finish=Finish.ANSWERED, reward=1.0):
    """Runs the loop with an episode per answer; returns the result and the attempts made."""
    attempts = []

    async def run(policy, attempt):
        attempts.append(attempt)
        return episode(search(0, f"capital of Austria {attempt}"), shown(0), answer=answers[attempt], finish=finish)

    async def judge(trajectory):
        right = trajectory.answer == RIGHT
        return Verdict(reward=reward if right or reward is None else 0.0, judgments=[], correct=right)

    result = asyncio.run(
        reflection.solve_with_reflection(
            "en", lambda attempt: Named(), run, judge, lambda v: bool(v.correct), max_reflections
        )
    )
    return *result, attempts


def test_a_correct_first_attempt_is_left_alone():
    trajectory, verdict, attempts = solve([RIGHT])
    assert attempts == [0] and trajectory.attempt == 0 and verdict.correct
    assert trajectory.messages[1].content == TASK.query


def test_the_loop_ends_at_the_first_correct_attempt_or_after_three_reflections():
    trajectory, verdict, attempts = solve([WRONG, WRONG, RIGHT, RIGHT])
    assert attempts == [0, 1, 2] and trajectory.attempt == 2 and verdict.correct
    trajectory, verdict, attempts = solve([WRONG] * 5)
    assert attempts == [0, 1, 2, 3] and not verdict.correct


def test_a_failed_judge_or_episode_is_not_reflected_on():
    assert solve([WRONG] * 4, reward=None)[2] == [0]
    assert solve([WRONG] * 4, finish=Finish.INFRA_FAILED)[2] == [0]
