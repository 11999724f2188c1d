"""Rotary position embedding, in the rotate-half convention of Qwen2.5.

Dimension i of a head is rotated together with dimension i + K/2, at the angle position * theta^(-2i/K).
"""

import jax
import jax.numpy as jnp


def rope_tables(positions_BT: jax.Array, head_dim: int, theta: float) -> tuple[jax.Array, jax.Array]:
    """Returns (cos, sin), each float32[B, T, K/2]; compute once per step and share over layers and heads."""
    exponent = jnp.arange(0, head_dim, 2, dtype=jnp.float32) / head_dim
    angle_BTk = positions_BT[..., None].astype(jnp.float32) / (theta**exponent)
    return jnp.cos(angle_BTk), jnp.sin(angle_BTk)


def apply_rope(x_BTHK: jax.Array, cos_BTk: jax.Array, sin_BTk: jax.Array) -> jax.Array:
    """Rotates every head of `x`; the angles are applied in float32, the result has x's dtype."""
    half = x_BTHK.shape[-1] // 2
    cos = jnp.concatenate([cos_BTk, cos_BTk], axis=-1)[:, :, None]
    sin = jnp.concatenate([-sin_BTk, sin_BTk], axis=-1)[:, :, None]
    x32 = x_BTHK.astype(jnp.float32)
    return (x32 * cos + jnp.roll(x32, half, axis=-1) * sin).astype(x_BTHK.dtype)
