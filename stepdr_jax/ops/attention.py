"""Grouped-query attention with one entry point and interchangeable backends.

Who may look at whom is never a mask argument: a query sees the keys of its own segment at positions not after its own.
Positions and segment ids travel with queries and keys, so packing, padding and reordered sequences are one code path.
Segment 0 is padding; padding sees only padding, which keeps every softmax row non-empty.
"""

import jax
import jax.numpy as jnp

MASKED = -1e30  # finite: a row that is wholly masked in one key block must not produce NaN


def attention(
    q_BTHK: jax.Array,
    k_BSNK: jax.Array,
    v_BSNK: jax.Array,
    *,
    query_positions_BT: jax.Array,
    key_positions_BS: jax.Array,
    query_segments_BT: jax.Array,
    key_segments_BS: jax.Array,
    backend: str = "auto",
    block: int = 512,
) -> jax.Array:
    """Causal attention within segments; returns o_BTHK in q's dtype.

    Args:
        q_BTHK: queries; H is a multiple of N, and query head h reads key head h // (H / N).
        k_BSNK, v_BSNK: keys and values.
        query_positions_BT, key_positions_BS: int32 positions inside the segment.
        query_segments_BT, key_segments_BS: int32 segment ids, 0 = padding.
        backend: `reference` holds scores [B, H, T, S] in float32; `blockwise` never holds more than
            [B, H, block, block] of them, forward or backward; `auto` takes blockwise above 2 * block keys.
        block: queries and keys of one tile of `blockwise`.
    """
    if backend == "auto":
        backend = "blockwise" if k_BSNK.shape[1] > 2 * block else "reference"
    arguments = (q_BTHK, k_BSNK, v_BSNK, query_positions_BT, key_positions_BS, query_segments_BT, key_segments_BS)
    if backend == "reference":
        return _reference(*arguments)
    if backend == "blockwise":
        return _blockwise(*arguments, block)
    raise ValueError(f"expected attention backend auto, reference or blockwise, got {backend!r}")


def _visible(query_positions, key_positions, query_segments, key_segments) -> jax.Array:
    """bool[B, T, S]: may query t see key s."""
    causal = query_positions[:, :, None] >= key_positions[:, None, :]
    return causal & (query_segments[:, :, None] == key_segments[:, None, :])


