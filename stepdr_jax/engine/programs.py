"""The sampler's compiled programs: prefill a chunk, decode some steps, move pages out of the pool and back.

Shapes are fixed by a `Layout` and the sizes of a call, so each program compiles once. Every row of a program is
computed independently of the others and always over as many tokens: what a sequence samples does not depend on what
else is in flight, nor on where its pages lie. The pool of pages is donated and updated in place.

Invariant that all programs share: the K/V of every known token of a sequence is in its pages, except the last one's. A
decode step writes that one and samples the next; prefill therefore never needs logits.

With a mesh, heads and the vocabulary are split over its axis `tensor`; every device computes the same samples.

Shape suffixes: B sequences of a decode call, R of a prefill call, T tokens, C tokens of a prefill chunk, H query heads,
N key-value heads, K head dimension, D model width, V vocabulary, M pages of a sequence, k = K / 2, s decode steps,
b blocks of the vocabulary, w tokens of a block.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from stepdr_jax.models import qwen2
from stepdr_jax.models.qwen2 import Qwen2Config
from stepdr_jax.ops import paged_attention
from stepdr_jax.sharding import rules
from stepdr_jax.sharding.placement import Placement

SAMPLING_BLOCK = 64  # tokens of one block of the two-stage draw
BASE_KEY = 0  # root of all sampling keys; a request's own seed is folded into it
RULES = rules.ShardingRules()


@dataclasses.dataclass(frozen=True)
class Layout:
    """What a pool of pages looks like; a static argument of every program.

    page_size: tokens of a page. num_pages: in the pool. columns: pages of the longest sequence; 1 means that a page
    holds a whole sequence, and row b of a decode step is then the sequence in page b. attention: of
    `ops.paged_attention.BACKENDS`. mesh: of one axis, `tensor`; None is one device.
    """

    config: Qwen2Config
    page_size: int
    num_pages: int
    columns: int
    attention: str = "reference"
    mesh: Mesh | None = None

    @property
    def tensor(self) -> int:
        return self.mesh.size if self.mesh is not None else 1

    def placement(self) -> Placement:
        return Placement(sizes=(("tensor", self.tensor),) if self.tensor > 1 else ())

    def pool_spec(self) -> PartitionSpec:
        """Of every array of the pool: kv heads over tensor."""
        return PartitionSpec(None, None, "tensor") if self.attention == "ragged" else PartitionSpec(None, "tensor")

    def weight_spec(self, name: str) -> PartitionSpec:
        """Of the sampler's array `name`: split over tensor as the trainer splits it, without the layer axis."""
        if name in ("embedding", "unembedding"):
            return PartitionSpec(None, "tensor")  # V D; D V
        axes = getattr(RULES, name)
        axes = axes if name == "final_norm" else axes[1:]
        return PartitionSpec(*("tensor" if "tensor" in (axis or ()) else None for axis in axes))

    def weight_specs(self, weights: dict) -> dict:
        """PartitionSpec of each of `weights.unstack`'s arrays."""
        ends = {name: self.weight_spec(name) for name in weights if name != "layers"}
        layer = {name: self.weight_spec(name) for name in weights["layers"][0]}
        return ends | {"layers": [layer] * len(weights["layers"])}


def init_pool(layout: Layout, device: jax.Device | None = None) -> list:
    """Zeroed pages, one entry a layer."""
    c = layout.config

    def pool():
        one = functools.partial(paged_attention.init_pages, layout.attention, layout.num_pages, layout.page_size)
        return [one(c.num_kv_heads, c.head_dim, c.dtype) for _ in range(c.num_layers)]

    if layout.mesh is not None:
        return jax.jit(pool, out_shardings=NamedSharding(layout.mesh, layout.pool_spec()))()
    return jax.device_put(pool(), device)  # placed explicitly, as programs return it: one compilation


