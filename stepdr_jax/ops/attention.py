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
    in_order: bool = False,
    backend: str = "auto",
    block: int = 512,
) -> jax.Array:
    """Causal attention within segments; returns o_BTHK in q's dtype.

    Args:
        q_BTHK: queries; H is a multiple of N, and query head h reads key head h // (H / N).
        k_BSNK, v_BSNK: keys and values.
        query_positions_BT, key_positions_BS: int32 positions inside the segment.
        query_segments_BT, key_segments_BS: int32 segment ids, 0 = padding.
        in_order: promises that queries and keys are the same tokens and that positions rise along each segment, so
            no query sees a key of a larger index (ordinary packed rows; not permuted ones).
        backend: `reference` holds scores [B, H, T, S] in float32; `prefix` takes queries in tiles of 64 against the
            keys up to the tile's end, recomputed in the backward pass: half the work and cache-sized pieces, the
            fastest on a CPU, in_order only; `blockwise` never holds more than [B, H, block, block] scores, forward
            or backward. `auto` chooses by length.
        block: queries and keys of one tile of `blockwise`.
    """
    if backend == "auto":
        if k_BSNK.shape[1] > 2 * block:
            backend = "blockwise"
        else:
            backend = "prefix" if in_order else "reference"
    arguments = (q_BTHK, k_BSNK, v_BSNK, query_positions_BT, key_positions_BS, query_segments_BT, key_segments_BS)
    if backend == "reference":
        return _reference(*arguments)
    if backend == "blockwise":
        return _blockwise(*arguments, block)
    if backend == "prefix":
        if not in_order:
            raise ValueError("expected rows in order for attention backend prefix, got in_order=False")
        return _prefix(q_BTHK, k_BSNK, v_BSNK, query_positions_BT, query_segments_BT)
    raise ValueError(f"expected attention backend auto, reference, prefix or blockwise, got {backend!r}")


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


PREFIX_TILE = 64  # queries; measured on a CPU at 256 and 512 tokens, 32 to 128 differ little


def _prefix(q_BTHK, k_BTNK, v_BTNK, positions_BT, segments_BT):
    B, T, H, K = q_BTHK.shape
    N = k_BTNK.shape[2]
    G = H // N
    tile = min(PREFIX_TILE, T)
    q, k, v, positions, segments = (
        _pad_blocks(x, tile) for x in (q_BTHK * K**-0.5, k_BTNK, v_BTNK, positions_BT, segments_BT)
    )
    # X = batch and kv head, Q = group and query of one tile: every product is then a plain batched matrix product
    q_nXQK = q.reshape(B, -1, tile, N, G, K).transpose(1, 0, 3, 4, 2, 5).reshape(-1, B * N, G * tile, K)
    k_XSK, v_XSK = (x.transpose(0, 2, 1, 3).reshape(B * N, -1, K) for x in (k, v))
    o_nXQK = _prefix_core(q_nXQK, k_XSK, v_XSK, positions, segments)
    o_BTNGK = o_nXQK.reshape(-1, B, N, G, tile, K).transpose(1, 0, 4, 2, 3, 5)
    return o_BTNGK.reshape(B, -1, H, K)[:, :T].astype(q_BTHK.dtype)


def _prefix_scores(index, q_XQK, k_XSK, positions_BT, segments_BT):
    """Scores of query tile `index` against the keys up to its end, masked."""
    (X, Q, _), S, B = q_XQK.shape, k_XSK.shape[1], positions_BT.shape[0]
    tile = S // (index + 1)
    rows = slice(index * tile, S)
    visible = _visible(positions_BT[:, rows], positions_BT[:, :S], segments_BT[:, rows], segments_BT[:, :S])
    scores = jnp.einsum("XQK,XSK->XQS", q_XQK, k_XSK, preferred_element_type=jnp.float32)
    scores = scores.reshape(B, X // B, Q // tile, tile, S)
    return jnp.where(visible[:, None, None], scores, MASKED).reshape(X, Q, S)


@jax.custom_vjp
def _prefix_core(q_nXQK, k_XSK, v_XSK, positions_BT, segments_BT):
    return _prefix_forward(q_nXQK, k_XSK, v_XSK, positions_BT, segments_BT)[0]


def _prefix_forward(q_nXQK, k_XSK, v_XSK, positions_BT, segments_BT):
    count = q_nXQK.shape[0]
    tile = k_XSK.shape[1] // count
    outs, logzs = [], []
    for index in range(count):
        S = (index + 1) * tile
        scores = _prefix_scores(index, q_nXQK[index], k_XSK[:, :S], positions_BT, segments_BT)
        largest = jnp.max(scores, axis=-1)
        weights = jnp.exp(scores - largest[..., None])
        total = jnp.sum(weights, axis=-1)
        out = jnp.einsum("XQS,XSK->XQK", weights.astype(v_XSK.dtype), v_XSK[:, :S], preferred_element_type=jnp.float32)
        outs.append(out / total[..., None])
        logzs.append(largest + jnp.log(total))
    o_nXQK, logz_nXQ = jnp.stack(outs), jnp.stack(logzs)
    return o_nXQK, (q_nXQK, k_XSK, v_XSK, positions_BT, segments_BT, o_nXQK, logz_nXQ)


def _prefix_backward(saved, g_nXQK):
    q_nXQK, k_XSK, v_XSK, positions_BT, segments_BT, o_nXQK, logz_nXQ = saved
    count, dtype = q_nXQK.shape[0], k_XSK.dtype
    total_keys = k_XSK.shape[1]
    tile = total_keys // count
    g_q, g_k, g_v = [], jnp.zeros(k_XSK.shape, jnp.float32), jnp.zeros(v_XSK.shape, jnp.float32)
    for index in range(count):
        S = (index + 1) * tile
        q, g, k, v = q_nXQK[index], g_nXQK[index], k_XSK[:, :S], v_XSK[:, :S]
        scores = _prefix_scores(index, q, k, positions_BT, segments_BT)
        weights = jnp.exp(scores - logz_nXQ[index][..., None])
        g_weights = jnp.einsum("XQK,XSK->XQS", g.astype(dtype), v, preferred_element_type=jnp.float32)
        g_scores = (weights * (g_weights - jnp.sum(g * o_nXQK[index], axis=-1)[..., None])).astype(dtype)
        g_q.append(jnp.einsum("XQS,XSK->XQK", g_scores, k, preferred_element_type=jnp.float32))
        g_k_prefix = jnp.einsum("XQS,XQK->XSK", g_scores, q, preferred_element_type=jnp.float32)
        g_v_prefix = jnp.einsum(
            "XQS,XQK->XSK", weights.astype(dtype), g.astype(dtype), preferred_element_type=jnp.float32
        )
        rest = ((0, 0), (0, total_keys - S), (0, 0))
        g_k, g_v = g_k + jnp.pad(g_k_prefix, rest), g_v + jnp.pad(g_v_prefix, rest)
    return jnp.stack(g_q).astype(q_nXQK.dtype), g_k.astype(dtype), g_v.astype(dtype), None, None


_prefix_core.defvjp(_prefix_forward, _prefix_backward)


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
