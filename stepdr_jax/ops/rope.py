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
    first, second = jnp.split(x_BTHK.astype(jnp.float32), 2, axis=-1)
    cos, sin = cos_BTk[:, :, None, :], sin_BTk[:, :, None, :]
    rotated = jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)
    return rotated.astype(x_BTHK.dtype)