def _forward(weights, pool, table_BM, tokens_BT, positions_BT, valid_BT, layout: Layout):
    """Writes K/V of the valid tokens and returns (x_BTD after the last norm, pool). table_BM None: row b has page b."""
    config, placement = layout.config, layout.placement()
    rows_BM = jnp.arange(tokens_BT.shape[0])[:, None] if table_BM is None else table_BM
    places_BT = paged_attention.places(
        rows_BM, positions_BT, valid_BT, num_pages=layout.num_pages, page_size=layout.page_size
    )
    cos_BTk, sin_BTk = qwen2.rotary(positions_BT, config)
    x_BTD = weights["embedding"][tokens_BT]
    if layout.tensor > 1:
        x_BTD = jax.lax.all_gather(x_BTD, "tensor", axis=2, tiled=True)
    written = []
    for w, pages in zip(weights["layers"], pool, strict=True):
        q_BTHK, k_BTNK, v_BTNK = qwen2.project_qkv(x_BTD, w, cos_BTk, sin_BTk, config, placement)
        written.append(paged_attention.write(pages, k_BTNK, v_BTNK, places_BT))
        o_BTHK = paged_attention.attend(q_BTHK, written[-1], table_BM, positions_BT)
        x_BTD = x_BTD + qwen2.attention_output(o_BTHK, w, placement)
        x_BTD = x_BTD + qwen2.mlp(x_BTD, w, config, placement)
    return qwen2.rms_norm(x_BTD, weights["final_norm"], config.rms_norm_eps), written


def _on_mesh(work, layout: Layout, weights, pool, *rest, outputs: int):
    """`work(weights, pool, *rest)` -> (pool, and so many outputs), under shard_map where there is a mesh."""
    if layout.mesh is None:
        return work(weights, pool, *rest)
    everywhere = PartitionSpec()
    pools = jax.tree.map(lambda _: layout.pool_spec(), pool)
    return jax.shard_map(
        work,
        mesh=layout.mesh,
        in_specs=(layout.weight_specs(weights), pools, *jax.tree.map(lambda _: everywhere, rest)),
        out_specs=(pools, *(everywhere,) * outputs),
        check_vma=False,
    )(weights, pool, *rest)


@functools.partial(jax.jit, static_argnames="layout", donate_argnames="pool")
def prefill(weights, pool, table_RM, tokens_RC, start_R, count_R, *, layout: Layout):
    """Writes the K/V of one chunk of up to C tokens for each of R sequences; returns the pool.

    Args:
        weights: of `weights.transfer`.
        pool: from `init_pool`; donated.
        table_RM: int32 pages of each row, enough for its chunk; what follows them is not read.
        tokens_RC: int32 ids.
        start_R: int32 position of each row's first token.
        count_R: int32 tokens that count; 0 for an unused row.
        layout: of the pool.
    """

    def work(weights, pool, table_RM, tokens_RC, start_R, count_R):
        offsets_C = jnp.arange(tokens_RC.shape[1])
        positions_RC = start_R[:, None] + offsets_C[None, :]
        valid_RC = offsets_C[None, :] < count_R[:, None]
        return (_forward(weights, pool, table_RM, tokens_RC, positions_RC, valid_RC, layout)[1],)

    return _on_mesh(work, layout, weights, pool, table_RM, tokens_RC, start_R, count_R, outputs=0)[0]


@functools.partial(jax.jit, static_argnames=("layout", "decode_steps"), donate_argnames="pool")
def decode(weights, pool, table_BM, state: dict, stop_ids_I, *, layout: Layout, decode_steps: int):
    """Samples up to `decode_steps` tokens in every row that has `remaining` > 0; returns (pool, ids, logprobs).

    Args:
        weights: of `weights.transfer`.
        pool: donated.
        table_BM: int32 pages of each row, enough for `decode_steps` more tokens; not read where a page holds a
            sequence.
        state: per row: token int32 (last known id), position int32 (its index in the sequence), remaining int32 (tokens
            it may still sample, 0 = row not in use), seed uint32, temperature float32 (0 = the most probable token).
        stop_ids_I: int32 ids that end a generation when sampled.
        layout: of the pool.
        decode_steps: tokens per call.

    Returns:
        pool; ids_Bs int32[B, decode_steps], -1 where nothing was sampled; logprobs_Bs float32 at the request's
        temperature (at temperature 1 for greedy requests).
    """

    def work(weights, pool, table_BM, state, stop_ids_I):
        return _decode(weights, pool, table_BM, state, stop_ids_I, layout, decode_steps)

    return _on_mesh(work, layout, weights, pool, table_BM, state, stop_ids_I, outputs=2)


