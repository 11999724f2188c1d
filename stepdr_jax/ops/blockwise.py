"""The attention kernel for any device, in plain JAX: tiles of queries against tiles of keys, memory linear in length.

Key tiles that come wholly after a query tile are not computed when the order is by rows.

Shape suffixes: B sequences, T tokens (of queries), H query heads, N key-value heads, S tokens of keys, K head
dimension, Q queries of a tile, X any leading dimensions, t, s tile sizes of queries and keys.
"""

import functools

import jax
import jax.numpy as jnp

from stepdr_jax.ops.flash import MASKED, Kernel, Order, Rows

_NOBODY = -2  # segment of padded keys


def kernel(block: int = 256) -> Kernel:
    """Attention in tiles of `block` queries and keys; holds [B, H, block, block] float32 scores and the gradients."""
    return Kernel(functools.partial(_forward, block), functools.partial(_backward, block))


def _tiles(x, block: int, axis: int, fill=0):
    """Pads `axis` to whole tiles and moves the tile index to the front."""
    pad = [(0, 0)] * x.ndim
    pad[axis] = (0, -x.shape[axis] % block)
    x = jnp.pad(x, pad, constant_values=fill)
    return jnp.moveaxis(x.reshape(*x.shape[:axis], -1, block, *x.shape[axis + 1 :]), axis, 0)


def _untile(x, axis: int, length: int):
    x = jnp.moveaxis(x, 0, axis)
    x = x.reshape(*x.shape[:axis], -1, *x.shape[axis + 2 :])
    return jax.lax.slice_in_dim(x, 0, length, axis=axis)


