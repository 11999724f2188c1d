"""Per-token statistics of a vocabulary distribution, without ever holding the whole [N, V] array of logits.

Mid-training, SFT, the PPO actor and its reference all take log-probability, entropy and log-partition from here. The
backward pass recomputes each chunk's logits from x and w, so the memory is O(chunk * V) in both directions: float32
logits of one 128K-token sequence over 152K words would be 74 GiB.
"""

import functools

import jax
import jax.numpy as jnp


def token_stats(
    x_ND: jax.Array, w_DV: jax.Array, targets_N: jax.Array, *, chunk: int, temperature: float = 1.0
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Log-probability of the target, entropy and log-partition of softmax(x @ w / temperature), per token.

    Gradients are exact through all three results. Matrix products run in x's dtype and accumulate in float32; all
    else is float32.

    Args:
        x_ND: final hidden states.
        w_DV: unembedding.
        targets_N: int32 target ids in [0, V).
        chunk: tokens whose logits exist at a time; N need not be a multiple.
        temperature: divides the logits.

    Returns:
        (logprob_N, entropy_N in nats, logz_N), float32.
    """
    if chunk < 1:
        raise ValueError(f"expected chunk of at least 1 token, got {chunk}")
    N = x_ND.shape[0]
    chunk = min(chunk, N)
    pad = -N % chunk
    if pad:  # zero rows give finite statistics, and get zero cotangents when sliced off
        x_ND = jnp.pad(x_ND, ((0, pad), (0, 0)))
        targets_N = jnp.pad(targets_N, (0, pad))
    stats = _chunked(x_ND, w_DV, targets_N, chunk, float(temperature))
    return tuple(s_N[:N] for s_N in stats)


def _logits(x_cD, w_DV, temperature):
    logits_cV = jnp.einsum("cD,DV->cV", x_cD, w_DV, preferred_element_type=jnp.float32)
    return logits_cV if temperature == 1.0 else logits_cV / temperature


def _forward_chunk(x_cD, w_DV, targets_c, temperature):
    logits_cV = _logits(x_cD, w_DV, temperature)
    largest_c = jnp.max(logits_cV, axis=-1)
    exp_cV = jnp.exp(logits_cV - largest_c[:, None])
    total_c = jnp.sum(exp_cV, axis=-1)
    logz_c = jnp.log(total_c) + largest_c
    mean_logit_c = jnp.sum(exp_cV * logits_cV, axis=-1) / total_c
    target_logit_c = jnp.take_along_axis(logits_cV, targets_c[:, None], axis=-1)[:, 0]
    return target_logit_c - logz_c, logz_c - mean_logit_c, logz_c


def _backward_chunk(x_cD, w_DV, targets_c, entropy_c, logz_c, cotangents, temperature):
    """Gradients of one chunk: with z the scaled logits and p = softmax(z),

    d logprob / dz = onehot - p,   d entropy / dz = -p (log p + entropy),   d logz / dz = p.
    """
    g_logprob_c, g_entropy_c, g_logz_c = cotangents
    logits_cV = _logits(x_cD, w_DV, temperature)
    logp_cV = logits_cV - logz_c[:, None]
    slope_c = g_logz_c - g_logprob_c - g_entropy_c * entropy_c
    g_cV = jnp.exp(logp_cV) * (slope_c[:, None] - g_entropy_c[:, None] * logp_cV)
    hit_cV = targets_c[:, None] == jnp.arange(w_DV.shape[1], dtype=targets_c.dtype)
    g_cV = jnp.where(hit_cV, g_cV + g_logprob_c[:, None], g_cV)
    if temperature != 1.0:
        g_cV = g_cV / temperature
    g_cV = g_cV.astype(x_cD.dtype)
    g_x_cD = jnp.einsum("cV,DV->cD", g_cV, w_DV, preferred_element_type=jnp.float32)
    g_w_DV = jnp.einsum("cD,cV->DV", x_cD, g_cV, preferred_element_type=jnp.float32)
    return g_x_cD, g_w_DV


@functools.partial(jax.custom_vjp, nondiff_argnums=(3, 4))
def _chunked(x_ND, w_DV, targets_N, chunk, temperature):
    w_DV = w_DV.astype(x_ND.dtype)
    if x_ND.shape[0] == chunk:
        return _forward_chunk(x_ND, w_DV, targets_N, temperature)

    def body(_, inputs):
        x_cD, targets_c = inputs
        return None, _forward_chunk(x_cD, w_DV, targets_c, temperature)

    _, stats = jax.lax.scan(body, None, (x_ND.reshape(-1, chunk, x_ND.shape[1]), targets_N.reshape(-1, chunk)))
    return tuple(s.reshape(-1) for s in stats)


def _chunked_forward(x_ND, w_DV, targets_N, chunk, temperature):
    logprob_N, entropy_N, logz_N = _chunked(x_ND, w_DV, targets_N, chunk, temperature)
    return (logprob_N, entropy_N, logz_N), (x_ND, w_DV, targets_N, entropy_N, logz_N)


def _chunked_backward(chunk, temperature, saved, cotangents):
    x_ND, w_DV, targets_N, entropy_N, logz_N = saved
    w_cast_DV = w_DV.astype(x_ND.dtype)
    if x_ND.shape[0] == chunk:
        g_x_ND, g_w_DV = _backward_chunk(x_ND, w_cast_DV, targets_N, entropy_N, logz_N, cotangents, temperature)
        return g_x_ND.astype(x_ND.dtype), g_w_DV.astype(w_DV.dtype), None

    def body(g_w_DV, inputs):
        x_cD, targets_c, entropy_c, logz_c, cotangents_c = inputs
        g_x_cD, g_w_chunk_DV = _backward_chunk(x_cD, w_cast_DV, targets_c, entropy_c, logz_c, cotangents_c, temperature)
        return g_w_DV + g_w_chunk_DV, g_x_cD.astype(x_cD.dtype)

    def split(a):
        return a.reshape(-1, chunk, *a.shape[1:])

    inputs = jax.tree.map(split, (x_ND, targets_N, entropy_N, logz_N, tuple(cotangents)))
    g_w_DV, g_x = jax.lax.scan(body, jnp.zeros(w_DV.shape, jnp.float32), inputs)
    return g_x.reshape(x_ND.shape), g_w_DV.astype(w_DV.dtype), None


_chunked.defvjp(_chunked_forward, _chunked_backward)
