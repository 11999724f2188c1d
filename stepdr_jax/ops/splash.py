"""The attention kernel for TPUs: a thin layer over JAX's Pallas splash attention, forward with residuals and backward.

The library's own gradient knows one call's log-sum-exp only, so its forward, dq and dkv passes are called by their
private names (the version of jax is pinned, and the tests run them in interpret mode). Which blocks run is worked out
here from the rows of the queries: cheap at any length, and per device where the device is known at run time only.

Shape suffixes: B sequences, T tokens (of queries), H query heads, N key-value heads, S tokens of keys, K head
dimension.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as library
from jax.experimental.pallas.ops.tpu.splash_attention.splash_attention_mask_info import MaskInfo

from stepdr_jax.ops.flash import Kernel, Order, Rows

LANES = 128  # lengths must be multiples: the width of a TPU's vector registers


def kernel(block: int = 1024, compute: int = 512) -> Kernel:
    """Attention in VMEM tiles of at most `block` queries and keys, `compute` keys at a time.

    Raises ValueError when called on lengths that are no multiple of 128 or by positions instead of rows.
    """
    return Kernel(functools.partial(_forward, block, compute), functools.partial(_backward, block, compute))


def _block(length: int, largest: int) -> int:
    """The largest multiple of 128 that divides length, up to `largest`."""
    if length % LANES:
        raise ValueError(f"expected lengths in multiples of {LANES} tokens for attention backend splash, got {length}")
    return max(size for size in range(LANES, largest + 1, LANES) if length % size == 0)


def _sees(query_row, key_row):
    return query_row >= key_row


def _causal(order: Rows, keys: int, block_q: int, block_k: int, *, for_keys: bool) -> MaskInfo:
    """Which blocks run, for all devices of order.table, and those of order.device taken.

    data_next says which block to have in VMEM at a grid step that runs nothing: the next one that will run.
    for_keys: the grid of the dkv pass, which walks over the queries of each key block.
    """
    last = order.table.reshape(len(order.table), -1, block_q).max(axis=-1)[:, :, None]
    runs = last >= np.arange(keys // block_k)[None, None] * block_k
    if for_keys:
        first = np.where(runs.any(axis=1), runs.argmax(axis=1), runs.shape[1] - 1)
        following = np.maximum(np.arange(runs.shape[1])[None, :, None], first[:, None])
    else:
        following = np.where(runs, np.arange(runs.shape[2])[None, None], 0)
    small = np.int8 if following.max() < 128 else np.int16

    def mine(x):
        return jnp.asarray(x)[order.device]

    return MaskInfo(
        data_next=mine(following.astype(small))[None],
        mask_next=None,
        block_mask=mine(runs.astype(np.int8))[None],
        partial_mask_blocks=None,
        q_sequence=mine(order.table),
    )


_EVERY_BLOCK = MaskInfo(None, None, None, None, None)


def _mask(order: Order, keys: int, block_q: int, block_k: int, *, for_keys: bool = False):
    """(MaskInfo, function of the rows that masks inside a block)."""
    if order is None:
        return _EVERY_BLOCK, None
    if not isinstance(order, Rows):
        raise ValueError("expected rows in order for attention backend splash, got positions; use blockwise")
    return _causal(order, keys, block_q, block_k, for_keys=for_keys), _sees


def _forward(block, compute, q_BHTK, k_BNSK, v_BNSK, query_segments_BT, key_segments_BS, order):
    S = k_BNSK.shape[2]
    block_q, block_k = _block(q_BHTK.shape[2], block), _block(S, block)
    mask, sees = _mask(order, S, block_q, block_k)

    def one(q, k, v, query_segments, key_segments):
        o, (lse,) = library._splash_attention_forward(
            mask,
            q,
            k,
            v,
            library.SegmentIds(query_segments, key_segments),
            None,
            library.DEFAULT_MASK_VALUE,
            False,
            library.BlockSizes(block_q, block_k, _block(block_k, compute)),
            None,
            True,
            sees,
        )
        return o, lse

    return jax.vmap(one)(q_BHTK, k_BNSK, v_BNSK, query_segments_BT, key_segments_BS)


def _backward(
    block, compute, q_BHTK, k_BNSK, v_BNSK, query_segments_BT, key_segments_BS, order, g_BHTK, lse_BHT, offset_BHT
):
    S = k_BNSK.shape[2]
    block_q, block_k = _block(q_BHTK.shape[2], block), _block(S, block)
    options = dict(
        bq=block_q,
        bkv=block_k,
        is_mqa=False,
        mask_value=library.DEFAULT_MASK_VALUE,
        attn_logits_soft_cap=None,
        q_layout=library.QKVLayout.HEAD_DIM_MINOR,
        k_layout=library.QKVLayout.HEAD_DIM_MINOR,
        v_layout=library.QKVLayout.HEAD_DIM_MINOR,
        interpret=False,
    )
    mask, sees = _mask(order, S, block_q, block_k)
    mask_for_keys, _ = _mask(order, S, block_q, block_k, for_keys=True)

    def one(q, k, v, query_segments, key_segments, g, lse, offset):
        arguments = (q, k, v, library.SegmentIds(query_segments, key_segments), None, lse, g, offset)
        _, g_k, g_v = library._splash_attention_bwd_dkv(
            *arguments,
            **options,
            bkv_compute=_block(block_k, compute),
            mask_info=mask_for_keys,
            mask_function=sees,
            use_fused_bwd_kernel=False,
        )
        g_q = library._splash_attention_bwd_dq(*arguments, **options, mask_info=mask, mask_function=sees)
        return g_q, g_k, g_v

    return jax.vmap(one)(q_BHTK, k_BNSK, v_BNSK, query_segments_BT, key_segments_BS, g_BHTK, lse_BHT, offset_BHT)