def _cut(block, q_BHTK, k_BNSK, v_BNSK, query_segments_BT, key_segments_BS, order: Order, per_query=()):
    """(query tiles, key tiles, key tiles that each query tile needs).

    X = batch and kv head, Q = group and query of a tile: every product is then a plain batched matrix product.
    """
    (B, H, T, K), (N, S) = q_BHTK.shape, k_BNSK.shape[1:3]
    t, s = min(block, T), min(block, S)

    def queries(x):
        x = _tiles(x.reshape(B, N, H // N, T, *x.shape[3:]), t, 3)
        return x.reshape(x.shape[0], B * N, -1, *x.shape[5:])

    def keys(x):
        x = _tiles(x, s, 2)
        return x.reshape(-1, B * N, s, K)

    key_tiles = -(-S // s)
    if isinstance(order, Rows):
        rows = jnp.asarray(order.table)[order.device][None]
        query_order, key_order = _tiles(rows, t, 1), _tiles(jnp.arange(S, dtype=jnp.int32)[None], s, 1)
        needed = jnp.max(query_order, axis=(1, 2)) // s + 1
    elif order is None:
        query_order = key_order = None
        needed = jnp.full(-(-T // t), key_tiles, jnp.int32)
    else:
        query_order, key_order = _tiles(order.queries, t, 1), _tiles(order.keys, s, 1)
        needed = jnp.full(-(-T // t), key_tiles, jnp.int32)
    query_tiles = (
        queries(q_BHTK),
        _tiles(query_segments_BT, t, 1),
        query_order,
        *(queries(x) for x in per_query),
    )
    return query_tiles, (keys(k_BNSK), keys(v_BNSK), _tiles(key_segments_BS, s, 1, _NOBODY), key_order), needed


def _take(tiles, index):
    return jax.tree.map(lambda x: jax.lax.dynamic_index_in_dim(x, index, keepdims=False), tiles)


def _scores(q_XQK, query_segments_Bt, query_order, k_XsK, key_segments_Bs, key_order):
    """float32 scores [X, Q, s], masked."""
    scores = jnp.einsum("XQK,XsK->XQs", q_XQK, k_XsK, preferred_element_type=jnp.float32)
    visible_Bts = query_segments_Bt[:, :, None] == key_segments_Bs[:, None]
    if query_order is not None:
        visible_Bts &= query_order[:, :, None] >= key_order[:, None]
    B, t, s = visible_Bts.shape
    X, Q, _ = scores.shape
    scores = scores.reshape(B, X // B, Q // t, t, s)
    return jnp.where(visible_Bts[:, None, None], scores, MASKED).reshape(X, Q, s)


def _forward(block, q_BHTK, k_BNSK, v_BNSK, query_segments_BT, key_segments_BS, order):
    (B, H, T, K), N = q_BHTK.shape, k_BNSK.shape[1]
    queries, keys, needed = _cut(block, q_BHTK, k_BNSK, v_BNSK, query_segments_BT, key_segments_BS, order)

    def query_tile(_, tile):
        (q, query_segments, query_order), count = tile

        def key_tile(index, carry):
            total, denominator, largest = carry
            k, v, key_segments, key_order = _take(keys, index)
            scores = _scores(q, query_segments, query_order, k, key_segments, key_order)
            new_largest = jnp.maximum(largest, jnp.max(scores, axis=-1))
            weights = jnp.exp(scores - new_largest[..., None])
            shrink = jnp.exp(largest - new_largest)
            part = jnp.einsum("XQs,XsK->XQK", weights.astype(v.dtype), v, preferred_element_type=jnp.float32)
            return (
                total * shrink[..., None] + part,
                denominator * shrink + jnp.sum(weights, axis=-1),
                new_largest,
            )

        start = (
            jnp.zeros(q.shape, jnp.float32),
            jnp.zeros(q.shape[:2], jnp.float32),
            jnp.full(q.shape[:2], MASKED, jnp.float32),
        )
        total, denominator, largest = jax.lax.fori_loop(0, count, key_tile, start)
        return None, (total / denominator[..., None], largest + jnp.log(denominator))

    o, lse = jax.lax.scan(query_tile, None, (queries, needed))[1]
    o = o.reshape(o.shape[0], B, N, H // N, -1, K)
    lse = lse.reshape(*o.shape[:-1])
    return _untile(o, 3, T).reshape(B, H, T, K), _untile(lse, 3, T).reshape(B, H, T)


def _backward(block, q_BHTK, k_BNSK, v_BNSK, query_segments_BT, key_segments_BS, order, g_BHTK, lse_BHT, offset_BHT):
    (B, H, T, K), (N, S) = q_BHTK.shape, k_BNSK.shape[1:3]
    queries, keys, needed = _cut(
        block,
        q_BHTK,
        k_BNSK,
        v_BNSK,
        query_segments_BT,
        key_segments_BS,
        order,
        (g_BHTK, lse_BHT, offset_BHT),
    )
    dtype = k_BNSK.dtype

    def query_tile(g_keys, tile):
        (q, query_segments, query_order, g, lse, offset), count = tile
        g = g.astype(dtype)

        def key_tile(index, carry):
            g_q, g_k, g_v = carry
            k, v, key_segments, key_order = _take(keys, index)
            scores = _scores(q, query_segments, query_order, k, key_segments, key_order)
            weights = jnp.exp(scores - lse[..., None])
            g_weights = jnp.einsum("XQK,XsK->XQs", g, v, preferred_element_type=jnp.float32)
            g_scores = (weights * (g_weights - offset[..., None])).astype(dtype)
            g_q += jnp.einsum("XQs,XsK->XQK", g_scores, k, preferred_element_type=jnp.float32)
            add_k = jnp.einsum("XQs,XQK->XsK", g_scores, q, preferred_element_type=jnp.float32)
            add_v = jnp.einsum("XQs,XQK->XsK", weights.astype(dtype), g, preferred_element_type=jnp.float32)
            return g_q, g_k.at[index].add(add_k), g_v.at[index].add(add_v)

        g_q, *g_keys = jax.lax.fori_loop(0, count, key_tile, (jnp.zeros(q.shape, jnp.float32), *g_keys))
        return tuple(g_keys), g_q

    start = tuple(jnp.zeros(x.shape, jnp.float32) for x in keys[:2])
    g_keys, g_q = jax.lax.scan(query_tile, start, (queries, needed))
    g_q = g_q.reshape(g_q.shape[0], B, N, H // N, -1, K)
    g_k, g_v = (_untile(g.reshape(g.shape[0], B, N, *g.shape[2:]), 2, S) for g in g_keys)
    return _untile(g_q, 3, T).reshape(B, H, T, K), g_k, g_v
