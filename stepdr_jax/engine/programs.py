"""The sampler's compiled programs: prefill a chunk, decode some steps, move a slot out of the cache and back.

Shapes are fixed by (slots, max_len, rows, chunk, steps), so each program compiles once. Every row of a program is
computed independently of the others and always over the whole cache length: what a sequence samples does not depend on
what else is in flight. The cache is donated and updated in place.

The cache keeps K as [slots, N, K, S] and V as [slots, N, S, K], one array a layer: scores then run along the contiguous
axis, which is what makes a decode step of many slots fast on CPU.

Invariant that all programs share: the K/V of every known token of a sequence is in the cache, except the last one's. A
decode step writes that one and samples the next; prefill therefore never needs logits.
"""

import functools

import jax
import jax.numpy as jnp

from stepdr_jax.models import qwen2
from stepdr_jax.models.qwen2 import Qwen2Config, unembedding

MASKED = -1e30  # score of a cache entry that is not written yet
SAMPLING_BLOCK = 64  # words of one block of the two-stage draw
BASE_KEY = 0  # root of all sampling keys; a request's own seed is folded into it


@functools.partial(jax.jit, static_argnames="config")
def prepare(params: dict, *, config: Qwen2Config) -> dict:
    """Copies a parameter tree into the sampler's layout: layers unstacked, unembedding [D, V] in compute dtype.

    A copy, because the trainer donates its own parameters to its step.
    """
    dtype = jnp.dtype(config.dtype)
    layers = [jax.tree.map(lambda w, i=i: jnp.copy(w[i]), params["layers"]) for i in range(config.num_layers)]
    return {
        "embedding": jnp.copy(params["embedding"]),
        "final_norm": jnp.copy(params["final_norm"]),
        "layers": layers,
        "unembedding": jnp.copy(unembedding(params).T).astype(dtype),
    }


def init_cache(config: Qwen2Config, slots: int, max_len: int) -> list[dict[str, jax.Array]]:
    """Per layer {"k": [slots, N, K, S], "v": [slots, N, S, K]} of zeros in config.dtype; S = max_len."""
    N, K = config.num_kv_heads, config.head_dim
    return [
        {
            "k": jnp.zeros((slots, N, K, max_len), config.dtype),
            "v": jnp.zeros((slots, N, max_len, K), config.dtype),
        }
        for _ in range(config.num_layers)
    ]


