"""Per-token statistics of a vocabulary distribution, without ever holding the whole [T, V] array of logits.

Mid-training, SFT, the PPO actor and its reference all take log-probability, entropy and log-partition from here. The
vocabulary is walked in tiles and the tokens in chunks, with a running log-sum-exp; the backward pass recomputes each
piece's logits from x and w_VD. Memory is O(chunk * V / tiles) in both directions: float32 logits of one 128K-token
sequence over 152K vocabulary entries would be 74 GiB. Under shard_map the unembedding may be split: a tile is gathered
when its turn comes and its gradient is scattered before the next one, so neither is ever whole on a device.

Shape suffixes: T tokens, D model width, V vocabulary.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp


@dataclasses.dataclass(frozen=True)
class Head:
    """How the unembedding w_VD given to `token_stats` is split.

    v_axes, d_axes: mesh axes that V and D are split over and that a tile is gathered from.
    tensor: (axis, size) that V is split over and stays split over: each device sees its own part, and statistics are
        summed. ("", 1) when there is none.
    tiles: slices of V, each computed in its turn.
    """

    v_axes: tuple[str, ...] = ()
    d_axes: tuple[str, ...] = ()
    tensor: tuple[str, int] = ("", 1)
    tiles: int = 1


def token_stats(
    x_TD: jax.Array,
    w_VD: jax.Array,
    targets_T: jax.Array,
    *,
    chunk: int,
    temperature: float = 1.0,
    head: Head = Head(),
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Log-probability of the target, entropy and log-partition of softmax(x @ w_VD.T / temperature), per token.

    Gradients are exact through all three results. Matrix products run in x's dtype and accumulate in float32; all
    else is float32.

    Args:
        x_TD: final hidden states.
        w_VD: unembedding.
        targets_T: int32 target ids in [0, V).
        chunk: tokens whose logits exist at a time; T need not be a multiple.
        temperature: divides the logits.
        head: layout of w; inside shard_map, its mesh axes.

    Returns:
        (logprob_T, entropy_T in nats, logz_T), float32.
    """
    if chunk < 1:
        raise ValueError(f"expected chunk of at least 1 token, got {chunk}")
    if w_VD.shape[0] % head.tiles:
        raise ValueError(
            f"expected a number of tiles that divides {w_VD.shape[0]} vocabulary entries, got {head.tiles}"
        )
    T = x_TD.shape[0]
    chunk = min(chunk, T)
    pad = -T % chunk
    if pad:  # zero rows give finite statistics, and get zero cotangents when sliced off
        x_TD = jnp.pad(x_TD, ((0, pad), (0, 0)))
        targets_T = jnp.pad(targets_T, (0, pad))
    stats = _stats(x_TD, w_VD, targets_T, chunk, float(temperature), head)
    return tuple(s_T[:T] for s_T in stats)


def _gathered(tile_VD, head: Head):
    for axis in reversed(head.d_axes):
        tile_VD = jax.lax.all_gather(tile_VD, axis, axis=1, tiled=True)
    for axis in reversed(head.v_axes):
        tile_VD = jax.lax.all_gather(tile_VD, axis, axis=0, tiled=True)
    return tile_VD


def _scattered(g_tile, head: Head):
    """The transpose of `_gathered`: this device's part of the sum of all devices' gradients."""
    for axis in head.v_axes:
        g_tile = jax.lax.psum_scatter(g_tile, axis, scatter_dimension=0, tiled=True)
    for axis in head.d_axes:
        g_tile = jax.lax.psum_scatter(g_tile, axis, scatter_dimension=1, tiled=True)
    return g_tile


def _tile(w_VD, index, dtype, head: Head):
    """(tile of the unembedding in dtype, int32 ids of its tokens)."""
    width = w_VD.shape[0] // head.tiles
    piece = jax.lax.dynamic_slice_in_dim(w_VD, index * width, width, axis=0) if head.tiles > 1 else w_VD
    tile_VD = _gathered(piece.astype(dtype), head)
    blocks = tile_VD.shape[0] // width
    first = jax.lax.axis_index(head.tensor[0]) * (w_VD.shape[0] * blocks) if head.tensor[1] > 1 else 0
    block_starts = first + jnp.arange(blocks, dtype=jnp.int32) * w_VD.shape[0] + index * width
    return tile_VD, (block_starts[:, None] + jnp.arange(width, dtype=jnp.int32)).reshape(-1)


def _logits(x_cD, tile_VD, temperature):
    logits_cV = jnp.einsum("cD,VD->cV", x_cD, tile_VD, preferred_element_type=jnp.float32)
    return logits_cV if temperature == 1.0 else logits_cV / temperature


def _sums(x_cD, targets_c, tile_VD, ids_V, temperature):
    """(largest logit, sum of exp, sum of exp * logit, logit of the target or 0), the sums relative to the largest."""
    logits_cV = _logits(x_cD, tile_VD, temperature)
    largest_c = jnp.max(logits_cV, axis=-1)
    exp_cV = jnp.exp(logits_cV - largest_c[:, None])
    target_c = jnp.sum(jnp.where(targets_c[:, None] == ids_V, logits_cV, 0.0), axis=-1)
    return largest_c, jnp.sum(exp_cV, axis=-1), jnp.sum(exp_cV * logits_cV, axis=-1), target_c


def _merged(a, b):
    largest = jnp.maximum(a[0], b[0])
    scale_a, scale_b = jnp.exp(a[0] - largest), jnp.exp(b[0] - largest)
    return largest, a[1] * scale_a + b[1] * scale_b, a[2] * scale_a + b[2] * scale_b, a[3] + b[3]


