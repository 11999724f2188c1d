"""Shares of well-formed tool calls, answers and citations."""

import pytest

from stepdr_jax.evaluation import format_checks
from stepdr_jax.records import Finish, Message, Trajectory
from stepdr_jax.tokens import chat

CALL = chat.tool_call_text("batch_web_surfer", {"queries": ["x"]})


def episode(*turns, answer=None, finish=Finish.ANSWERED):
    messages = [Message(role="user", content="?")] + [Message(role="assistant", content=turn) for turn in turns]
    return Trajectory(id="t", task_id="t", policy="p", messages=messages, answer=answer, finish=finish)


def test_what_is_broken_counts_against_its_own_check_only():
    text = r"Oslo. \cite{web_abcdefgh, web_hgfedcba}"
    good = episode(CALL, f"<answer>{text}</answer>", answer=text)
    broken_call = episode("<tool_call>{oops</tool_call>", finish=Finish.FORMAT)
    chatter = episode(CALL, "I think so.", finish=Finish.MAX_TURNS)
    text = r"Bergen \cite{page 3} and \cite web_abcdefgh and \cite{web_abcdefgh}"
    bad_marks = episode(f"<answer>{text}</answer>", answer=text)
    lost = episode(CALL, finish=Finish.INFRA_FAILED)
    found = format_checks.shares([good, broken_call, chatter, bad_marks, lost])
    assert found == pytest.approx(
        dict(tool_calls=3 / 4, turns=5 / 7, answer=2 / 4, citations=2 / 4, cited_answers=1.0), nan_ok=False
    )


def test_nothing_to_judge_is_no_share():
    assert set(format_checks.shares([]).values()) == {None}
    assert format_checks.shares([episode("<answer>Oslo</answer>", answer="Oslo")])["citations"] is None
