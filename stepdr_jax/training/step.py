"""One optimizer step on packed sequences: token-weighted loss over microbatches, with a limit on gradient norms.

Loss and weight are summed over tokens, microbatches and devices and divided once, so the result does not depend on how
the batch is split.

Shape suffixes: B sequences of a batch, T tokens of a sequence, D features, N = B * T.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from stepdr_jax.models import qwen2
from stepdr_jax.models.parallel import ONE_DEVICE, Parallel
from stepdr_jax.ops.vocab_loss import token_stats
from stepdr_jax.records import CAPABILITIES
from stepdr_jax.sharding.placement import WHOLE, Placement
from stepdr_jax.sharding.spmd import GRADIENT, on_every_device
from stepdr_jax.training import guards

NUM_CAPABILITIES = 1 + len(CAPABILITIES)  # 0 is none of them


@jax.tree_util.register_dataclass
@dataclasses.dataclass
class TrainState:
    """Everything that a step changes; a run restored from it continues exactly.

    step: int32[], steps taken.
    params, optimizer: parameter tree and optax state.
    guard: running mean of gradient norms (`guards.empty_norm_stats`).
    window: sums since the last log row (`empty_window`), kept here so that a resumed run logs the same rows.
    """

    step: jax.Array
    params: dict[str, Any]
    optimizer: optax.OptState
    guard: dict[str, jax.Array]
    window: dict[str, jax.Array]


def empty_sums(num_sources: int) -> dict[str, jax.Array]:
    """Zero sums over target tokens: loss and weight by source [num_sources] and by capability [NUM_CAPABILITIES]."""
    sizes = {
        "loss": num_sources,
        "weight": num_sources,
        "capability_loss": NUM_CAPABILITIES,
        "capability_weight": NUM_CAPABILITIES,
    }
    return {name: jnp.zeros((size,), jnp.float32) for name, size in sizes.items()}


def empty_window(num_sources: int) -> dict[str, jax.Array]:
    """Zero sums since the last log row: `empty_sums`, gradient norm, tokens, attention pairs and counts of steps.

    `skipped` counts steps whose gradient was not finite, `spikes` those whose gradient was too large, `steps` those
    that were applied. Losses, weights and gradient norm are of applied steps only. `pairs` are the (query, key) pairs
    inside segments.
    """
    return empty_sums(num_sources) | {
        "grad_norm": jnp.zeros((), jnp.float32),
        "tokens": jnp.zeros((), jnp.int32),
        "pairs": jnp.zeros((), jnp.float32),
        "skipped": jnp.zeros((), jnp.int32),
        "spikes": jnp.zeros((), jnp.int32),
        "steps": jnp.zeros((), jnp.int32),
    }


def arrange(batch: dict[str, np.ndarray], order: np.ndarray | None = None) -> dict[str, np.ndarray]:
    """The inputs of a step from a loader's batch: adds targets and weights, and permutes tokens for the context axis.

    Position t predicts token t+1. Its weight is 1 when both are in the same segment (not padding) and loss_mask[t+1] is
    set, otherwise 0.

    Args:
        batch: tokens, segment_ids, positions int32[B, T], loss_mask bool[B, T], source int32[B]; may have capability
            int[B, T] or int[B]: 1 + index in `records.CAPABILITIES`, or 0 for none.
        order: int32[T], permutation of the tokens of each sequence (`program.token_order`); None keeps their order.

    Returns:
        tokens, targets, segment_ids, positions, capability int32[B, T], weight float32[B, T], source int32[B].
    """
    segments_BT = batch["segment_ids"]
    weight_BT = (segments_BT == np.roll(segments_BT, -1, axis=1)) & (segments_BT != 0)
    weight_BT &= np.roll(batch["loss_mask"], -1, axis=1)
    weight_BT[:, -1] = False
    capability = np.asarray(batch.get("capability", 0), np.int32)
    fields = {
        "capability": np.broadcast_to(capability[..., None] if capability.ndim == 1 else capability, segments_BT.shape),
        "tokens": batch["tokens"],
        "targets": np.roll(batch["tokens"], -1, axis=1),
        "positions": batch["positions"],
        "segment_ids": segments_BT,
        "weight": weight_BT.astype(np.float32),
    }
    if order is not None:
        fields = {name: values_BT[:, order] for name, values_BT in fields.items()}
    return fields | {"source": batch["source"]}


def loss_sums(
    params: dict[str, Any],
    batch: dict[str, jax.Array],
    config: qwen2.Qwen2Config,
    *,
    num_sources: int,
    loss_chunk: int,
    z_loss: float = 0.0,
    placement: Placement = WHOLE,
    remat: str = "none",
    vocab_tiles: int = 1,
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """Summed objective of a packed batch, and summed negative log-likelihood and weight by source and capability.

    Args:
        params: parameter tree.
        batch: from `arrange`; under shard_map this device's shard.
        config: model shape.
        num_sources: mixture components that `source` numbers.
        loss_chunk: tokens whose logits are in memory at a time.
        z_loss: weight of the squared log-partition.
        placement, remat: see `qwen2.hidden_states`.
        vocab_tiles: number of slices in which the unembedding is gathered.

    Returns:
        (sum over target tokens of nll + z_loss * logz^2, sums as in `empty_sums`).
    """
    x_BTD = qwen2.hidden_states(
        params,
        batch["tokens"],
        batch["positions"],
        batch["segment_ids"],
        config,
        placement=placement,
        remat=remat,
    )
    weight_BT = batch["weight"]
    logprob_N, _, logz_N = token_stats(
        x_BTD.reshape(-1, x_BTD.shape[-1]),
        qwen2.unembedding(params),
        batch["targets"].reshape(-1),
        chunk=loss_chunk,
        head=placement.head(tied=config.tie_embeddings, tiles=vocab_tiles),
    )
    nll_BT = -logprob_N.reshape(weight_BT.shape) * weight_BT
    z_BT = jnp.square(logz_N).reshape(weight_BT.shape) * weight_BT
    by_source = functools.partial(jax.ops.segment_sum, segment_ids=batch["source"], num_segments=num_sources)

    def by_capability(x_BT: jax.Array) -> jax.Array:
        return jnp.stack([jnp.sum(x_BT * (batch["capability"] == c)) for c in range(NUM_CAPABILITIES)])

    sums = {
        "loss": by_source(nll_BT.sum(axis=1)),
        "weight": by_source(weight_BT.sum(axis=1)),
        "capability_loss": by_capability(nll_BT),
        "capability_weight": by_capability(weight_BT),
    }
    return nll_BT.sum() + z_loss * z_BT.sum(), sums


def gradients(
    params: dict[str, Any],
    batch: dict[str, jax.Array],
    config: qwen2.Qwen2Config,
    *,
    microbatches: int = 1,
    parallel: Parallel = ONE_DEVICE,
    **options: Any,
) -> tuple[dict[str, Any], dict[str, jax.Array]]:
    """Mean gradient over the batch's target tokens: (gradient, sums as in `empty_sums`).

    Each device splits its own sequences into microbatches; gradients are accumulated in the parameters' dtype.

    Args:
        params, batch, config: as of `loss_sums`.
        microbatches: of each device.
        parallel: how the step is split over a mesh.
        options: other arguments of `loss_sums`.
    """
    placement = parallel.placement(config)
    options |= dict(placement=placement, remat=parallel.remat, vocab_tiles=parallel.vocab_tiles)
    grad = jax.grad(loss_sums, has_aux=True)

    def local(params: dict[str, Any], batch: dict[str, jax.Array]) -> Any:
        if microbatches == 1:
            return grad(params, batch, config, **options)
        split = jax.tree.map(lambda a: a.reshape(microbatches, a.shape[0] // microbatches, *a.shape[1:]), batch)

        def add(total: Any, micro: dict[str, jax.Array]) -> tuple[Any, None]:
            return jax.tree.map(jnp.add, total, grad(params, micro, config, **options)), None

        zero = (jax.tree.map(jnp.zeros_like, params), empty_sums(options["num_sources"]))
        return jax.lax.scan(add, zero, split)[0]

    if parallel.mesh is not None and placement.sizes:
        total, sums = on_every_device(local, params, batch, parallel.mesh, gives=GRADIENT)
    else:
        total, sums = local(params, batch)
    scale = 1.0 / jnp.maximum(sums["weight"].sum(), 1.0)
    return jax.tree.map(lambda g: g * scale.astype(g.dtype), total), sums


def eval_step(
    params: dict[str, Any],
    batch: dict[str, jax.Array],
    config: qwen2.Qwen2Config,
    *,
    parallel: Parallel = ONE_DEVICE,
    **options: Any,
) -> dict[str, jax.Array]:
    """The sums of `empty_sums` of a batch, without a gradient; arguments as of `gradients`."""
    placement = parallel.placement(config)
    options |= dict(placement=placement, vocab_tiles=parallel.vocab_tiles)

    def local(params: dict[str, Any], batch: dict[str, jax.Array]) -> Any:
        return loss_sums(params, batch, config, **options)[1]

    if parallel.mesh is not None and placement.sizes:
        return on_every_device(local, params, batch, parallel.mesh)
    return local(params, batch)


def apply_gradient(
    params: Any,
    optimizer_state: optax.OptState,
    gradient: Any,
    optimizer: optax.GradientTransformation,
    clip_norm: float,
    limit: jax.Array | float = jnp.inf,
) -> tuple[Any, optax.OptState, jax.Array, jax.Array]:
    """Clips by global norm and updates; changes nothing when the norm is above `limit` or not finite.

    Args:
        params, gradient: trees of arrays.
        optimizer_state: optax state of `params`.
        optimizer: optax optimizer.
        clip_norm: 0 turns clipping off.
        limit: largest norm of an update that is applied.

    Returns:
        (params, optimizer state, gradient norm before clipping float32[], applied bool[]).
    """
    norm = optax.global_norm(gradient)
    applied = jnp.isfinite(norm) & (norm <= limit)
    factor = jnp.minimum(1.0, clip_norm / jnp.maximum(norm, 1e-12)) if clip_norm else 1.0
    clipped = jax.tree.map(lambda g: g * jnp.asarray(factor, g.dtype), gradient)
    updates, new_state = optimizer.update(clipped, optimizer_state, params)
    new_params = optax.apply_updates(params, updates)
    chosen = jax.tree.map(
        lambda new, old: jnp.where(applied, new, old), (new_params, new_state), (params, optimizer_state)
    )
    return *chosen, norm, applied


def train_step(
    state: TrainState,
    batch: dict[str, jax.Array],
    config: qwen2.Qwen2Config,
    optimizer: optax.GradientTransformation,
    *,
    clip_norm: float,
    limits: guards.NormLimits = guards.NO_LIMIT,
    **options: Any,
) -> TrainState:
    """Takes one step on a batch of `arrange`; `options` as of `gradients`.

    A step whose gradient is not finite, or a spike by `limits`, changes only the number of steps and the count of
    skips.
    """
    gradient, sums = gradients(state.params, batch, config, **options)
    params, optimizer_state, norm, applied = apply_gradient(
        state.params, state.optimizer, gradient, optimizer, clip_norm, guards.norm_limit(state.guard, limits)
    )
    window, finite, real_BT = state.window, jnp.isfinite(norm), batch["segment_ids"] != 0
    window = {name: window[name] + jnp.where(applied, part, 0.0) for name, part in sums.items()} | {
        "grad_norm": window["grad_norm"] + jnp.where(applied, norm, 0.0),
        "tokens": window["tokens"] + jnp.sum(real_BT),
        "pairs": window["pairs"] + jnp.sum(jnp.where(real_BT, batch["positions"] + 1, 0).astype(jnp.float32)),
        "skipped": window["skipped"] + ~finite,
        "spikes": window["spikes"] + (finite & ~applied),
        "steps": window["steps"] + applied,
    }
    return TrainState(
        state.step + 1, params, optimizer_state, guards.update_norm_stats(state.guard, norm, limits), window
    )
