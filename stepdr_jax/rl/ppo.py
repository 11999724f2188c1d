"""PPO on sampled tokens: losses, packing of episodes into rows, and the learner's compiled programs.

A batch is a list of microbatches of fixed shape: R packed rows of T tokens for the two networks, and N sampled tokens
("actions") gathered from them. Losses see the actions only. Their weights carry the whole normalisation, so gradients of
microbatches add up to the gradient of the batch, however it was split.

Alignment: action n is the token at flat index i of the rows; its log-probability and its value are read from the hidden
state at i - 1, the state in which it was sampled. The first token of an episode is given, so i - 1 is of the same episode.

On a mesh actions are not gathered: they stay in [R, T] at the place of the state they are read from, so that every array is
split as the rows are, and states in which nothing was sampled weigh nothing.
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


def policy_loss(logprob_N, old_logprob_N, advantage_N, weight_N, clip: float, dual_clip: float = 0.0):
    """Clipped surrogate, weighted sum over actions: (loss, clipped_N bool). Where clipped, no gradient flows.

    With dual_clip above 1 an action of negative advantage loses at most dual_clip times its advantage, however much more
    probable it has become (Ye et al. 2020, section 3.2); 0 is off.
    """
    ratio_N = jnp.exp(logprob_N - old_logprob_N)
    free_N = ratio_N * advantage_N
    bound_N = jnp.clip(ratio_N, 1 - clip, 1 + clip) * advantage_N
    surrogate_N, clipped_N = jnp.minimum(free_N, bound_N), bound_N < free_N
    if dual_clip:
        floor_N = jnp.where(advantage_N < 0, dual_clip * advantage_N, -jnp.inf)
        surrogate_N, clipped_N = jnp.maximum(surrogate_N, floor_N), clipped_N | (surrogate_N < floor_N)
    return -jnp.sum(weight_N * surrogate_N), clipped_N


def value_loss(value_N, old_value_N, return_N, weight_N, clip: float):
    """Half squared error, the larger of the free and the clipped one (Open-Reasoner-Zero), weighted sum over actions."""
    near_N = old_value_N + jnp.clip(value_N - old_value_N, -clip, clip)
    error_N = jnp.maximum((value_N - return_N) ** 2, (near_N - return_N) ** 2)
    return 0.5 * jnp.sum(weight_N * error_N)


def kl_to_reference(logprob_N, reference_N):
    """The k3 estimate of KL(policy || reference) per action: exp(d) - d - 1 with d = reference - policy; never negative."""
    difference_N = reference_N - logprob_N
    return jnp.exp(difference_N) - difference_N - 1


def action_weights(action_mask_ET: np.ndarray, aggregation: str) -> np.ndarray:
    """float32[E, T]: each action's share of the loss; all a batch's normalisation is here.

    token_mean: every action alike. seq_mean: every episode alike, its actions sharing. seq_sum: every action as
    token_mean does, but divided by episodes instead of tokens (the paper's equation 1: sums, no length normalisation).
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

    rows: tokens, positions, segment_ids int32[R, T]; target int32, the action (0 where unused); and, where actions are
    gathered, state int32[N], the flat index of the state that each is read from (0 where unused). used_N: which are
    actions. episode_N, token_N: row and column of the action in the episode arrays (0 where unused). Arrays of actions
    have the shape [N], or [R, T] where they are not gathered.
    """

    rows: dict[str, np.ndarray]
    used_N: np.ndarray
    episode_N: np.ndarray
    token_N: np.ndarray

    def gather(self, **values_ET: np.ndarray) -> dict[str, np.ndarray]:
        """The named [E, T] arrays at the actions, 0 where unused."""
        return {
            name: np.where(self.used_N, array[self.episode_N, self.token_N], 0).astype(np.float32)
            for name, array in values_ET.items()
        }

    def scatter(self, values_N, out_ET: np.ndarray) -> None:
        """Writes per-action values back into an [E, T] array."""
        out_ET[self.episode_N[self.used_N], self.token_N[self.used_N]] = np.asarray(values_N)[self.used_N]


def pack(
    episodes: EpisodeArrays,
    members: Sequence[int],
    *,
    rows: int,
    context: int,
    tight: bool = True,
    order: np.ndarray | None = None,
) -> list[Microbatch]:
    """Packs the unmasked episodes among `members` into microbatches of `rows` rows of `context` tokens.

    First fit by decreasing length, ties by index: a function of the lengths alone. The width N of a microbatch is its
    number of actions rounded up to half of its tokens, so that the vocabulary loss does little in vain and few
    shapes are compiled; not `tight`, it is all tokens and one shape (for the critic, whose head costs nothing).

    With `order`, a permutation of every row (of `training.program.token_order`, or any for a mesh), actions are not gathered.
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
            room.append(context)
        packed[place].append(e)
        room[place] -= int(lengths[e])
    groups = [packed[start : start + rows] for start in range(0, len(packed), rows)]
    return [_microbatch(episodes, group, rows, context, tight, order) for group in groups]


def _microbatch(episodes: EpisodeArrays, group: list[list[int]], rows, context, tight, order) -> Microbatch:
    actions = int(episodes.action_mask_ET[[e for row in group for e in row]].sum())
    half = max(rows * context // 2, 1)
    width = -(-actions // half) * half if tight and order is None else rows * context
    tokens, positions, segments = (np.zeros((rows, context), np.int32) for _ in range(3))
    state_N, used_N = np.zeros(width, np.int32), np.zeros(width, bool)
    target_N, episode_N, token_N = (np.zeros(width, np.int32) for _ in range(3))
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
            state = row * context + start + at - 1
            here = slice(filled, filled + len(at)) if order is None else state
            state_N[here], used_N[here] = state, True
            target_N[here], episode_N[here], token_N[here] = episodes.tokens_ET[e, at], e, at
            filled += len(at)
            start += length
    arrays = dict(tokens=tokens, positions=positions, segment_ids=segments)
    if order is None:
        return Microbatch(arrays | dict(target=target_N, state=state_N), used_N, episode_N, token_N)
    target_N, used_N, episode_N, token_N = (a.reshape(rows, context) for a in (target_N, used_N, episode_N, token_N))
    arrays = {name: array[:, order] for name, array in (arrays | dict(target=target_N)).items()}
    return Microbatch(arrays, used_N[:, order], episode_N[:, order], token_N[:, order])


def minibatches(count: int, parts: int, *, seed: int, iteration: int, purpose: int) -> Iterator[np.ndarray]:
    """Splits episodes 0..count-1 into `parts` groups in an order that is a function of (seed, iteration, purpose)."""
    order = np.random.default_rng([seed, iteration, purpose]).permutation(count)
    yield from np.array_split(order, parts)


# ---------------------------------------------------------------------------------------------------------- learner


@dataclasses.dataclass(frozen=True)
class Settings:
    """What the programs are compiled for. Values and their sources are in the config's `ppo` section."""

    model: Qwen2Config
    temperature: float
    clip: float
    value_clip: float
    kl_coefficient: float
    entropy_coefficient: float
    parallel: Parallel = Parallel()  # how rows of microbatches are split
    loss_chunk: int = 2048  # actions per slice of the vocabulary
    dual_clip: float = 0.0  # see policy_loss

    @property
    def sharded(self) -> bool:
        return self.parallel.mesh is not None and self.parallel.mesh.size > 1


@functools.cache  # one object per setting: it is a static argument of `apply`
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
    """What stands at the states of the actions: [N, ...]."""
    flat_XX = x_RTX.reshape(-1, *x_RTX.shape[2:])
    return flat_XX[rows["state"]] if "state" in rows else flat_XX


def _action_stats(params, rows, settings: Settings):
    """(logprob_N, entropy_N) of the actions under the policy, at the sampling temperature."""
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
    logprob_N, entropy_N, _ = token_stats(
        _states(x_RTD, rows),
        qwen2.unembedding(params),
        rows["target"].reshape(-1),
        chunk=settings.loss_chunk,
        temperature=settings.temperature,
        head=placement.head(tied=settings.model.tie_embeddings, tiles=parallel.vocab_tiles),
    )
    return logprob_N, entropy_N


def _action_values(params, rows, settings: Settings):
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


def _each(read, params, rows, settings: Settings):
    """`read(params, rows)`, a tree of one number an action, in the actions' own shape."""

    def local(params, rows):
        return jax.tree.map(lambda a: a.reshape(rows["target"].shape), read(params, rows, settings))

    return (
        spmd.on_every_device(local, params, rows, settings.parallel.mesh, gives=spmd.ROWS)
        if settings.sharded
        else local(params, rows)
    )


def _gradient(loss, params, total, rows, actions, settings: Settings):
    """Adds to `total` the gradient of `loss(params, rows, actions)` -> (objective, sums); returns (total, sums)."""

    def local(params, batch):
        batch = dict(batch)
        flat = {name: batch.pop("action " + name).reshape(-1) for name in actions}
        return jax.grad(loss, has_aux=True)(params, batch, flat)

    batch = rows | {"action " + name: array for name, array in actions.items()}
    if settings.sharded:
        gradient, sums = spmd.on_every_device(local, params, batch, settings.parallel.mesh, gives=spmd.GRADIENT)
    else:
        gradient, sums = local(params, batch)
    return jax.tree.map(jnp.add, total, gradient), sums


@functools.partial(jax.jit, static_argnames="settings")
def logprobs(params, rows, *, settings: Settings):
    """(logprob_N, entropy_N) float32 of a microbatch's actions."""
    return _each(_action_stats, params, rows, settings)


@functools.partial(jax.jit, static_argnames="settings")
def values(params, rows, *, settings: Settings):
    """value_N float32: the critic's value of the state in which each action was sampled."""
    return _each(_action_values, params, rows, settings)


@functools.partial(jax.jit, static_argnames="settings", donate_argnames="total")
def actor_gradients(params, total, rows, actions, *, settings: Settings):
    """Adds a microbatch's gradient of the policy loss to `total` (donated); returns (total, sums for metrics).

    actions: weight, share (weight for metrics: one over the tokens), advantage, old_logprob float32[N];
    reference_logprob too, used when kl_coefficient is not 0.
    """

    def loss(params, rows, actions):
        logprob_N, entropy_N = _action_stats(params, rows, settings)
        weight_N = actions["weight"]
        # States without an action have a meaningless log-probability, which must not meet an exponential.
        logprob_N = jnp.where(weight_N > 0, logprob_N, actions["old_logprob"])
        surrogate, clipped_N = policy_loss(
            logprob_N, actions["old_logprob"], actions["advantage"], weight_N, settings.clip, settings.dual_clip
        )
        objective = surrogate - settings.entropy_coefficient * jnp.sum(weight_N * entropy_N)
        log_ratio_N = logprob_N - actions["old_logprob"]
        sums = {
            "policy_loss": surrogate,
            "clip_fraction": jnp.sum(actions["share"] * clipped_N),
            "kl": jnp.sum(actions["share"] * (jnp.exp(log_ratio_N) - 1 - log_ratio_N)),
        }
        if settings.kl_coefficient:
            kl = jnp.sum(weight_N * kl_to_reference(logprob_N, actions["reference_logprob"]))
            objective = objective + settings.kl_coefficient * kl
        return objective, sums

    return _gradient(loss, params, total, rows, actions, settings)


@functools.partial(jax.jit, static_argnames="settings", donate_argnames="total")
def critic_gradients(params, total, rows, actions, *, settings: Settings):
    """Adds a microbatch's gradient of the value loss to `total` (donated); returns (total, sums for metrics).

    actions: weight, old_value, return_ float32[N].
    """

    def loss(params, rows, actions):
        value_N = _action_values(params, rows, settings)
        total_loss = value_loss(
            value_N, actions["old_value"], actions["return_"], actions["weight"], settings.value_clip
        )
        return total_loss, {"value_loss": total_loss}

    return _gradient(loss, params, total, rows, actions, settings)


@functools.partial(jax.jit, static_argnames="optimizer", donate_argnames=("params", "moments"))
def apply(params, moments, gradient, *, optimizer: optax.GradientTransformation):
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
    """A gradient to add to, split over devices as the parameters are."""
    leaves, structure = jax.tree.flatten(params)
    program = _zeros(tuple((leaf.shape, leaf.dtype, leaf.sharding) for leaf in leaves))
    return jax.tree.unflatten(structure, program())


@functools.lru_cache
def _zeros(leaves):
    return jax.jit(
        lambda: [jnp.zeros(shape, dtype) for shape, dtype, _ in leaves], out_shardings=[s for *_, s in leaves]
    )
