"""PPO on sampled tokens: losses, packing of episodes into rows, and the learner's compiled programs.

A batch is a list of microbatches of fixed shape: packed rows of tokens for the two networks, and the sampled tokens
("actions") gathered from them. Losses see the actions only. Their weights contain the whole normalization, so gradients
of microbatches add up to the gradient of the batch, however it was split.

Shape suffixes: E episodes, T tokens of an episode or row, R packed rows, A actions of a microbatch, D model width.

Alignment: an action is the token at flat index i of the rows; its log-probability and its value are read from the
hidden state at i - 1, the state in which it was sampled. The first token of an episode is observed, so i - 1 is in the
same episode.

On a mesh actions are not gathered: they keep the shape [R, T], each at the position of the state it is read from, so
that every array is sharded as the rows are; states in which nothing was sampled have weight 0.
"""

import dataclasses
import functools
from collections.abc import Iterator, Sequence

import jax
import jax.numpy as jnp
import numpy as np
import optax

from stepdr_jax.models import qwen2, value_head
from stepdr_jax.models.parallel import Parallel
from stepdr_jax.models.qwen2 import Qwen2Config
from stepdr_jax.ops.vocab_loss import token_stats
from stepdr_jax.rl.rollouts import EpisodeArrays
from stepdr_jax.sharding import spmd

AGGREGATIONS = ("token_mean", "seq_mean", "seq_sum")


# ----------------------------------------------------------------------------------------------------------- losses


def policy_loss(logprob_A, old_logprob_A, advantage_A, weight_A, clip: float, dual_clip: float = 0.0):
    """Clipped surrogate, weighted sum over actions: (loss, clipped_A bool). Where clipped, no gradient flows.

    With dual_clip above 1 the loss of an action with negative advantage is at most dual_clip times the advantage's
    size, however much more probable it has become (Ye et al. 2020, section 3.2); 0 is off.
    """
    ratio_A = jnp.exp(logprob_A - old_logprob_A)
    free_A = ratio_A * advantage_A
    bound_A = jnp.clip(ratio_A, 1 - clip, 1 + clip) * advantage_A
    surrogate_A, clipped_A = jnp.minimum(free_A, bound_A), bound_A < free_A
    if dual_clip:
        floor_A = jnp.where(advantage_A < 0, dual_clip * advantage_A, -jnp.inf)
        surrogate_A, clipped_A = jnp.maximum(surrogate_A, floor_A), clipped_A | (surrogate_A < floor_A)
    return -jnp.sum(weight_A * surrogate_A), clipped_A


def value_loss(value_A, old_value_A, return_A, weight_A, clip: float):
    """Weighted sum of half the squared error, the larger of free and clipped (Open-Reasoner-Zero)."""
    near_A = old_value_A + jnp.clip(value_A - old_value_A, -clip, clip)
    error_A = jnp.maximum((value_A - return_A) ** 2, (near_A - return_A) ** 2)
    return 0.5 * jnp.sum(weight_A * error_A)


def kl_to_reference(logprob_A, reference_A):
    """The k3 estimate of KL(policy || reference) per action: exp(d) - d - 1, d = reference - policy; not negative."""
    difference_A = reference_A - logprob_A
    return jnp.exp(difference_A) - difference_A - 1


def action_weights(action_mask_ET: np.ndarray, aggregation: str) -> np.ndarray:
    """float32[E, T]: each action's weight in the loss; the whole normalization of a batch is here.

    token_mean: 1 / tokens. seq_mean: every episode has the same weight, shared by its actions. seq_sum: 1 / episodes
    (the paper's equation 1: sums, no length normalization).
    """
    if aggregation not in AGGREGATIONS:
        raise ValueError(f"expected loss_aggregation among {', '.join(AGGREGATIONS)}, got {aggregation!r}")
    mask_ET = action_mask_ET.astype(np.float64)
    tokens_E1 = mask_ET.sum(1, keepdims=True)
    episodes = max(int((tokens_E1 > 0).sum()), 1)
    if aggregation == "token_mean":
        weights_ET = mask_ET / max(mask_ET.sum(), 1)
    elif aggregation == "seq_mean":
        weights_ET = mask_ET / np.maximum(tokens_E1, 1) / episodes
    else:
        weights_ET = mask_ET / episodes
    return weights_ET.astype(np.float32)


