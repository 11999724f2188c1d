"""Ring attention: keys and values travel round the devices of one mesh axis while each attends to those it holds.

Hop by hop, with n devices, `me` this one and `source` the one whose keys are here (me, me-1, ...; heads-major arrays):
- own keys: causal over the local rows, which lie in row order in either layout;
- zigzag: two full tiles of half the rows each. The high half always sees the source's low half; besides, the low half
  sees it if source < me, else the high half sees the source's high half. Which one is chosen by `where` on the kernel's
  inputs: one program, the same work on every device and hop, and no tile that causality forbids;
- plain: one full tile, whose keys belong to no segment if source > me (half of all work is wasted).

A hop's transfer must run under its kernel. XLA would rather place it beside; an optimization barrier over the kernel's
results and what arrives pins it. Gradients of keys set out with the own ones, travel with the keys in float32, and
come home under a last tile of own keys that is kept back for that. Segment ids do not travel: they are gathered once,
4 bytes a token, because transfers too small to matter still cost their latency each hop. The last hop sends keys that
nobody needs any more, hidden as all are: a hop without would be a third of all kernels to compile and to hold buffers
for.

Shape suffixes: B sequences, T tokens (of queries), H query heads, N key-value heads, K head dimension.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp

from stepdr_jax.ops.flash import MASKED, Kernel, in_order, merge, output_offset, tag

_NOWHERE = -1  # segment of keys that nobody may see


class Ring(NamedTuple):
    """axis: mesh axis; size: devices on it; zigzag: layout; barrier: False only to test what it is there for."""

    axis: str
    size: int
    zigzag: bool
    barrier: bool = True


def _send(ring: Ring, x):
    neighbours = [(i, (i + 1) % ring.size) for i in range(ring.size)]
    return jax.tree.map(lambda a: jax.lax.ppermute(a, ring.axis, neighbours), x)


def _together(ring: Ring, x):
    """All of x is there before any of x is used."""
    return jax.lax.optimization_barrier(x) if ring.barrier else x


def _half(x, index: int):
    """Low or high half of the rows (axis 2) of every array."""
    return jax.tree.map(lambda a: jnp.split(a, 2, axis=2)[index], x)


def _stack(*trees):
    """Along the batch: one kernel call for several tiles."""
    return jax.tree.map(lambda *a: jnp.concatenate(a, axis=0), *trees)


def _unstack(x):
    return zip(*(jnp.split(a, 2, axis=0) for a in x), strict=True)


def _select(condition, x, y):
    return jax.tree.map(lambda a, b: jnp.where(condition, a, b), x, y)


def _hop_queries(ring: Ring, queries, earlier):
    if not ring.zigzag:
        return queries
    low, high = _half(queries, 0), _half(queries, 1)
    return _stack(high, _select(earlier, low, high))


def _hop_keys(ring: Ring, kv, segments_nB1T, source, earlier):
    keys = kv, jax.lax.dynamic_index_in_dim(segments_nB1T, source, keepdims=False)
    if not ring.zigzag:
        return keys[0], jnp.where(earlier, keys[1], _NOWHERE)
    low, high = _half(keys, 0), _half(keys, 1)
    return _stack(low, _select(earlier, low, high))


def _call(run, order, queries, keys):
    """Kernel arguments of queries (q, segments, ...) and keys (k and v side by side in the heads, segments)."""
    (q, query_segments, *per_query), (kv, key_segments) = queries, keys
    k, v = jnp.split(kv, 2, axis=1)
    return run(q, k, v, query_segments[:, 0], key_segments[:, 0], order, *per_query)


def _grads(backward, order, queries, keys):
    """(g_q, g_kv) in float32."""
    g_q, g_k, g_v = _call(backward, order, queries, keys)
    return g_q, jnp.concatenate((g_k, g_v), axis=1)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def ring_attention(kernel: Kernel, ring: Ring, q_BHTK, k_BNTK, v_BNTK, segments_BT):
    """o_BHTK in q's dtype; causal within segments. T, the local length, is even."""
    return _forward(kernel, ring, q_BHTK, k_BNTK, v_BNTK, segments_BT)[0]


