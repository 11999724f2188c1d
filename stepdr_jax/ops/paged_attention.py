"""Attention of new tokens over K/V that are kept in pages of a fixed number of tokens.

A sequence's tokens are in the pages that its row of a table names, in order: token s is in page table[s // page_size]
at offset s % page_size. Two backends keep pages differently:

`reference`, pure jnp: {"k": [P, N, K, s], "v": [P, N, s, K]}. Scores run along the contiguous axis, which makes a
decode step of many sequences fast on CPU. Where a page is as long as a sequence may be, nothing is gathered.
`ragged`, the Pallas kernel of jax.experimental for TPUs: one array [P, s, 2N, K], keys in the even heads.

Shape suffixes: B sequences, T tokens (of queries), S tokens of keys, H query heads, N key-value heads, G = H / N, K
head dimension, M pages of a sequence, P pages, s tokens of a page.
"""

from typing import Any

import jax
import jax.numpy as jnp

MASKED = -1e30  # score of a token that is not written yet
BACKENDS = ("reference", "ragged")
RAGGED_HEAD_DIM = 128  # the kernel takes heads of a multiple of this
# What the kernel holds in VMEM at a time. It has a table of tuned sizes, but looks them up for the device at hand,
# which is the wrong one when programs are compiled ahead of time.
BLOCK_BYTES, BLOCK_QUERIES = 1 << 20, 32


def choose(platform: str, head_dim: int) -> str:
    """The backend for a platform: the kernel where it runs."""
    return "ragged" if platform == "tpu" and head_dim % RAGGED_HEAD_DIM == 0 else "reference"


def init_pages(backend: str, num_pages: int, page_size: int, kv_heads: int, head_dim: int, dtype) -> Any:
    """Zeroed pages of one layer."""
    if backend == "ragged":
        return jnp.zeros((num_pages, page_size, 2 * kv_heads, head_dim), dtype)
    return {
        "k": jnp.zeros((num_pages, kv_heads, head_dim, page_size), dtype),
        "v": jnp.zeros((num_pages, kv_heads, page_size, head_dim), dtype),
    }


def places(table_BM, positions_BT, valid_BT, *, num_pages: int, page_size: int):
    """(page, offset) int32[B, T] of each token; for tokens that are not valid a page that does not exist."""
    column_BT = jnp.minimum(positions_BT // page_size, table_BM.shape[1] - 1)
    page_BT = jnp.take_along_axis(table_BM, column_BT, axis=1)
    return jnp.where(valid_BT, page_BT, num_pages), positions_BT % page_size


def write(pages, k_BTNK, v_BTNK, places_BT):
    """Puts new K/V at `places`; what has no place is dropped."""
    page_BT, offset_BT = places_BT
    if not isinstance(pages, dict):
        B, T, N, K = k_BTNK.shape
        kv_BTCK = jnp.stack([k_BTNK, v_BTNK], axis=3).reshape(B, T, 2 * N, K)
        return pages.at[page_BT, offset_BT].set(kv_BTCK, mode="drop")
    return {
        "k": pages["k"].at[page_BT, :, :, offset_BT].set(k_BTNK, mode="drop"),
        "v": pages["v"].at[page_BT, :, offset_BT].set(v_BTNK, mode="drop"),
    }


def attend(q_BTHK, pages, table_BM, positions_BT):
    """o_BTHK: each query over its sequence's tokens up to its own position, scaled by 1 / sqrt(K).

    Args:
        q_BTHK: rotated queries; rows of T tokens at consecutive positions.
        pages: of one layer, the new tokens' K/V already written.
        table_BM: int32 pages of each row; None: row b has page b, which holds a whole sequence.
        positions_BT: int32.

    Rows that are not in use give numbers without meaning.
    """
    if not isinstance(pages, dict):
        return _ragged(q_BTHK, pages, table_BM, positions_BT)
    B, T, H, K = q_BTHK.shape
    k_BNKS, v_BNSK = pages["k"], pages["v"]
    if table_BM is not None:
        M = table_BM.shape[1]
        gathered_BMNKs, gathered_BMNsK = k_BNKS[table_BM], v_BNSK[table_BM]
        N, page_size = k_BNKS.shape[1], k_BNKS.shape[3]
        k_BNKS = gathered_BMNKs.transpose(0, 2, 3, 1, 4).reshape(B, N, K, M * page_size)
        v_BNSK = gathered_BMNsK.transpose(0, 2, 1, 3, 4).reshape(B, N, M * page_size, K)
    N, S = v_BNSK.shape[1:3]
    hidden_BTS = jnp.arange(S)[None, None, :] > positions_BT[:, :, None]
    q_BNGTK = (q_BTHK * K**-0.5).reshape(B, T, N, H // N, K).transpose(0, 2, 3, 1, 4)
    scores = jnp.einsum("BNGTK,BNKS->BNGTS", q_BNGTK, k_BNKS, preferred_element_type=jnp.float32)
    scores = jnp.where(hidden_BTS[:, None, None], MASKED, scores)
    weights_BNGTS = jnp.exp(scores - jnp.max(scores, axis=-1, keepdims=True))
    total_BNGT = jnp.sum(weights_BNGTS, axis=-1)
    o_BNGTK = _weighted_values(weights_BNGTS.astype(q_BTHK.dtype), v_BNSK)
    o_BNGTK = (o_BNGTK / total_BNGT[..., None]).astype(q_BTHK.dtype)
    return o_BNGTK.transpose(0, 3, 1, 2, 4).reshape(B, T, H, K)


def _weighted_values(weights_BNGTS, v_BNSK):
    """Unnormalized attention output, float32[B, N, G, T, K]."""
    G, T = weights_BNGTS.shape[2:4]
    if T == 1 and G > 1 and jax.default_backend() == "cpu":
        # One query a row: a fused multiply and sum is twice as fast on CPU as many tiny matrix products; with one query
        # head to a key head (G = 1) XLA makes of it a loop that is ten times slower.
        product = weights_BNGTS[:, :, :, 0, :, None] * v_BNSK[:, :, None]
        return jnp.sum(product, axis=3, dtype=jnp.float32)[:, :, :, None]
    return jnp.einsum("BNGTS,BNSK->BNGTK", weights_BNGTS, v_BNSK, preferred_element_type=jnp.float32)


def _ragged(q_BTHK, pages_PsCK, table_BM, positions_BT):
    from jax.experimental.pallas.ops.tpu.ragged_paged_attention import ragged_paged_attention

    B, T, H, K = q_BTHK.shape
    page_size = pages_PsCK.shape[1]
    page_bytes = pages_PsCK.size * pages_PsCK.dtype.itemsize // pages_PsCK.shape[0]
    # Every row has T queries, of which the last may be padding: its length then counts tokens that are not written,
    # which only queries without meaning see. Their pages may lie past the table's end.
    table_BM = jnp.pad(table_BM, ((0, 0), (0, -(-T // page_size))))
    o_XHK = ragged_paged_attention(
        q_BTHK.reshape(B * T, H, K),
        pages_PsCK,
        positions_BT[:, 0] + T,
        table_BM,
        jnp.arange(B + 1, dtype=jnp.int32) * T,
        jnp.array([B], jnp.int32),
        sm_scale=K**-0.5,
        num_kv_pages_per_block=min(max(BLOCK_BYTES // page_bytes, 1), table_BM.shape[1]),
        num_queries_per_block=min(BLOCK_QUERIES, B * T),
    )
    return o_XHK.reshape(B, T, H, K)