def _in_chunks(body, arrays, chunk):
    """body over pieces of `chunk` tokens of each [T, ...] array; results joined again."""
    T = arrays[0].shape[0]
    if T == chunk:
        return body(arrays)
    split = jax.tree.map(lambda a: a.reshape(-1, chunk, *a.shape[1:]), arrays)
    _, out = jax.lax.scan(lambda _, piece: (None, body(piece)), None, split)
    return jax.tree.map(lambda a: a.reshape(T, *a.shape[2:]), out)


@functools.partial(jax.custom_vjp, nondiff_argnums=(3, 4, 5))
def _stats(x_TD, w_VD, targets_T, chunk, temperature, head):
    def tile_sums(index):
        tile_VD, ids_V = _tile(w_VD, index, x_TD.dtype, head)
        return _in_chunks(lambda xt: _sums(*xt, tile_VD, ids_V, temperature), (x_TD, targets_T), chunk)

    if head.tiles == 1:
        sums = tile_sums(0)
    else:
        zero_T = jnp.zeros(x_TD.shape[:1], jnp.float32)
        nothing = (zero_T - 1e30, zero_T, zero_T, zero_T)
        sums, _ = jax.lax.scan(lambda s, index: (_merged(s, tile_sums(index)), None), nothing, jnp.arange(head.tiles))
    largest_T, total_T, weighted_T, target_T = sums
    if head.tensor[1] > 1:
        axis = head.tensor[0]
        over_all = jax.lax.pmax(largest_T, axis)
        scale_T = jnp.exp(largest_T - over_all)
        largest_T = over_all
        total_T, weighted_T, target_T = jax.lax.psum((total_T * scale_T, weighted_T * scale_T, target_T), axis)
    logz_T = jnp.log(total_T) + largest_T
    return target_T - logz_T, logz_T - weighted_T / total_T, logz_T


def _forward(x_TD, w_VD, targets_T, chunk, temperature, head):
    logprob_T, entropy_T, logz_T = _stats(x_TD, w_VD, targets_T, chunk, temperature, head)
    return (logprob_T, entropy_T, logz_T), (x_TD, w_VD, targets_T, entropy_T, logz_T)


def _g_logits(x_cD, targets_c, entropy_c, logz_c, cotangents, tile_VD, ids_V, temperature):
    """Gradient of the logits of one piece: with z the scaled logits and p = softmax(z),

    d logprob / dz = onehot - p,   d entropy / dz = -p (log p + entropy),   d logz / dz = p.
    """
    g_logprob_c, g_entropy_c, g_logz_c = cotangents
    logp_cV = _logits(x_cD, tile_VD, temperature) - logz_c[:, None]
    slope_c = g_logz_c - g_logprob_c - g_entropy_c * entropy_c
    g_cV = jnp.exp(logp_cV) * (slope_c[:, None] - g_entropy_c[:, None] * logp_cV)
    g_cV = jnp.where(targets_c[:, None] == ids_V, g_cV + g_logprob_c[:, None], g_cV)
    if temperature != 1.0:
        g_cV = g_cV / temperature
    return g_cV.astype(x_cD.dtype)


def _backward(chunk, temperature, head, saved, cotangents):
    x_TD, w_VD, targets_T, entropy_T, logz_T = saved
    per_token = (x_TD, targets_T, entropy_T, logz_T, tuple(cotangents))

    def tile_gradients(index):
        """(gradient of x through this tile, float32[T, D]; gradient of this device's part of the tile)."""
        tile_VD, ids_V = _tile(w_VD, index, x_TD.dtype, head)

        def chunk_gradients(piece):
            g_cV = _g_logits(*piece, tile_VD, ids_V, temperature)
            return (
                jnp.einsum("cV,VD->cD", g_cV, tile_VD, preferred_element_type=jnp.float32),
                jnp.einsum("cV,cD->VD", g_cV, piece[0], preferred_element_type=jnp.float32),
            )

        if x_TD.shape[0] == chunk:
            g_x_TD, g_tile = chunk_gradients(per_token)
        else:
            split = jax.tree.map(lambda a: a.reshape(-1, chunk, *a.shape[1:]), per_token)

            def add(g_tile, piece):
                g_x_cD, more = chunk_gradients(piece)
                return g_tile + more, g_x_cD

            g_tile, g_x = jax.lax.scan(add, jnp.zeros(tile_VD.shape, jnp.float32), split)
            g_x_TD = g_x.reshape(x_TD.shape)
        return g_x_TD, _scattered(g_tile, head)

    if head.tiles == 1:
        g_x_TD, g_w = tile_gradients(0)
    else:
        width = w_VD.shape[0] // head.tiles

        def add_tile(carry, index):
            g_x_TD, g_w = carry
            more, g_tile = tile_gradients(index)
            return (g_x_TD + more, jax.lax.dynamic_update_slice_in_dim(g_w, g_tile, index * width, 0)), None

        start = (jnp.zeros(x_TD.shape, jnp.float32), jnp.zeros(w_VD.shape, jnp.float32))
        (g_x_TD, g_w), _ = jax.lax.scan(add_tile, start, jnp.arange(head.tiles))
    if head.tensor[1] > 1:
        g_x_TD = jax.lax.psum(g_x_TD, head.tensor[0])
    return g_x_TD.astype(x_TD.dtype), g_w.astype(w_VD.dtype), None


_stats.defvjp(_forward, _backward)