def _reference(q_BTHK, k_BSNK, v_BSNK, query_positions, key_positions, query_segments, key_segments):
    B, T, H, K = q_BTHK.shape
    N = k_BSNK.shape[2]
    visible = _visible(query_positions, key_positions, query_segments, key_segments)
    q_BTNGK = (q_BTHK * K**-0.5).reshape(B, T, N, H // N, K)
    scores = jnp.einsum("BTNGK,BSNK->BNGTS", q_BTNGK, k_BSNK, preferred_element_type=jnp.float32)
    scores = jnp.where(visible[:, None, None], scores, MASKED)
    weights = jax.nn.softmax(scores, axis=-1).astype(v_BSNK.dtype)
    return jnp.einsum("BNGTS,BSNK->BTNGK", weights, v_BSNK).reshape(B, T, H, K)


def _pad_blocks(x, block, axis=1):
    """Pads `axis` to a multiple of block with zeros: segment 0 keys are seen by padding only."""
    pad = [(0, 0)] * x.ndim
    pad[axis] = (0, -x.shape[axis] % block)
    return jnp.pad(x, pad)


def _split_blocks(x, block):
    """[B, T, ...] -> [T / block, B, block, ...], the layout that scans walk."""
    return jnp.moveaxis(x.reshape(x.shape[0], -1, block, *x.shape[2:]), 1, 0)


def _join_blocks(x):
    x = jnp.moveaxis(x, 0, 1)
    return x.reshape(x.shape[0], -1, *x.shape[3:])


def _blockwise(q_BTHK, k_BSNK, v_BSNK, query_positions, key_positions, query_segments, key_segments, block):
    B, T, H, K = q_BTHK.shape
    N = k_BSNK.shape[2]
    q_BTNGK = (q_BTHK * K**-0.5).reshape(B, T, N, H // N, K)
    padded = [_pad_blocks(x, block) for x in (q_BTNGK, k_BSNK, v_BSNK, query_positions, query_segments)]
    q, k, v, query_positions, query_segments = padded
    key_positions, key_segments = _pad_blocks(key_positions, block), _pad_blocks(key_segments, block)
    queries = tuple(_split_blocks(x, block) for x in (q, query_positions, query_segments))
    keys = tuple(_split_blocks(x, block) for x in (k, v, key_positions, key_segments))
    out = _join_blocks(_flash(queries, keys)[0])
    return out[:, :T].reshape(B, T, H, K).astype(q_BTHK.dtype)


def _tile_scores(q, query_positions, query_segments, k, key_positions, key_segments):
    scores = jnp.einsum("BTNGK,BSNK->BNGTS", q, k, preferred_element_type=jnp.float32)
    visible = _visible(query_positions, key_positions, query_segments, key_segments)
    return jnp.where(visible[:, None, None], scores, MASKED)


@jax.custom_vjp
def _flash(queries, keys):
    """Online softmax over key tiles, one query tile at a time: (out float32 [nq,B,t,N,G,K], logz [nq,B,N,G,t])."""

    def query_tile(_, query):
        q, query_positions, query_segments = query
        B, t, N, G, K = q.shape

        def key_tile(carry, key):
            k, v, key_positions, key_segments = key
            total, denominator, largest = carry
            scores = _tile_scores(q, query_positions, query_segments, k, key_positions, key_segments)
            new_largest = jnp.maximum(largest, jnp.max(scores, axis=-1))
            weights = jnp.exp(scores - new_largest[..., None])
            shrink = jnp.exp(largest - new_largest)
            part = jnp.einsum("BNGTS,BSNK->BNGTK", weights.astype(v.dtype), v, preferred_element_type=jnp.float32)
            total = total * shrink[..., None] + part
            return (total, denominator * shrink + jnp.sum(weights, axis=-1), new_largest), None

        start = (
            jnp.zeros((B, N, G, t, K), jnp.float32),
            jnp.zeros((B, N, G, t), jnp.float32),
            jnp.full((B, N, G, t), MASKED, jnp.float32),
        )
        (total, denominator, largest), _ = jax.lax.scan(key_tile, start, keys)
        out = jnp.einsum("BNGTK->BTNGK", total / denominator[..., None])
        return None, (out, largest + jnp.log(denominator))

    return jax.lax.scan(query_tile, None, queries)[1]


def _flash_forward(queries, keys):
    out, logz = _flash(queries, keys)
    return (out, logz), (queries, keys, out, logz)


def _flash_backward(saved, cotangents):
    """Recomputes each tile's weights from the saved log-partition; memory stays one tile plus the gradients."""
    queries, keys, out, logz = saved
    g_out, g_logz = cotangents
    q_dtype, k_dtype, v_dtype = queries[0].dtype, keys[0].dtype, keys[1].dtype
    # d scores = weights * (g_out . v - sum(g_out * out) + g_logz)
    offset = g_logz - jnp.einsum("qBTNGK,qBTNGK->qBNGT", g_out, out)

    def query_tile(carry, query):
        q, query_positions, query_segments, g, logz_tile, offset_tile = query

        def key_tile(g_q, key):
            k, v, key_positions, key_segments = key
            scores = _tile_scores(q, query_positions, query_segments, k, key_positions, key_segments)
            weights = jnp.exp(scores - logz_tile[..., None])
            g_v = jnp.einsum("BNGTS,BTNGK->BSNK", weights, g)
            g_scores = weights * (jnp.einsum("BTNGK,BSNK->BNGTS", g, v.astype(jnp.float32)) + offset_tile[..., None])
            g_q = g_q + jnp.einsum("BNGTS,BSNK->BTNGK", g_scores, k.astype(jnp.float32))
            g_k = jnp.einsum("BNGTS,BTNGK->BSNK", g_scores, q.astype(jnp.float32))
            return g_q, (g_k, g_v)

        g_q, (g_k, g_v) = jax.lax.scan(key_tile, jnp.zeros(q.shape, jnp.float32), keys)
        return (carry[0] + g_k, carry[1] + g_v), g_q

    start = (jnp.zeros(keys[0].shape, jnp.float32), jnp.zeros(keys[1].shape, jnp.float32))
    (g_k, g_v), g_q = jax.lax.scan(query_tile, start, (*queries, g_out, logz, offset))
    return (g_q.astype(q_dtype), None, None), (g_k.astype(k_dtype), g_v.astype(v_dtype), None, None)


_flash.defvjp(_flash_forward, _flash_backward)
