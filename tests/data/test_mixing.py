"""Facts about mixtures: exact shares of tokens, an order independent of other rates, positions found without replay."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from stepdr_jax.data import mixing, rates
from stepdr_jax.errors import UserError

RATES = {"a": 0.37, "b": 0.29, "c": 0.2, "d": 0.1, "e": 0.04}
CONTEXT = 4096


def fills(seed: int = 0) -> dict[str, np.ndarray]:
    """Tokens in each row of components whose rows are filled very differently: 55 % to 100 %."""
    rng = np.random.default_rng(seed)
    means = dict(a=0.99, b=0.55, c=0.8, d=0.97, e=0.7)
    return {n: (CONTEXT * rng.uniform(2 * m - 1 if m > 0.5 else 0, 1, 4000)).astype(int) for n, m in means.items()}


def drawn(schedule: mixing.BatchSchedule, steps: int) -> tuple[np.ndarray, np.ndarray]:
    return tuple(
        np.concatenate(part) for part in zip(*(schedule.sequences(step) for step in range(steps)), strict=True)
    )


def orders(tokens: dict[str, np.ndarray], seed: int = 0) -> dict[str, mixing.ComponentOrder]:
    return {name: mixing.ComponentOrder(rows, seed + number) for number, (name, rows) in enumerate(tokens.items())}


def even(names: str, rows: int = 50, tokens: int = 6) -> dict[str, mixing.ComponentOrder]:
    return orders({name: np.full(rows, tokens) for name in names})


def of_component(drawn_rows: tuple[np.ndarray, np.ndarray], index: int) -> np.ndarray:
    return drawn_rows[1][drawn_rows[0] == index]


def test_shares_of_tokens_equal_the_rates_within_a_thousandth_over_ten_million_tokens():
    tokens = fills()
    component, row = drawn(mixing.BatchSchedule([(0, RATES)], orders(tokens), batch_size=8), 400)
    read = np.asarray([tokens[name][row[component == i]].sum() for i, name in enumerate(tokens)], float)
    assert 9e6 < read.sum() < 11e6
    assert np.abs(read / read.sum() - list(RATES.values())).max() < 1e-3
    counts = np.bincount(component) / len(component)
    assert np.abs(counts - list(RATES.values())).max() > 0.02  # shares of rows would have missed


def test_an_epoch_has_every_row_once_and_the_next_one_has_another_order():
    order = mixing.ComponentOrder(np.arange(1, 101), seed=3, ids_N=np.arange(1000, 1100))
    rows, _ = order.draws(0, 200)
    assert sorted(rows[:100]) == sorted(rows[100:]) == list(range(1000, 1100))
    assert rows[:100].tolist() != rows[100:].tolist()


def test_changing_one_rate_changes_nothing_in_the_order_within_any_component():
    tokens = fills()
    one = drawn(mixing.BatchSchedule([(0, RATES)], orders(tokens), batch_size=8), 300)
    other = drawn(mixing.BatchSchedule([(0, RATES | {"b": 0.6})], orders(tokens), batch_size=8), 300)
    assert not np.array_equal(one[0], other[0])
    for index in range(len(RATES)):
        shorter = min(len(of_component(one, index)), len(of_component(other, index)))
        assert shorter > 50 and np.array_equal(of_component(one, index)[:shorter], of_component(other, index)[:shorter])


@settings(deadline=None, max_examples=40)
@given(
    st.lists(st.tuples(st.floats(0.01, 100), st.integers(1, 30), st.integers(1, 9)), min_size=1, max_size=5),
    st.integers(0, 5000),
    st.integers(0, 99),
)
def test_counts_add_up_at_any_position_and_are_those_of_the_rows(components, rows, seed):
    rng = np.random.default_rng(seed)
    mixed = [mixing.ComponentOrder(rng.integers(1, 1 + most, count), seed) for _, count, most in components]
    merge = mixing.MergedOrder(mixed, [rate for rate, *_ in components], [0] * len(components))
    counts = merge.counts(rows)
    assert sum(counts) == rows
    drawn_rows = [np.concatenate(part) for part in zip(merge._block(0), merge._block(1), strict=True)]
    assert np.bincount(drawn_rows[0][:rows], minlength=len(components)).tolist() == counts
    for index, order in enumerate(mixed):
        mine = of_component(tuple(drawn_rows), index)
        assert np.array_equal(mine, order.draws(0, len(mine))[0])


def test_rates_change_at_their_step_and_every_component_goes_on_where_it_was():
    stages = rates.rate_schedule({"a": 1.0, "b": 1.0}, mixture_schedule=[(10, {"b": 0.0, "c": 3.0}), (20, {"b": 2.0})])
    assert stages == [(0, dict(a=1.0, b=1.0)), (10, dict(a=1.0, c=3.0)), (20, dict(a=1.0, b=2.0, c=3.0))]
    schedule = mixing.BatchSchedule(stages, even("abc"), batch_size=12)
    component, row = drawn(schedule, 30)
    shares = [np.bincount(part, minlength=3).tolist() for part in np.split(component, 3)]
    assert shares == [[60, 60, 0], [30, 0, 90], [20, 40, 60]]
    for index, order in enumerate(even("abc").values()):
        mine = row[component == index]
        assert np.array_equal(mine, order.draws(0, len(mine))[0])


def test_warm_up_data_comes_before_the_rates_that_hold_after_it():
    assert rates.rate_schedule({"a": 1, "b": 1}, [(3, {"b": 2}), (9, {"b": 3})], ("a", 5)) == [
        (0, {"a": 1.0}),
        (5, {"a": 1, "b": 2}),
        (9, {"a": 1, "b": 3}),
    ]


@pytest.mark.parametrize(
    "mixture_schedule, words", [([(5,)], "expected .step, dict"), ([(5, {}), (5, {})], "steps that ascend")]
)
def test_wrong_changes_of_rates_are_named(mixture_schedule, words):
    with pytest.raises(UserError, match=words):
        rates.rate_schedule({"a": 1.0}, mixture_schedule, stage="sft")


def test_a_position_far_on_is_found_without_going_there():
    schedule = mixing.BatchSchedule([(0, RATES)], orders(fills()), batch_size=8)
    component, row = schedule.sequences(10**9)
    assert len(component) == 8
    assert np.array_equal(
        component, mixing.BatchSchedule([(0, RATES)], orders(fills()), batch_size=8).sequences(10**9)[0]
    )
