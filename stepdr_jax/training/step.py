"""One optimiser step on packed rows: exact token-weighted loss over microbatches, guarded against non-finite numbers.

Sums come before means: loss and weight are summed over tokens, microbatches and devices and divided once, so the
result does not depend on how the batch is cut.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import optax

from stepdr_jax.models import qwen2
from stepdr_jax.ops.vocab_loss import token_stats


@jax.tree_util.register_dataclass
@dataclasses.dataclass
class TrainState:
    """All that a step changes; a checkpoint of it continues the run exactly.

    step: int32, steps taken, which is also the position in the data.
    params, optimizer: parameter tree and optax state.
    window: sums since the last log row (see `empty_window`), kept here so that a resumed run logs the same rows.
    """

    step: jax.Array
    params: dict
    optimizer: Any
    window: dict


def empty_window(num_sources: int) -> dict:
    """Zeroed sums: loss and weight per source [num_sources], gradient norm, tokens, skipped and taken steps."""
    return {
        "loss": jnp.zeros((num_sources,), jnp.float32),
        "weight": jnp.zeros((num_sources,), jnp.float32),
        "grad_norm": jnp.zeros((), jnp.float32),
        "tokens": jnp.zeros((), jnp.int32),
        "skipped": jnp.zeros((), jnp.int32),
        "steps": jnp.zeros((), jnp.int32),
    }


def loss_sums(
    params: dict,
    batch: dict,
    config: qwen2.Qwen2Config,
    *,
    num_sources: int,
    loss_chunk: int,
    z_loss: float = 0.0,
    attention_backend: str = "auto",
    remat: bool = False,
) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
    """Summed objective of a packed batch and, per source, summed negative log-likelihood and weight.

    The target of position t is token t+1 when both are of one segment (not padding) and loss_mask[t+1] is set.

    Args:
        params: parameter tree.
        batch: tokens, segment_ids, positions int32[B, T], loss_mask bool[B, T], source int32[B].
        config: model shape.
        num_sources: mixture components that `source` numbers.
        loss_chunk: tokens whose logits exist at a time.
        z_loss: weight of the squared log-partition.
        attention_backend, remat: see `qwen2.hidden_states`.

    Returns:
        (sum over target tokens of nll + z_loss * logz^2, (nll sums [num_sources], weights [num_sources])).
    """
    tokens_BT, segments_BT = batch["tokens"], batch["segment_ids"]
    x_BTD = qwen2.hidden_states(
        params, tokens_BT, batch["positions"], segments_BT, config, attention_backend=attention_backend, remat=remat
    )
    targets_BT = jnp.roll(tokens_BT, -1, axis=1)
    same_BT = (segments_BT == jnp.roll(segments_BT, -1, axis=1)) & (segments_BT != 0)
    weight_BT = (same_BT & jnp.roll(batch["loss_mask"], -1, axis=1)).astype(jnp.float32).at[:, -1].set(0.0)
    logprob_N, _, logz_N = token_stats(
        x_BTD.reshape(-1, x_BTD.shape[-1]),
        qwen2.unembedding(params, config),
        targets_BT.reshape(-1),
        chunk=loss_chunk,
    )
    nll_BT = -logprob_N.reshape(weight_BT.shape) * weight_BT
    z_BT = jnp.square(logz_N).reshape(weight_BT.shape) * weight_BT
    nll_S = jax.ops.segment_sum(nll_BT.sum(axis=1), batch["source"], num_segments=num_sources)
    weight_S = jax.ops.segment_sum(weight_BT.sum(axis=1), batch["source"], num_segments=num_sources)
    return nll_BT.sum() + z_loss * z_BT.sum(), (nll_S, weight_S)


def gradients(params: dict, batch: dict, config: qwen2.Qwen2Config, *, microbatches: int = 1, **options):
    """Mean gradient over the batch's target tokens: (gradient, nll sums [S], weights [S]).

    Microbatches are rows taken with a stride, so each keeps the batch's split over devices; gradients are accumulated
    in float32.
    """
    grad = jax.grad(loss_sums, has_aux=True)
    if microbatches == 1:
        total, (nll_S, weight_S) = grad(params, batch, config, **options)
    else:
        cut = jax.tree.map(
            lambda a: jnp.moveaxis(a.reshape(a.shape[0] // microbatches, microbatches, *a.shape[1:]), 1, 0), batch
        )

        def add(carry, micro):
            part = grad(params, micro, config, **options)
            return jax.tree.map(lambda a, b: a + b.astype(a.dtype), carry, part), None

        zero = (
            jax.tree.map(lambda p: jnp.zeros(p.shape, jnp.float32), params),
            (jnp.zeros((options["num_sources"],)), jnp.zeros((options["num_sources"],))),
        )
        (total, (nll_S, weight_S)), _ = jax.lax.scan(add, zero, cut)
    scale = 1.0 / jnp.maximum(weight_S.sum(), 1.0)
    return jax.tree.map(lambda g: g * scale.astype(g.dtype), total), nll_S, weight_S


def apply_gradient(params, optimizer_state, gradient, optimizer: optax.GradientTransformation, clip_norm: float):
    """Clips by global norm and updates, unless the norm is not finite: then nothing changes.

    Returns:
        (params, optimizer state, gradient norm before clipping, finite bool).
    """
    norm = optax.global_norm(gradient)
    finite = jnp.isfinite(norm)
    factor = jnp.minimum(1.0, clip_norm / jnp.maximum(norm, 1e-12)) if clip_norm else 1.0
    clipped = jax.tree.map(lambda g: g * jnp.asarray(factor, g.dtype), gradient)
    updates, new_state = optimizer.update(clipped, optimizer_state, params)
    new_params = optax.apply_updates(params, updates)
    keep = lambda new, old: jnp.where(finite, new, old)  # noqa: E731
    return (
        jax.tree.map(keep, new_params, params),
        jax.tree.map(keep, new_state, optimizer_state),
        jnp.where(finite, norm, 0.0),
        finite,
    )


def train_step(
    state: TrainState,
    batch: dict,
    config: qwen2.Qwen2Config,
    optimizer: optax.GradientTransformation,
    *,
    clip_norm: float,
    **options,
) -> TrainState:
    """Takes one step. A step whose gradient is not finite moves only the data position and the count of skips."""
    gradient, nll_S, weight_S = gradients(state.params, batch, config, **options)
    params, optimizer_state, norm, finite = apply_gradient(
        state.params, state.optimizer, gradient, optimizer, clip_norm
    )
    window = state.window
    taken = finite.astype(jnp.int32)
    window = {
        "loss": window["loss"] + jnp.where(finite, nll_S, 0.0),
        "weight": window["weight"] + jnp.where(finite, weight_S, 0.0),
        "grad_norm": window["grad_norm"] + norm,
        "tokens": window["tokens"] + jnp.sum(batch["segment_ids"] != 0),
        "skipped": window["skipped"] + 1 - taken,
        "steps": window["steps"] + taken,
    }
    return TrainState(state.step + 1, params, optimizer_state, window)
