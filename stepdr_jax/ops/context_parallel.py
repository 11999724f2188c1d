"""Attention over sequences that are split over the mesh axis `context`; the layout is context_layout's.

Either way a device's tokens lie in row order and positions restart and rise with each segment, so row order within a
segment is causality, and no positions need to travel. What each strategy costs: docs/long_context.md.

Shape suffixes: B sequences, T tokens (of queries), S tokens of keys, H query heads, N key-value heads, K head
dimension.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from stepdr_jax.ops.attention import kernel
from stepdr_jax.ops.context_layout import check_layout, choose, hop_pairs, zigzag_order
from stepdr_jax.ops.flash import Rows, flash, output_offset, tag
from stepdr_jax.ops.ring import Ring, ring_attention

__all__ = ["check_layout", "choose", "context_attention", "hop_pairs", "zigzag_order"]


def context_attention(
    q_BTHK: jax.Array,
    k_BTNK: jax.Array,
    v_BTNK: jax.Array,
    positions_BT: jax.Array,
    segment_ids_BT: jax.Array,
    *,
    strategy: str,
    axis: str = "context",
    axis_size: int,
    zigzag: bool,
    backend: str = "auto",
    barrier: bool = True,
) -> jax.Array:
    """Causal attention within segments of rows split over mesh axis `axis`; call it inside shard_map.

    Args:
        q_BTHK, k_BTNK, v_BTNK: this device's T = L / axis_size tokens; H is a multiple of N.
        positions_BT, segment_ids_BT: int32; positions rise along each segment of the row, segment 0 is padding.
        strategy: `ring` passes keys from neighbour to neighbour under the kernels; `all_gather` gathers all keys;
            `ulysses` exchanges heads for sequence; `none` only with axis_size 1.
        zigzag: the layout of the row, see zigzag_order.
        backend: kernel, `blockwise`, `splash` or `auto`.
        barrier: False removes what makes the ring's transfers overlap; for tests of the schedule.

    Returns:
        o_BTHK in q's dtype. It and the log-sum-exp are named `attention_out` and `attention_lse` for remat policies.
    """
    del positions_BT  # row order says the same, see above
    T = q_BTHK.shape[1]
    check_layout(
        T * axis_size,
        q_BTHK.shape[2],
        k_BTNK.shape[2],
        strategy=strategy,
        axis_size=axis_size,
        zigzag=zigzag,
        backend=backend,
    )
    chosen = kernel(backend)
    q_BHTK = jnp.swapaxes(q_BTHK * q_BTHK.shape[-1] ** -0.5, 1, 2)
    k_BNTK, v_BNTK = jnp.swapaxes(k_BTNK, 1, 2), jnp.swapaxes(v_BTNK, 1, 2)
    ring = Ring(axis, axis_size, zigzag, barrier)
    if axis_size == 1:
        o_BHTK = flash(chosen, True, q_BHTK, k_BNTK, v_BNTK, segment_ids_BT, segment_ids_BT)
    elif strategy == "ring":
        o_BHTK = ring_attention(chosen, ring, q_BHTK, k_BNTK, v_BNTK, segment_ids_BT)
    elif strategy == "all_gather":
        o_BHTK = _gathered(chosen, ring, q_BHTK, k_BNTK, v_BNTK, segment_ids_BT)
    else:
        o_BHTK = _ulysses(chosen, ring, q_BHTK, k_BNTK, v_BNTK, segment_ids_BT)
    return jnp.swapaxes(o_BHTK, 1, 2)


def _to_row(ring: Ring, x):
    """[n, B, M, T, ...] of all shards -> [B, M, L, ...] in row order."""
    if ring.zigzag:
        low, high = jnp.split(x, 2, axis=3)
        x = jnp.concatenate((low, high[::-1]), axis=0)
    x = jnp.moveaxis(x, 0, 2)
    return x.reshape(*x.shape[:2], -1, *x.shape[4:])


def _to_shards(ring: Ring, x):
    """The inverse of _to_row."""
    chunks = 2 * ring.size if ring.zigzag else ring.size
    x = jnp.moveaxis(x.reshape(*x.shape[:2], chunks, -1, *x.shape[3:]), 2, 0)
    if ring.zigzag:
        low, high = jnp.split(x, 2, axis=0)
        x = jnp.concatenate((low, high[::-1]), axis=3)
    return x


def _gather(ring: Ring, x):
    return _to_row(ring, jax.lax.all_gather(x, ring.axis))


def _rows(ring: Ring, local: int) -> Rows:
    """The rows that each device's queries stand at."""
    length = local * ring.size
    rows = zigzag_order(length, ring.size) if ring.zigzag else np.arange(length, dtype=np.int32)
    return Rows(rows.reshape(ring.size, local), jax.lax.axis_index(ring.axis))


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _gathered(kernel, ring, q_BHTK, k_BNTK, v_BNTK, segments_BT):
    """Local queries against all keys. Keys are gathered again in the backward pass rather than kept."""
    return _gathered_forward(kernel, ring, q_BHTK, k_BNTK, v_BNTK, segments_BT)[0]