def _forward(weights, cache, slots_B, tokens_BT, positions_BT, valid_BT, config):
    """Writes K/V of the valid tokens and returns (x_BTD after the last norm, cache). slots_B None: row b is slot b."""
    dtype = jnp.dtype(config.dtype)
    B, T = tokens_BT.shape
    H, N, K = config.num_heads, config.num_kv_heads, config.head_dim
    S = cache[0]["k"].shape[-1]
    cos_BTk, sin_BTk = qwen2.rotary(positions_BT, config)
    write_BT = jnp.where(valid_BT, positions_BT, S)  # S is out of bounds, and an out-of-bounds write is dropped
    hidden_BTS = jnp.arange(S)[None, None, :] > positions_BT[:, :, None]
    rows_B1 = (jnp.arange(B) if slots_B is None else slots_B)[:, None]
    x_BTD = weights["embedding"][tokens_BT].astype(dtype)
    written = []
    for w, kv in zip(weights["layers"], cache, strict=True):
        q_BTHK, k_BTNK, v_BTNK = qwen2.project_qkv(x_BTD, w, cos_BTk, sin_BTk, config)
        if T == 1 and slots_B is None:
            written.append(jax.lax.platform_dependent(kv, k_BTNK, v_BTNK, write_BT, cpu=_scatter, default=_select))
        else:
            written.append(_scatter(kv, k_BTNK, v_BTNK, write_BT, rows_B1))
        k_slots, v_slots = written[-1]["k"], written[-1]["v"]
        k_BNKS, v_BNSK = (k_slots, v_slots) if slots_B is None else (k_slots[slots_B], v_slots[slots_B])
        q_BNGTK = (q_BTHK * K**-0.5).reshape(B, T, N, H // N, K).transpose(0, 2, 3, 1, 4)
        scores = jnp.einsum("BNGTK,BNKS->BNGTS", q_BNGTK, k_BNKS, preferred_element_type=jnp.float32)
        scores = jnp.where(hidden_BTS[:, None, None], MASKED, scores)
        weights_BNGTS = jnp.exp(scores - jnp.max(scores, axis=-1, keepdims=True))
        total_BNGT = jnp.sum(weights_BNGTS, axis=-1)
        o_BNGTK = _weighted_values(weights_BNGTS.astype(dtype), v_BNSK)
        o_BNGTK = (o_BNGTK / total_BNGT[..., None]).astype(dtype)
        o_BTHK = o_BNGTK.transpose(0, 3, 1, 2, 4).reshape(B, T, H, K)
        x_BTD = x_BTD + qwen2.attention_output(o_BTHK, w)
        x_BTD = x_BTD + qwen2.mlp(x_BTD, w, config)
    return qwen2.rms_norm(x_BTD, weights["final_norm"], config.rms_norm_eps), written


def _scatter(kv, k_BTNK, v_BTNK, write_BT, rows_B1=None):
    """Writes each row's tokens at their positions, in the slots `rows_B1` (row b in slot b without it)."""
    rows_B1 = jnp.arange(write_BT.shape[0])[:, None] if rows_B1 is None else rows_B1
    return {
        "k": kv["k"].at[rows_B1, :, :, write_BT].set(k_BTNK, mode="drop"),
        "v": kv["v"].at[rows_B1, :, write_BT].set(v_BTNK, mode="drop"),
    }


def _select(kv, k_B1NK, v_B1NK, write_B1):
    """The same for one token a row, as a pass over the cache that attention then reads anyway.

    XLA for TPU lays the whole cache out again for a scatter, in every step.
    """
    here_BS = jnp.arange(kv["v"].shape[2]) == write_B1
    return {
        "k": jnp.where(here_BS[:, None, None, :], k_B1NK[:, 0, :, :, None], kv["k"]),
        "v": jnp.where(here_BS[:, None, :, None], v_B1NK[:, 0, :, None, :], kv["v"]),
    }


def _weighted_values(weights_BNGTS, v_BNSK):
    """Unnormalised attention output, float32[B, N, G, T, K]."""
    G, T = weights_BNGTS.shape[2:4]
    if T == 1 and G > 1 and jax.default_backend() == "cpu":
        # One query a row: a fused multiply and sum is twice as fast on CPU as many tiny matrix products; with one query
        # head to a key head (G = 1) XLA makes of it a loop that is ten times slower.
        product = weights_BNGTS[:, :, :, 0, :, None] * v_BNSK[:, :, None]
        return jnp.sum(product, axis=3, dtype=jnp.float32)[:, :, :, None]
    return jnp.einsum("BNGTS,BNSK->BNGTK", weights_BNGTS, v_BNSK, preferred_element_type=jnp.float32)


@functools.partial(jax.jit, static_argnames="config", donate_argnames="cache")
def prefill(weights, cache, slots_R, tokens_RC, start_R, count_R, *, config: Qwen2Config):
    """Writes the K/V of one chunk of up to C tokens for each of R sequences; returns the cache.

    Args:
        weights: from `prepare`.
        cache: from `init_cache`; donated.
        slots_R: int32 slot of each row; rows in use have different slots.
        tokens_RC: int32 ids.
        start_R: int32 position of each row's first token.
        count_R: int32 tokens that count; 0 for an unused row.
        config: model shape.
    """
    offsets_C = jnp.arange(tokens_RC.shape[1])
    positions_RC = start_R[:, None] + offsets_C[None, :]
    valid_RC = offsets_C[None, :] < count_R[:, None]
    return _forward(weights, cache, slots_R, tokens_RC, positions_RC, valid_RC, config)[1]


@functools.partial(jax.jit, static_argnames=("config", "steps"), donate_argnames="cache")
def decode(weights, cache, state: dict, stop_ids_I, *, config: Qwen2Config, steps: int):
    """Samples up to `steps` tokens in every slot that has `remaining` > 0; returns (cache, ids, logprobs).

    Args:
        weights: from `prepare`.
        cache: donated.
        state: per slot: token int32 (last known id), position int32 (its index in the sequence), remaining int32 (tokens
            it may still sample, 0 = slot not in use), seed uint32, temperature float32 (0 = the most probable token).
        stop_ids_I: int32 ids that end a generation when sampled.
        config: model shape.
        steps: tokens per call.

    Returns:
        cache; ids_Bs int32[slots, steps], -1 where nothing was sampled; logprobs_Bs float32 at the request's temperature
        (at temperature 1 for greedy requests).
    """
    B = state["token"].shape[0]
    root = jax.random.PRNGKey(BASE_KEY)
    keys_B = jax.vmap(lambda seed: jax.random.fold_in(root, seed))(state["seed"])

    def keep_going(carry):
        step, _, _, _, remaining_B, _, _ = carry
        return (step < steps) & jnp.any(remaining_B > 0)

    def body(carry):
        step, cache, token_B, position_B, remaining_B, ids_sB, logprobs_sB = carry
        active_B = remaining_B > 0
        x_B1D, cache = _forward(weights, cache, None, token_B[:, None], position_B[:, None], active_B[:, None], config)
        logits_BV = jnp.einsum("BD,DV->BV", x_B1D[:, 0], weights["unembedding"], preferred_element_type=jnp.float32)
        next_B, logprob_B = sample(logits_BV, keys_B, position_B + 1, state["temperature"])
        stopped_B = jnp.any(next_B[:, None] == stop_ids_I[None, :], axis=-1)
        ids_sB = ids_sB.at[step].set(jnp.where(active_B, next_B, -1))
        logprobs_sB = logprobs_sB.at[step].set(logprob_B)
        token_B = jnp.where(active_B, next_B, token_B)
        position_B = jnp.where(active_B, position_B + 1, position_B)
        remaining_B = jnp.where(active_B & ~stopped_B, remaining_B - 1, 0)
        return step + 1, cache, token_B, position_B, remaining_B, ids_sB, logprobs_sB

    carry = (
        jnp.int32(0),
        cache,
        state["token"],
        state["position"],
        state["remaining"],
        jnp.full((steps, B), -1, jnp.int32),
        jnp.zeros((steps, B), jnp.float32),
    )
    _, cache, _, _, _, ids_sB, logprobs_sB = jax.lax.while_loop(keep_going, body, carry)
    return cache, ids_sB.T, logprobs_sB.T


def sample(logits_BV, keys_B, index_B, temperature_B):
    """Draws one token a row and its log-probability: log_softmax(logits / T), as `ops.vocab_loss.token_stats` has it.

    The draw inverts the cumulative distribution in two stages, a block of words and then a word in it, with one uniform
    number each: two random numbers a row instead of V, and float32 sums stay short enough not to lose rare words.

    Args:
        logits_BV: float32.
        keys_B: one key a row; the token's index is folded in, so the draw does not depend on the batch or its history.
        index_B: int32 index of the sampled token in its sequence.
        temperature_B: float32; 0 takes the most probable token and reports its log-probability at temperature 1.
    """
    B, V = logits_BV.shape
    greedy_B = temperature_B == 0
    scaled_BV = logits_BV / jnp.where(greedy_B, 1.0, temperature_B)[:, None]
    shifted_BV = scaled_BV - jnp.max(scaled_BV, axis=-1, keepdims=True)
    weight_BV = jnp.pad(jnp.exp(shifted_BV), ((0, 0), (0, -V % SAMPLING_BLOCK)))
    weight_Bbw = weight_BV.reshape(B, -1, SAMPLING_BLOCK)
    block_Bb = jnp.sum(weight_Bbw, axis=-1)
    total_B = jnp.sum(block_Bb, axis=-1)
    uniform_B2 = jax.vmap(lambda key, index: jax.random.uniform(jax.random.fold_in(key, index), (2,)))(keys_B, index_B)
    chosen_B = _invert(block_Bb, uniform_B2[:, 0])
    words_Bw = jnp.take_along_axis(weight_Bbw, chosen_B[:, None, None], axis=1)[:, 0]
    drawn_B = chosen_B * SAMPLING_BLOCK + _invert(words_Bw, uniform_B2[:, 1])
    best_B = jnp.argmax(shifted_BV >= 0, axis=-1)  # the first of the largest; argmax of a mask is a cheap reduction
    token_B = jnp.where(greedy_B, best_B, drawn_B).astype(jnp.int32)
    logprob_B = jnp.take_along_axis(shifted_BV, token_B[:, None], axis=-1)[:, 0] - jnp.log(total_B)
    return token_B, logprob_B


def _invert(weight_Bn, uniform_B):
    """The first index at which the running sum of weights exceeds uniform * total; never one of weight 0."""
    cumulative_Bn = jnp.cumsum(weight_Bn, axis=-1)
    # Below 1 by more than a rounding step, so that the threshold stays below the total.
    threshold_B1 = jnp.minimum(uniform_B, 1 - 2.0**-20)[:, None] * cumulative_Bn[:, -1:]
    return jnp.sum(cumulative_Bn <= threshold_B1, axis=-1)


@jax.jit
def read_slot(cache, slot):
    """Copies one slot's K/V out of the cache: per layer {"k": [N, K, S], "v": [N, S, K]}."""
    return jax.tree.map(lambda kv: jax.lax.dynamic_index_in_dim(kv, slot, keepdims=False), cache)


@functools.partial(jax.jit, donate_argnames="cache")
def write_slot(cache, slot, stored):
    """Puts what `read_slot` returned into a slot, bit for bit; the cache is donated."""
    return jax.tree.map(lambda kv, one: jax.lax.dynamic_update_index_in_dim(kv, one, slot, 0), cache, stored)
