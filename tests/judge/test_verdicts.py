"""Facts about the mappings and the reward."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from stepdr_jax.judge import verdicts
from stepdr_jax.records import Judgment


def judgment(rid, weight, verdict):
    return Judgment(rid=rid, weight=weight, role="negative" if weight < 0 else "explicit", verdict=verdict, score=None)


@pytest.mark.parametrize(
    "role, verdict, strict, ternary",
    [
        ("explicit", "satisfied", 1, 1),
        ("explicit", "partial", 0, 0.5),
        ("implicit", "not_satisfied", 0, 0),
        ("negative", "satisfied", 1, 1),
        ("negative", "partial", 1, 0.5),  # a partial flaw is a flaw
        ("negative", "not_satisfied", 0, 0),
        ("explicit", "error", None, None),
        ("negative", "error", None, None),  # a failed judge must not pass a negative rubric
    ],
)
def test_mappings(role, verdict, strict, ternary):
    assert verdicts.strict_score(role, verdict) == strict
    assert verdicts.ternary_score(role, verdict) == ternary


def test_an_unknown_verdict_is_refused():
    with pytest.raises(ValueError, match="maybe"):
        verdicts.strict_score("explicit", "maybe")


def test_the_reward_is_the_weighted_sum_over_positive_weight_and_keeps_fractions():
    rows = [judgment("a", 5, "satisfied"), judgment("b", 3, "not_satisfied"), judgment("c", -2, "not_satisfied")]
    assert verdicts.aggregate_reward(rows) == 5 / 8
    rows[2] = judgment("c", -2, "partial")
    assert verdicts.aggregate_reward(rows) == 3 / 8
    assert verdicts.aggregate_reward(rows, "ternary") == 4 / 8


def test_failed_verdicts_leave_both_sums():
    rows = [judgment(str(i), 1, "satisfied") for i in range(9)] + [judgment("x", 1, "error")]
    assert verdicts.aggregate_reward(rows) == 1.0


def test_too_many_failed_verdicts_give_no_reward_rather_than_zero():
    rows = [judgment("a", 1, "satisfied"), judgment("b", 1, "error")]
    assert verdicts.aggregate_reward(rows) is None
    assert verdicts.aggregate_reward(rows, max_missing=0.5) == 1.0
    assert verdicts.aggregate_reward([]) is None


def test_the_floor_is_clipped_only_on_request():
    rows = [judgment("a", 1, "not_satisfied"), judgment("b", -2, "satisfied")]
    assert verdicts.aggregate_reward(rows) == -2.0
    assert verdicts.aggregate_reward(rows, clip=True) == 0.0


def test_a_fatal_flaw_zeroes_the_reward():
    rows = [judgment("a", 5, "satisfied"), judgment("f", -1, "satisfied")]
    assert verdicts.aggregate_reward(rows, fatal={"f"}) == 0.0
    rows[1] = judgment("f", -1, "not_satisfied")
    assert verdicts.aggregate_reward(rows, fatal={"f"}) == 1.0


def test_a_fatal_rubric_without_a_verdict_leaves_the_report_without_a_reward():
    rows = [judgment(str(i), 1, "satisfied") for i in range(19)] + [judgment("f", -1, "error")]
    assert verdicts.aggregate_reward(rows) == 1.0
    assert verdicts.aggregate_reward(rows, fatal={"f"}) is None


@given(
    st.lists(
        st.tuples(st.integers(-5, 5).filter(bool), st.sampled_from(["satisfied", "partial", "not_satisfied"])),
        min_size=1,
        max_size=12,
    )
)
def test_the_reward_never_exceeds_one(rows):
    reward = verdicts.aggregate_reward([judgment(str(i), w, v) for i, (w, v) in enumerate(rows)])
    assert reward is None or reward <= 1.0