# ---------------------------------------------------------------------------------------------------------- packing


@dataclasses.dataclass(frozen=True)
class Microbatch:
    """Rows and actions of fixed shape, and where each action comes from.

    rows: tokens, positions, segment_ids int32[R, T]; target int32, the action (0 where unused); and, if actions are
    gathered, state int32[A], the flat index of the state that each is read from (0 where unused). used_A bool: false
    for padding. episode_A, token_A: row and column of the action in the episode arrays (0 where unused). Arrays of
    actions have the shape [A], or [R, T] if actions are not gathered.
    """

    rows: dict[str, np.ndarray]
    used_A: np.ndarray
    episode_A: np.ndarray
    token_A: np.ndarray

    def gather(self, **values_ET: np.ndarray) -> dict[str, np.ndarray]:
        """The named [E, T] arrays at the actions, 0 where unused."""
        return {
            name: np.where(self.used_A, array[self.episode_A, self.token_A], 0).astype(np.float32)
            for name, array in values_ET.items()
        }

    def scatter(self, values_A, out_ET: np.ndarray) -> None:
        """Writes per-action values back into an [E, T] array."""
        out_ET[self.episode_A[self.used_A], self.token_A[self.used_A]] = np.asarray(values_A)[self.used_A]


def pack(
    episodes: EpisodeArrays,
    members: Sequence[int] | np.ndarray,
    *,
    rows: int,
    seq_len: int,
    tight: bool = True,
    order: np.ndarray | None = None,
) -> list[Microbatch]:
    """Packs the unmasked episodes among `members` into microbatches of `rows` rows of `seq_len` tokens.

    First fit by decreasing length, ties by index: a function of the lengths alone. The number A of action slots of a
    microbatch is its number of actions rounded up to half of its tokens, so that the vocabulary loss wastes little and
    few shapes are compiled; without `tight` it is all tokens and one shape (for the critic, whose head costs nothing).

    With `order`, a permutation of each row's tokens (`training.program.token_order`), actions are not gathered.
    """
    lengths = episodes.lengths_E
    longest_first = sorted((e for e in members if episodes.kept_E[e]), key=lambda e: (-int(lengths[e]), e))
    packed: list[list[int]] = []
    room: list[int] = []
    for e in longest_first:
        place = next((r for r, left in enumerate(room) if left >= lengths[e]), None)
        if place is None:
            place = len(packed)
            packed.append([])
            room.append(seq_len)
        packed[place].append(e)
        room[place] -= int(lengths[e])
    groups = [packed[start : start + rows] for start in range(0, len(packed), rows)]
    return [_microbatch(episodes, group, rows, seq_len, tight, order) for group in groups]


