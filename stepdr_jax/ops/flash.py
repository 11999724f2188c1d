"""Attention that never holds all scores: what a kernel is, how partial results merge, the gradient on one device.

A kernel computes attention between any queries and any keys and says how much probability it saw (the log-sum-exp of
each query's scores), so that results over parts of the keys merge exactly. Arrays are heads-major here: q_BHTK, k_BNSK.
Queries come scaled. Fully masked rows are legal: their log-sum-exp is so low that they vanish in any merge.

Shape suffixes: B sequences, T tokens (of queries), S tokens of keys, H query heads, N key-value heads, K head
dimension.
"""

import functools
from collections.abc import Callable
from typing import NamedTuple, cast

import jax
import jax.numpy as jnp
import numpy as np
from jax.ad_checkpoint import checkpoint_name

MASKED = -1e30  # finite: a row that is wholly masked in one part of the keys must not produce NaN


class Rows(NamedTuple):
    """Causal order where the keys lie in row order: query t of `device` sees keys 0 to table[device, t].

    table: numpy int32[devices, T], rising along T. device: which one this is; an int or a traced int32.
    """

    table: np.ndarray
    device: jax.Array | int = 0


class Positions(NamedTuple):
    """Causal order of tokens that lie anyhow: a query sees keys whose position is not after its own; int32[B, T or
    S]."""

    queries: jax.Array
    keys: jax.Array


Order = Rows | Positions | None  # None: every key of the query's segment


def in_order(length: int) -> Rows:
    """Queries and keys are the same `length` tokens in row order."""
    return Rows(np.arange(length, dtype=np.int32)[None])


class Kernel(NamedTuple):
    """One implementation of attention and of its gradient.

    forward(q_BHTK, k_BNSK, v_BNSK, query_segments_BT, key_segments_BS, order)
        -> o_BHTK in float32 or q's dtype, logsumexp float32[B, H, T]
    backward(same six, g_BHTK, logsumexp_BHT, offset_BHT)
        -> gradients of q, k, v in float32 or their dtype. `logsumexp` is over all keys, also those of other calls;
        offset = sum(g * o) over the head dimension, o the merged output.
    """

    forward: Callable
    backward: Callable


def merge(*parts: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
    """Joins (o_BHTK, logsumexp_BHT) over disjoint sets of keys, in float32."""
    largest = functools.reduce(jnp.maximum, (lse for _, lse in parts))
    weights = [jnp.exp(lse - largest) for _, lse in parts]
    total = sum(weights)
    o = sum((w / total)[..., None] * o.astype(jnp.float32) for w, (o, _) in zip(weights, parts, strict=True))
    return cast(jax.Array, o), largest + jnp.log(total)


def tag(o: jax.Array, lse: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Names what the backward pass needs, so that a remat policy can keep it and skip a second forward pass."""
    return checkpoint_name(o, "attention_out"), checkpoint_name(lse, "attention_lse")


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def flash(kernel: Kernel, causal: bool, q_BHTK, k_BNSK, v_BNSK, query_segments_BT, key_segments_BS, positions=None):
    """o_BHTK in q's dtype. `causal`: in row order, or by `positions` (see Positions) when given."""
    return _flash_forward(kernel, causal, q_BHTK, k_BNSK, v_BNSK, query_segments_BT, key_segments_BS, positions)[0]


def _order(causal, q_BHTK, positions) -> Order:
    if positions is not None:
        return positions
    return in_order(q_BHTK.shape[2]) if causal else None


def _flash_forward(kernel, causal, q_BHTK, k_BNSK, v_BNSK, query_segments_BT, key_segments_BS, positions=None):
    arguments = (q_BHTK, k_BNSK, v_BNSK, query_segments_BT, key_segments_BS)
    o_BHTK, lse_BHT = kernel.forward(*arguments, _order(causal, q_BHTK, positions))
    o_BHTK, lse_BHT = tag(o_BHTK.astype(q_BHTK.dtype), lse_BHT)
    return o_BHTK, (arguments, positions, o_BHTK, lse_BHT)


def output_offset(g_BHTK: jax.Array, o_BHTK: jax.Array) -> jax.Array:
    """sum(g * o) of each query, float32[B, H, T]."""
    return jnp.einsum("BHTK,BHTK->BHT", g_BHTK, o_BHTK, preferred_element_type=jnp.float32)


def _flash_backward(kernel, causal, saved, g_BHTK):
    arguments, positions, o_BHTK, lse_BHT = saved
    order = _order(causal, arguments[0], positions)
    g_qkv = kernel.backward(*arguments, order, g_BHTK, lse_BHT, output_offset(g_BHTK, o_BHTK))
    return *(g.astype(x.dtype) for g, x in zip(g_qkv, arguments[:3], strict=True)), None, None, None


flash.defvjp(_flash_forward, _flash_backward)