def _gathered_forward(kernel, ring, q_BHTK, k_BNTK, v_BNTK, segments_BT):
    kv = _gather(ring, jnp.concatenate((k_BNTK, v_BNTK), axis=1))
    segments_BS = _gather(ring, segments_BT[:, None])[:, 0]
    k_BNSK, v_BNSK = jnp.split(kv, 2, axis=1)
    o, lse = kernel.forward(q_BHTK, k_BNSK, v_BNSK, segments_BT, segments_BS, _rows(ring, q_BHTK.shape[2]))
    o, lse = tag(o.astype(q_BHTK.dtype), lse)
    return o, (q_BHTK, k_BNTK, v_BNTK, segments_BT, o, lse)


def _gathered_backward(kernel, ring, saved, g_BHTK):
    q_BHTK, k_BNTK, v_BNTK, segments_BT, o, lse = saved
    kv, scatter = jax.vjp(functools.partial(_gather, ring), jnp.concatenate((k_BNTK, v_BNTK), axis=1))
    segments_BS = _gather(ring, segments_BT[:, None])[:, 0]
    k_BNSK, v_BNSK = jnp.split(kv, 2, axis=1)
    order = _rows(ring, q_BHTK.shape[2])
    g_q, g_k, g_v = kernel.backward(
        q_BHTK, k_BNSK, v_BNSK, segments_BT, segments_BS, order, g_BHTK, lse, output_offset(g_BHTK, o)
    )
    (g_kv,) = scatter(jnp.concatenate((g_k, g_v), axis=1).astype(kv.dtype))
    g_k, g_v = jnp.split(g_kv, 2, axis=1)
    return g_q.astype(q_BHTK.dtype), g_k, g_v, None


_gathered.defvjp(_gathered_forward, _gathered_backward)


def _ulysses(kernel, ring, q_BHTK, k_BNTK, v_BNTK, segments_BT):
    """Each device gets the whole row for H / n of the heads. Fewer kv heads than devices are repeated."""
    n, N = ring.size, k_BNTK.shape[1]
    if N % n:
        k_BNTK, v_BNTK = (jnp.repeat(x, n // N, axis=1) for x in (k_BNTK, v_BNTK))

    def rows(x):
        B, M, T, K = x.shape
        x = jax.lax.all_to_all(x, ring.axis, split_axis=1, concat_axis=2, tiled=True)
        return _to_row(ring, jnp.moveaxis(x.reshape(B, M // n, n, T, K), 2, 0))

    segments_BS = _gather(ring, segments_BT[:, None])[:, 0]
    o = flash(kernel, True, rows(q_BHTK), rows(k_BNTK), rows(v_BNTK), segments_BS, segments_BS)
    o = jnp.moveaxis(_to_shards(ring, o), 0, 2)
    o = o.reshape(*o.shape[:2], -1, o.shape[-1])
    return jax.lax.all_to_all(o, ring.axis, split_axis=2, concat_axis=1, tiled=True)
