"""Rotary position embedding, in the rotate-half convention of Qwen2.5.

Dimension i of a head is rotated together with dimension i + K/2, at the angle position * theta^(-2i/K).

Shape suffixes: B sequences, T tokens (of queries), H query heads, K head dimension, k = K / 2.
"""

import math

import jax
import jax.numpy as jnp
import numpy as np

FAST, SLOW = 32, 1  # turns in the original context: YaRN leaves faster pairs alone and stretches slower ones in full


def rope_tables(
    positions_BT: jax.Array,
    head_dim: int,
    theta: float,
    *,
    yarn_factor: float = 1.0,
    original_context: int = 32768,
) -> tuple[jax.Array, jax.Array]:
    """Returns (cos, sin), each float32[B, T, K/2]; compute once per step and share over layers and heads.

    Args:
        positions_BT: integer positions inside each segment.
        head_dim: K.
        theta: base of the wavelengths.
        yarn_factor: above 1, YaRN: angles cover original_context * yarn_factor tokens, and cos and sin carry the factor
            on attention scores (so that apply_rope of q and of k together scale them by its square).
        original_context: tokens that the model was trained on before it was stretched.
    """
    rate_k, amplitude = _rates(head_dim, theta, yarn_factor, original_context)
    angle_BTk = positions_BT[..., None].astype(jnp.float32) * rate_k
    return jnp.cos(angle_BTk) * amplitude, jnp.sin(angle_BTk) * amplitude


def _rates(head_dim: int, theta: float, yarn_factor: float, original_context: int) -> tuple[np.ndarray, float]:
    """(radians per token float32[K/2], factor of cos and sin).

    YaRN (arXiv 2309.00071, section 3.4, with the rounding of transformers): a pair that turns more than FAST times in
    the original context keeps its rate, one that turns less than SLOW times is slowed by the whole factor, a linear
    ramp over the index of the pair lies between.
    """
    half = head_dim // 2
    rate_k = theta ** -(np.arange(half) / half)
    if yarn_factor <= 1:
        return rate_k.astype(np.float32), 1.0

    def pair_that_turns(times: float) -> float:
        return half * math.log(original_context / (times * 2 * math.pi)) / math.log(theta)

    first = max(math.floor(pair_that_turns(FAST)), 0)
    last = min(math.ceil(pair_that_turns(SLOW)), head_dim - 1)
    slowed_k = np.clip((np.arange(half) - first) / (last - first or 0.001), 0, 1)
    rate_k = rate_k * (1 - slowed_k) + rate_k / yarn_factor * slowed_k
    return rate_k.astype(np.float32), 0.1 * math.log(yarn_factor) + 1


def apply_rope(x_BTHK: jax.Array, cos_BTk: jax.Array, sin_BTk: jax.Array) -> jax.Array:
    """Rotates every head of `x`; the angles are applied in float32, the result has x's dtype."""
    half = x_BTHK.shape[-1] // 2
    cos = jnp.concatenate([cos_BTk, cos_BTk], axis=-1)[:, :, None]
    sin = jnp.concatenate([-sin_BTk, sin_BTk], axis=-1)[:, :, None]
    x32 = x_BTHK.astype(jnp.float32)
    return (x32 * cos + jnp.roll(x32, half, axis=-1) * sin).astype(x_BTHK.dtype)
