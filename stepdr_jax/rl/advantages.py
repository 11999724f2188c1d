"""Advantages over sampled tokens, selected by one action mask; observation tokens are skipped.

Shape suffixes: B episodes, T tokens of an episode, M tokens under a mask. Arrays are indexed by token: at a sampled
token t, `values` is the critic's value of the state in which t was sampled, i.e. of tokens 0..t-1. Values at observed
tokens have no influence on any result.
"""

import jax
import jax.numpy as jnp
import numpy as np


def place_rewards(rewards_B: np.ndarray, action_mask_BT: np.ndarray) -> np.ndarray:
    """float32[B, T]: an episode's reward at its last sampled token, 0 elsewhere; rows without a sampled token stay 0.

    The last *sampled* token: an episode may end in an observation, and a reward placed there would be lost.
    """
    B, T = action_mask_BT.shape
    last_B = T - 1 - np.argmax(action_mask_BT[:, ::-1], axis=1)
    placed_BT = np.zeros((B, T), np.float32)
    placed_BT[np.arange(B), last_B] = np.asarray(rewards_B, np.float32)
    return np.where(action_mask_BT, placed_BT, np.float32(0))


@jax.jit
def gae(rewards_BT, values_BT, action_mask_BT, gamma, lam) -> tuple[jax.Array, jax.Array]:
    """Generalised advantage estimation along the sampled tokens of each row.

    Time counts sampled tokens: after a turn's last token comes the next turn's first one, however long the observation
    between them. After the last sampled token the value is 0 (the episode has ended). With
    gamma = lam = 1 an advantage is the return minus the value.

    Args:
        rewards_BT: float32, as `place_rewards` gives.
        values_BT: float32; read at sampled tokens only.
        action_mask_BT: bool, true at sampled tokens of episodes that count.
        gamma, lam: discount and trace decay per sampled token.

    Returns:
        (advantages_BT, returns_BT) float32, zero at observed tokens; returns = advantages + values.
    """
    rewards_BT = jnp.where(action_mask_BT, rewards_BT, 0.0).astype(jnp.float32)
    values_BT = jnp.where(action_mask_BT, values_BT, 0.0).astype(jnp.float32)

    def back(carry, column):
        next_value_B, trace_B = carry
        reward_B, value_B, action_B = column
        delta_B = reward_B + gamma * next_value_B - value_B
        advantage_B = delta_B + gamma * lam * trace_B
        carry = (jnp.where(action_B, value_B, next_value_B), jnp.where(action_B, advantage_B, trace_B))
        return carry, jnp.where(action_B, advantage_B, 0.0)

    zeros_B = jnp.zeros(rewards_BT.shape[0], jnp.float32)
    columns = (rewards_BT.T, values_BT.T, action_mask_BT.T)
    _, advantages_TB = jax.lax.scan(back, (zeros_B, zeros_B), columns, reverse=True)
    advantages_BT = advantages_TB.T
    return advantages_BT, advantages_BT + values_BT


def whiten(values_BT: np.ndarray, mask_BT: np.ndarray) -> np.ndarray:
    """float32[B, T] with mean 0 and deviation 1 over the mask, 0 outside it. Open-Reasoner-Zero: over the whole batch.

    Fewer than two values, or values that are all alike, are only centred.
    """
    kept_M = values_BT[mask_BT].astype(np.float64)
    if kept_M.size == 0:
        return np.zeros(values_BT.shape, np.float32)
    deviation = max(float(np.sqrt(np.maximum(kept_M.var(), 1e-8))), 1e-4) if kept_M.size > 1 else 1.0
    return np.where(mask_BT, (values_BT - kept_M.mean()) / deviation, 0.0).astype(np.float32)


def explained_variance(values_BT: np.ndarray, returns_BT: np.ndarray, mask_BT: np.ndarray) -> float:
    """1 - Var(returns - values) / Var(returns) over the mask: 1 perfect, 0 no better than a constant, or undefined."""
    returns_M = returns_BT[mask_BT].astype(np.float64)
    if returns_M.size == 0 or returns_M.var() < 1e-12:
        return 0.0
    return float(1.0 - (returns_M - values_BT[mask_BT]).var() / returns_M.var())
