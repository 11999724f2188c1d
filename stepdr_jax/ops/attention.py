"""Grouped-query attention with one entry point and interchangeable backends.

Who may look at whom is never a mask argument: a query sees the keys of its own segment at positions not after its own.
Positions and segment ids travel with queries and keys, so packing, padding and reordered sequences are one code path.
Segment 0 is padding; padding sees only padding, which keeps every softmax row non-empty.

Shape suffixes: B sequences, T tokens (of queries), S tokens of keys, H query heads, N key-value heads, G = H / N, K
head dimension, X any leading dimensions.
"""

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from stepdr_jax.ops import blockwise, splash
from stepdr_jax.ops.flash import MASKED, Kernel, Positions, flash, tag

BACKENDS = ("auto", "reference", "prefix", "blockwise", "splash", "cudnn")
_LONG = 1024  # keys: above it, scores in one piece cost more than tiles
_CUDNN_LONG = 8192  # keys: above it, the mask that the library needs for packed rows is too large


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
    block: int = 256,
) -> jax.Array:
    """Causal attention within segments; returns o_BTHK in q's dtype.

    What the backward pass needs is named `attention_out` and `attention_lse`, so that a remat policy can keep it.

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
            or backward, on any device; `splash` is a TPU's, memory linear in length, in_order only, lengths in
            multiples of 128; `cudnn` is a GPU's, 16 bit only, forward and backward without scores but with a mask
            [B, 1, T, S] of q's dtype, which packing needs. `auto` chooses by device, order and length.
        block: queries and keys of one tile of `blockwise`.

    Raises:
        ValueError: the backend is unknown or cannot serve these arguments.
    """
    if backend == "auto":
        backend = _choose(q_BTHK, k_BSNK, in_order)
    if backend not in BACKENDS:
        raise ValueError(f"expected attention backend {', '.join(BACKENDS)}, got {backend!r}")
    if backend in ("prefix", "splash") and not in_order:
        raise ValueError(f"expected rows in order for attention backend {backend}, got in_order=False")
    if backend == "prefix":
        return _prefix(q_BTHK, k_BSNK, v_BSNK, query_positions_BT, query_segments_BT)
    if backend in ("blockwise", "splash"):
        positions = None if in_order else Positions(query_positions_BT, key_positions_BS)
        q, k, v = (jnp.swapaxes(x, 1, 2) for x in (q_BTHK * q_BTHK.shape[-1] ** -0.5, k_BSNK, v_BSNK))
        o_BHTK = flash(kernel(backend, block), True, q, k, v, query_segments_BT, key_segments_BS, positions)
        return jnp.swapaxes(o_BHTK, 1, 2)
    visible_BTS = _visible(query_positions_BT, key_positions_BS, query_segments_BT, key_segments_BS)
    return (_cudnn if backend == "cudnn" else _reference)(q_BTHK, k_BSNK, v_BSNK, visible_BTS)


def platform() -> str:
    """`tpu`, `gpu` or `cpu`: of the mesh under shard_map (also one of a TPU that is only compiled for), else JAX's."""
    device = jax.sharding.get_abstract_mesh().abstract_device
    name = device.platform if device else jax.default_backend()
    return "gpu" if name in ("cuda", "rocm") else name


def kernel(backend: str, block: int = 256) -> Kernel:
    """The kernel that sequences split over devices are computed with: `blockwise`, `splash` or `auto`."""
    if backend == "auto":
        backend = "splash" if platform() == "tpu" else "blockwise"
    return splash.kernel() if backend == "splash" else blockwise.kernel(block)


def _choose(q_BTHK, k_BSNK, in_order: bool) -> str:
    (_, T, _, K), S, device = q_BTHK.shape, k_BSNK.shape[1], platform()
    if device == "tpu" and in_order and T % splash.LANES == 0:
        return "splash"
    if device == "gpu" and q_BTHK.dtype.itemsize == 2 and K % 8 == 0 and K <= 128 and 1 < T and S <= _CUDNN_LONG:
        return "cudnn"
    if S > _LONG:
        return "blockwise"
    return "prefix" if in_order else "reference"


def _visible(query_positions, key_positions, query_segments, key_segments) -> jax.Array:
    """bool[B, T, S]: may query t see key s."""
    causal = query_positions[:, :, None] >= key_positions[:, None, :]
    return causal & (query_segments[:, :, None] == key_segments[:, None, :])


def _reference(q_BTHK, k_BSNK, v_BSNK, visible_BTS):
    B, T, H, K = q_BTHK.shape
    N = k_BSNK.shape[2]
    q_BTNGK = (q_BTHK * K**-0.5).reshape(B, T, N, H // N, K)
    scores = jnp.einsum("BTNGK,BSNK->BNGTS", q_BTNGK, k_BSNK, preferred_element_type=jnp.float32)
    scores = jnp.where(visible_BTS[:, None, None], scores, MASKED)
    weights = jax.nn.softmax(scores, axis=-1).astype(v_BSNK.dtype)
    return checkpoint_name(jnp.einsum("BNGTS,BSNK->BTNGK", weights, v_BSNK).reshape(B, T, H, K), "attention_out")


def _cudnn(q_BTHK, k_BSNK, v_BSNK, visible_BTS):
    if platform() != "gpu":
        raise ValueError(f"expected a GPU for attention backend cudnn, got {platform()}; use auto")
    if q_BTHK.dtype not in (jnp.bfloat16, jnp.float16):
        raise ValueError(f"expected bfloat16 or float16 for attention backend cudnn, got {q_BTHK.dtype}; use blockwise")
    o_BTHK = jax.nn.dot_product_attention(q_BTHK, k_BSNK, v_BSNK, mask=visible_BTS[:, None], implementation="cudnn")
    return checkpoint_name(o_BTHK, "attention_out")


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
    o_nXQK, logz_nXQ = tag(jnp.stack(outs), jnp.stack(logzs))
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