def _forward(kernel, ring, q_BHTK, k_BNTK, v_BNTK, segments_BT):
    me = jax.lax.axis_index(ring.axis)
    segments = segments_BT[:, None]
    segments_nB1T = jax.lax.all_gather(segments, ring.axis)
    queries, kv = (q_BHTK, segments), jnp.concatenate((k_BNTK, v_BNTK), axis=1)

    arriving = _send(ring, kv)
    result = _call(kernel.forward, in_order(q_BHTK.shape[2]), queries, (kv, segments))
    result, kv = _together(ring, (result, arriving))
    done = [merge(_half(result, 0)), merge(_half(result, 1))] if ring.zigzag else [merge(result)]

    def hop(done, kv, step):
        source = (me - step) % ring.size
        earlier = source < me
        arriving = _send(ring, kv)
        keys = _hop_keys(ring, kv, segments_nB1T, source, earlier)
        tiles = _call(kernel.forward, None, _hop_queries(ring, queries, earlier), keys)
        tiles, arriving = _together(ring, (tiles, arriving))
        if not ring.zigzag:
            return [merge(done[0], tiles)], arriving
        always, (o, lse) = _unstack(tiles)
        low = merge(done[0], (o, jnp.where(earlier, lse, MASKED)))
        high = merge(done[1], always, (o, jnp.where(earlier, MASKED, lse)))
        return [low, high], arriving

    steps = jnp.arange(1, ring.size)
    (done, _), _ = jax.lax.scan(lambda carry, step: (hop(*carry, step), None), (done, kv), steps)
    o, lse = (jnp.concatenate(parts, axis=2) for parts in zip(*done, strict=True))
    o, lse = tag(o.astype(q_BHTK.dtype), lse)
    return o, (q_BHTK, k_BNTK, v_BNTK, segments_nB1T, o, lse)


def _backward(kernel, ring, saved, g_BHTK):
    q_BHTK, k_BNTK, v_BNTK, segments_nB1T, o, lse = saved
    me = jax.lax.axis_index(ring.axis)
    segments = jax.lax.dynamic_index_in_dim(segments_nB1T, me, keepdims=False)
    queries = (q_BHTK, segments, g_BHTK, lse, output_offset(g_BHTK, o))
    own = jnp.concatenate((k_BNTK, v_BNTK), axis=1), segments
    backward = functools.partial(_grads, kernel.backward)

    def f32(x):
        return jax.tree.map(lambda a: a.astype(jnp.float32), x)

    # Own rows: the two causal half tiles now, under the first transfer; the full one under the last.
    arriving = _send(ring, own[0])
    halves = [_stack(_half(x, 0), _half(x, 1)) for x in (queries, own)]
    grads = backward(in_order(q_BHTK.shape[2] // 2), *halves)
    grads, kv = _together(ring, (grads, arriving))
    g_q, g_kv = (jnp.concatenate(parts, axis=2) for parts in zip(*_unstack(f32(grads)), strict=True))

    def hop(g_q, g_kv, kv, step):
        source = (me - step) % ring.size
        earlier = source < me
        arriving, arriving_g = _send(ring, kv), _send(ring, g_kv)
        keys = _hop_keys(ring, kv, segments_nB1T, source, earlier)
        grads = backward(None, _hop_queries(ring, queries, earlier), keys)
        grads, arriving, arriving_g = _together(ring, (grads, arriving, arriving_g))
        if not ring.zigzag:
            add_q, add_kv = f32(grads)
        else:
            (always_q, always_kv), (one_q, one_kv) = _unstack(f32(grads))
            zero_q, zero_kv = jnp.zeros_like(one_q), jnp.zeros_like(one_kv)
            low_q, high_q = _select(earlier, (one_q, zero_q), (zero_q, one_q))
            low_kv, high_kv = _select(earlier, (one_kv, zero_kv), (zero_kv, one_kv))
            add_q = jnp.concatenate((low_q, always_q + high_q), axis=2)
            add_kv = jnp.concatenate((always_kv + low_kv, high_kv), axis=2)
        return g_q + add_q, arriving_g + add_kv, arriving

    steps = jnp.arange(1, ring.size)
    (g_q, g_kv, _), _ = jax.lax.scan(lambda carry, step: (hop(*carry, step), None), (g_q, g_kv, kv), steps)

    home = _send(ring, g_kv)
    grads = backward(None, _half(queries, 1), _half(own, 0))
    grads, home = _together(ring, (grads, home))
    high_q, low_kv = f32(grads)
    g_q = jnp.concatenate((_half(g_q, 0), _half(g_q, 1) + high_q), axis=2)
    g_kv = jnp.concatenate((_half(home, 0) + low_kv, _half(home, 1)), axis=2)
    g_k, g_v = jnp.split(g_kv, 2, axis=1)
    return g_q.astype(q_BHTK.dtype), g_k.astype(k_BNTK.dtype), g_v.astype(v_BNTK.dtype), None


ring_attention.defvjp(_forward, _backward)
