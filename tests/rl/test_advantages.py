"""Advantages: closed forms, and that given tokens do not exist."""

import numpy as np
import pytest

from stepdr_jax.rl import advantages

RNG = np.random.default_rng(0)
# Three episodes: prompt, turn, observation, turn; one that ends in an observation; one without any sampled token.
MASK = np.zeros((3, 12), bool)
MASK[0, [3, 4, 5, 9, 10, 11]] = True
MASK[1, [2, 3, 7, 8]] = True
REWARDS = np.array([0.75, -0.5, 1.0], np.float32)
VALUES = RNG.normal(size=MASK.shape).astype(np.float32)


def run(values, gamma=1.0, lam=1.0, mask=MASK, rewards=REWARDS):
    placed = advantages.place_rewards(rewards, mask)
    return [np.asarray(x) for x in advantages.gae(placed, values, mask, gamma, lam)]


def test_a_fractional_reward_lands_whole_on_the_last_sampled_token():
    placed = advantages.place_rewards(np.array([0.75, 0.3, 1.0]), MASK)
    assert placed.dtype == np.float32
    assert placed[0, 11] == np.float32(0.75)
    assert placed[1, 8] == np.float32(0.3)  # not at 11, where the observation ends
    assert np.count_nonzero(placed) == 2  # the row without a sampled token gets none


def test_with_gamma_and_lambda_one_an_advantage_is_return_minus_value():
    got, returns = run(VALUES)
    np.testing.assert_allclose(got, np.where(MASK, REWARDS[:, None] - VALUES, 0), atol=1e-6)
    np.testing.assert_allclose(returns, np.where(MASK, REWARDS[:, None], 0), atol=1e-6)


@pytest.mark.parametrize(("gamma", "lam"), [(1.0, 0.95), (0.9, 0.8), (0.99, 0.0)])
def test_skipping_given_tokens_equals_deleting_them(gamma, lam):
    got, _ = run(VALUES, gamma, lam)
    for row in (0, 1):
        at = np.flatnonzero(MASK[row])
        expected = np.zeros(len(at))
        trace, next_value = 0.0, 0.0
        for i in reversed(range(len(at))):
            reward = REWARDS[row] if i == len(at) - 1 else 0.0
            delta = reward + gamma * next_value - VALUES[row, at[i]]
            trace = expected[i] = delta + gamma * lam * trace
            next_value = VALUES[row, at[i]]
        np.testing.assert_allclose(got[row, at], expected, atol=1e-5)


def test_the_value_of_a_chain_is_credited_to_the_step_that_changed_it():
    """A chain with known values: only the second action matters, and only it has an advantage."""
    mask = np.array([[False, True, False, True, True]])
    values = np.array([[9.0, 0.5, 9.0, 0.5, 1.0]], np.float32)  # V before each sampled token; 9 must not be read
    got, _ = run(values, 1.0, 0.0, mask, np.array([1.0]))
    np.testing.assert_allclose(got, [[0, 0, 0, 0.5, 0]])


@pytest.mark.parametrize(("gamma", "lam"), [(1.0, 1.0), (0.9, 0.8)])
def test_what_stands_at_given_tokens_changes_nothing(gamma, lam):
    disturbed = np.where(MASK, VALUES, np.nan).astype(np.float32)
    for a, b in zip(run(VALUES, gamma, lam), run(disturbed, gamma, lam), strict=True):
        np.testing.assert_array_equal(a, b)


def test_a_row_without_sampled_tokens_is_zero():
    got, returns = run(VALUES, 0.9, 0.9)
    assert not got[2].any() and not returns[2].any()


def test_whitening_sees_the_mask_only():
    values = RNG.normal(3, 5, MASK.shape).astype(np.float32)
    white = advantages.whiten(values, MASK)
    assert abs(white[MASK].mean()) < 1e-6 and abs(white[MASK].std() - 1) < 1e-5
    assert not white[~MASK].any()
    np.testing.assert_array_equal(white, advantages.whiten(np.where(MASK, values, np.nan), MASK))


def test_whitening_of_equal_values_or_none_is_zero():
    assert not advantages.whiten(np.full(MASK.shape, 0.7, np.float32), MASK).any()
    assert not advantages.whiten(VALUES, np.zeros_like(MASK)).any()


def test_explained_variance():
    returns = np.where(MASK, RNG.normal(size=MASK.shape), 0)
    assert advantages.explained_variance(returns, returns, MASK) == 1.0
    assert abs(advantages.explained_variance(np.zeros_like(returns), returns, MASK)) < 1e-12
    assert advantages.explained_variance(VALUES, np.ones(MASK.shape), MASK) == 0.0