def _microbatch(
    episodes: EpisodeArrays, group: list[list[int]], rows: int, seq_len: int, tight: bool, order: np.ndarray | None
) -> Microbatch:
    actions = int(episodes.action_mask_ET[[e for row in group for e in row]].sum())
    half = max(rows * seq_len // 2, 1)
    width = -(-actions // half) * half if tight and order is None else rows * seq_len
    tokens, positions, segments = (np.zeros((rows, seq_len), np.int32) for _ in range(3))
    state_A, used_A = np.zeros(width, np.int32), np.zeros(width, bool)
    target_A, episode_A, token_A = (np.zeros(width, np.int32) for _ in range(3))
    filled = 0
    for row, members in enumerate(group):
        start = 0
        for segment, e in enumerate(members, 1):
            length = int(episodes.lengths_E[e])
            span = slice(start, start + length)
            tokens[row, span] = episodes.tokens_ET[e, :length]
            positions[row, span] = np.arange(length)
            segments[row, span] = segment
            at = np.flatnonzero(episodes.action_mask_ET[e])
            state = row * seq_len + start + at - 1
            here = slice(filled, filled + len(at)) if order is None else state
            state_A[here], used_A[here] = state, True
            target_A[here], episode_A[here], token_A[here] = episodes.tokens_ET[e, at], e, at
            filled += len(at)
            start += length
    arrays = dict(tokens=tokens, positions=positions, segment_ids=segments)
    if order is None:
        return Microbatch(arrays | dict(target=target_A, state=state_A), used_A, episode_A, token_A)
    target_RT, used_RT, episode_RT, token_RT = (
        a.reshape(rows, seq_len)[:, order] for a in (target_A, used_A, episode_A, token_A)
    )
    arrays = {name: array[:, order] for name, array in arrays.items()} | dict(target=target_RT)
    return Microbatch(arrays, used_RT, episode_RT, token_RT)


def minibatches(count: int, parts: int, *, seed: int, iteration: int, purpose: int) -> Iterator[np.ndarray]:
    """Splits episodes 0..count-1 into `parts` groups in an order that is a function of (seed, iteration, purpose)."""
    order = np.random.default_rng([seed, iteration, purpose]).permutation(count)
    yield from np.array_split(order, parts)


# ---------------------------------------------------------------------------------------------------------- learner


@dataclasses.dataclass(frozen=True)
class ProgramSettings:
    """Static arguments of the programs. The config's `ppo` section has values and their sources."""

    model: Qwen2Config
    temperature: float
    clip: float
    value_clip: float
    kl_coefficient: float
    entropy_coefficient: float
    parallel: Parallel = Parallel()  # how rows of microbatches are sharded
    loss_chunk: int = 2048  # actions per slice of the vocabulary
    dual_clip: float = 0.0  # see policy_loss

    @property
    def mesh(self) -> jax.sharding.Mesh | None:
        """None on one device."""
        mesh = self.parallel.mesh
        return mesh if mesh is not None and mesh.size > 1 else None


@functools.cache  # one object per setting: it is a static argument of `apply_gradient`
def make_optimizer(
    learning_rate: float, warmup_steps: int, beta2: float, clip_norm: float
) -> optax.GradientTransformation:
    """Adam, b1 0.9 and no weight decay (Open-Reasoner-Zero); the rate rises linearly over the warm-up and stays."""

    def rate(step):
        return learning_rate * jnp.minimum(1.0, (step + 1) / max(warmup_steps, 1))

    return optax.chain(
        optax.clip_by_global_norm(clip_norm), optax.scale_by_adam(b1=0.9, b2=beta2), optax.scale_by_learning_rate(rate)
    )


def _states(x_RTX, rows):
    """The values at the states of the actions: [N, ...]."""
    flat_XX = x_RTX.reshape(-1, *x_RTX.shape[2:])
    return flat_XX[rows["state"]] if "state" in rows else flat_XX


def _action_stats(params, rows, settings: ProgramSettings):
    """(logprob_A, entropy_A) of the actions under the policy, at the sampling temperature."""
    parallel, placement = settings.parallel, settings.parallel.placement(settings.model)
    x_RTD = qwen2.hidden_states(
        params,
        rows["tokens"],
        rows["positions"],
        rows["segment_ids"],
        settings.model,
        placement=placement,
        remat=parallel.remat,
    )
    logprob_A, entropy_A, _ = token_stats(
        _states(x_RTD, rows),
        qwen2.unembedding(params),
        rows["target"].reshape(-1),
        chunk=settings.loss_chunk,
        temperature=settings.temperature,
        head=placement.head(tied=settings.model.tie_embeddings, tiles=parallel.vocab_tiles),
    )
    return logprob_A, entropy_A


def _action_values(params, rows, settings: ProgramSettings):
    v_RT = value_head.values(
        params,
        rows["tokens"],
        rows["positions"],
        rows["segment_ids"],
        settings.model,
        placement=settings.parallel.placement(settings.model),
        remat=settings.parallel.remat,
    )
    return _states(v_RT, rows)


def _per_action(read, params, rows, settings: ProgramSettings):
    """`read(params, rows, settings)`, a tree with one number per action, in the shape of the actions."""

    def local(params, rows):
        return jax.tree.map(lambda a: a.reshape(rows["target"].shape), read(params, rows, settings))

    if settings.mesh is None:
        return local(params, rows)
    return spmd.on_every_device(local, params, rows, settings.mesh, gives=spmd.ROWS)


def _gradient(loss, params, total, rows, actions, settings: ProgramSettings):
    """Adds to `total` the gradient of `loss(params, rows, actions)` -> (objective, sums); returns (total, sums)."""

    def local(params, batch):
        batch = dict(batch)
        flat = {name: batch.pop("action " + name).reshape(-1) for name in actions}
        return jax.grad(loss, has_aux=True)(params, batch, flat)

    batch = rows | {"action " + name: array for name, array in actions.items()}
    if settings.mesh is None:
        gradient, sums = local(params, batch)
    else:
        gradient, sums = spmd.on_every_device(local, params, batch, settings.mesh, gives=spmd.GRADIENT)
    return jax.tree.map(jnp.add, total, gradient), sums


@functools.partial(jax.jit, static_argnames="settings")
def logprobs(params, rows, *, settings: ProgramSettings):
    """(logprob_A, entropy_A) float32 of a microbatch's actions."""
    return _per_action(_action_stats, params, rows, settings)


@functools.partial(jax.jit, static_argnames="settings")
def values(params, rows, *, settings: ProgramSettings):
    """value_A float32: the critic's value of the state in which each action was sampled."""
    return _per_action(_action_values, params, rows, settings)


@functools.partial(jax.jit, static_argnames="settings", donate_argnames="total")
def actor_gradients(params, total, rows, actions, *, settings: ProgramSettings):
    """Adds a microbatch's gradient of the policy loss to `total` (donated); returns (total, sums for metrics).

    actions: weight, share (weight for metrics: 1 / tokens), advantage, old_logprob and reference_logprob float32[A];
    the last is used when kl_coefficient is not 0.
    """

    def loss(params, rows, actions):
        logprob_A, entropy_A = _action_stats(params, rows, settings)
        weight_A = actions["weight"]
        # The log-probability of a state without an action is meaningless: it must not reach an exponential.
        logprob_A = jnp.where(weight_A > 0, logprob_A, actions["old_logprob"])
        surrogate, clipped_A = policy_loss(
            logprob_A, actions["old_logprob"], actions["advantage"], weight_A, settings.clip, settings.dual_clip
        )
        objective = surrogate - settings.entropy_coefficient * jnp.sum(weight_A * entropy_A)
        log_ratio_A = logprob_A - actions["old_logprob"]
        sums = {
            "policy_loss": surrogate,
            "clip_fraction": jnp.sum(actions["share"] * clipped_A),
            "kl": jnp.sum(actions["share"] * (jnp.exp(log_ratio_A) - 1 - log_ratio_A)),
        }
        if settings.kl_coefficient:
            kl = jnp.sum(weight_A * kl_to_reference(logprob_A, actions["reference_logprob"]))
            objective = objective + settings.kl_coefficient * kl
        return objective, sums

    return _gradient(loss, params, total, rows, actions, settings)


@functools.partial(jax.jit, static_argnames="settings", donate_argnames="total")
def critic_gradients(params, total, rows, actions, *, settings: ProgramSettings):
    """Adds a microbatch's gradient of the value loss to `total` (donated); returns (total, sums for metrics).

    actions: weight, old_value, return_ float32[A].
    """

    def loss(params, rows, actions):
        value_A = _action_values(params, rows, settings)
        total_loss = value_loss(
            value_A, actions["old_value"], actions["return_"], actions["weight"], settings.value_clip
        )
        return total_loss, {"value_loss": total_loss}

    return _gradient(loss, params, total, rows, actions, settings)


@functools.partial(jax.jit, static_argnames="optimizer", donate_argnames=("params", "moments"))
def apply_gradient(params, moments, gradient, *, optimizer: optax.GradientTransformation):
    """One optimizer step (params and moments donated); returns (params, moments, norm of the gradient, skipped).

    A gradient that is not finite changes nothing: neither parameters nor moments nor the step count.
    """
    norm = optax.global_norm(gradient)
    finite = jnp.isfinite(norm)
    update, after = optimizer.update(gradient, moments, params)
    changed = optax.apply_updates(params, update)

    def keep(new, old):
        return jnp.where(finite, new, old)

    return jax.tree.map(keep, changed, params), jax.tree.map(keep, after, moments), norm, ~finite


def zeros_like(params):
    """A zero gradient to accumulate into, sharded as the parameters are."""
    leaves, structure = jax.tree.flatten(params)
    program = _zeros(tuple((leaf.shape, leaf.dtype, leaf.sharding) for leaf in leaves))
    return jax.tree.unflatten(structure, program())


@functools.lru_cache
def _zeros(leaves):
    return jax.jit(
        lambda: [jnp.zeros(shape, dtype) for shape, dtype, _ in leaves], out_shardings=[s for *_, s in leaves]
    )