def _decode(weights, pool, table_BM, state, stop_ids_I, layout, decode_steps):
    if layout.columns == 1 and layout.attention == "reference":
        table_BM = None
    B = state["token"].shape[0]
    root = jax.random.PRNGKey(BASE_KEY)
    keys_B = jax.vmap(lambda seed: jax.random.fold_in(root, seed))(state["seed"])

    def keep_going(carry):
        step, _, _, _, remaining_B, _, _ = carry
        return (step < decode_steps) & jnp.any(remaining_B > 0)

    def body(carry):
        step, pool, token_B, position_B, remaining_B, ids_sB, logprobs_sB = carry
        active_B = remaining_B > 0
        x_B1D, pool = _forward(
            weights, pool, table_BM, token_B[:, None], position_B[:, None], active_B[:, None], layout
        )
        logits_BV = jnp.einsum("BD,DV->BV", x_B1D[:, 0], weights["unembedding"], preferred_element_type=jnp.float32)
        if layout.tensor > 1:
            logits_BV = jax.lax.all_gather(logits_BV, "tensor", axis=1, tiled=True)
        next_B, logprob_B = sample(logits_BV, keys_B, position_B + 1, state["temperature"])
        stopped_B = jnp.any(next_B[:, None] == stop_ids_I[None, :], axis=-1)
        ids_sB = ids_sB.at[step].set(jnp.where(active_B, next_B, -1))
        logprobs_sB = logprobs_sB.at[step].set(logprob_B)
        token_B = jnp.where(active_B, next_B, token_B)
        position_B = jnp.where(active_B, position_B + 1, position_B)
        remaining_B = jnp.where(active_B & ~stopped_B, remaining_B - 1, 0)
        return step + 1, pool, token_B, position_B, remaining_B, ids_sB, logprobs_sB

    carry = (
        jnp.int32(0),
        pool,
        state["token"],
        state["position"],
        state["remaining"],
        jnp.full((decode_steps, B), -1, jnp.int32),
        jnp.zeros((decode_steps, B), jnp.float32),
    )
    _, pool, _, _, _, ids_sB, logprobs_sB = jax.lax.while_loop(keep_going, body, carry)
    return pool, ids_sB.T, logprobs_sB.T


def sample(logits_BV, keys_B, index_B, temperature_B):
    """Draws one token a row and its log-probability: log_softmax(logits / T), as `ops.vocab_loss.token_stats` has it.

    The draw inverts the cumulative distribution in two stages, a block of tokens and then a token in it, with one
    uniform number each: two random numbers a row instead of V, and float32 sums stay short enough not to lose rare
    tokens.

    Every row of the unembedding takes part, also those that pad Qwen2.5's 151,665 ids to 151,936 or 152,064: the
    trainer's log-probabilities count them too, as pretraining did, which made them improbable. Leaving them out here
    alone would make sampler and trainer disagree. One that is drawn all the same reads as U+FFFD and is trained like
    any other id.

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
    weights_Bw = jnp.take_along_axis(weight_Bbw, chosen_B[:, None, None], axis=1)[:, 0]
    drawn_B = chosen_B * SAMPLING_BLOCK + _invert(weights_Bw, uniform_B2[:, 1])
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
def read_pages(pool, pages_M):
    """Copies the pages of one sequence out of the pool; what `pages_M` names beyond the pool is of no meaning."""
    return jax.tree.map(lambda a: a.at[pages_M].get(mode="clip"), pool)


@functools.partial(jax.jit, donate_argnames="pool")
def write_pages(pool, pages_M, stored):
    """Puts what `read_pages` returned into pages, bit for bit, but for pages beyond the pool; the pool is donated."""
    return jax.tree.map(lambda a, new: a.at[pages_M].set(new, mode="drop"), pool, stored)
