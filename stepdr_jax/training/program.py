"""The compiled programs of a training stage, on real devices or on a described topology.

Only this module decides how a config's step is split over a mesh, so the training loop runs the programs that the
planner compiles.
"""

import dataclasses
import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from stepdr_jax.errors import UserError
from stepdr_jax.models import qwen2
from stepdr_jax.models.parallel import Parallel
from stepdr_jax.ops import context_layout
from stepdr_jax.sharding import rules
from stepdr_jax.training import guards, state
from stepdr_jax.training.optimizer import make_optimizer
from stepdr_jax.training.step import eval_step, train_step

BATCH_FIELDS = {  # of shape [batch_size, seq_len]
    "tokens": jnp.int32,
    "targets": jnp.int32,
    "positions": jnp.int32,
    "segment_ids": jnp.int32,
    "capability": jnp.int32,
    "weight": jnp.float32,
}


def resolve_parallel(config: ConfigDict, stage: str, mesh: jax.sharding.Mesh, model: qwen2.Qwen2Config) -> Parallel:
    """config.parallel for a training stage or "ppo" on `mesh`, every "auto" resolved.

    Raises:
        UserError: a size that its mesh axis does not divide; the message names both fields.
    """
    settings, section = config[stage], config.parallel
    context, tensor = mesh.shape["context"], mesh.shape["tensor"]
    shards = mesh.shape["data"] * mesh.shape["fsdp"]
    if stage == "ppo":
        seq_len, batch_size, remat = config.agent.max_episode_tokens, settings.microbatch_sequences, settings.remat
        fields = "ppo.microbatch_sequences: expected a multiple of mesh.data * mesh.fsdp"
    else:
        seq_len, batch_size, remat = settings.seq_len, settings.batch_size, section.remat
        shards *= settings.microbatches
        fields = f"{stage}.batch_size: expected a multiple of mesh.data * mesh.fsdp * {stage}.microbatches"
    if batch_size % shards:
        raise UserError(f"{fields} = {shards}, got {batch_size}")
    for name, size in (
        ("num_kv_heads", model.num_kv_heads),
        ("intermediate_size", model.intermediate_size),
        ("vocab_size", model.vocab_size),
    ):
        if size % tensor:
            raise UserError(f"mesh.tensor: expected a divisor of model.{name} {size}, got {tensor}")
    device = mesh.devices.flat[0]
    attention = "splash" if section.attention == "auto" and device.platform == "tpu" else section.attention
    strategy, zigzag, reason = section.context_strategy, bool(section.zigzag) and context > 1, "as configured"
    if context == 1:
        strategy, reason = "none", "mesh.context is 1"
    else:
        heads = (model.num_heads // tensor, model.num_kv_heads // tensor)
        layout = dict(axis_size=context, zigzag=zigzag)
        if strategy == "auto":
            strategy, reason = context_layout.choose(
                seq_len,
                *heads,
                model.head_dim,
                device_kind=device.device_kind,
                rows=batch_size // shards,
                **layout,
            )
        context_layout.check_layout(seq_len, *heads, strategy=strategy, backend=attention, **layout)
    parallel = Parallel(mesh, strategy, reason, zigzag, attention, remat)
    head = parallel.placement(model).head(tied=model.tie_embeddings)
    tokens = model.vocab_size // math.prod(mesh.shape[axis] for axis in (*head.v_axes, head.tensor[0]) if axis)
    return dataclasses.replace(parallel, vocab_tiles=_nearest_divisor(tokens, section.vocab_tiles))


def _nearest_divisor(number: int, wanted: int) -> int:
    """The divisor of `number` whose ratio to `wanted` is nearest to 1."""
    divisors = (d for d in range(1, number + 1) if number % d == 0)
    return min(divisors, key=lambda d: abs(math.log(d / wanted)))


def token_order(parallel: Parallel, seq_len: int) -> np.ndarray | None:
    """Permutation of a sequence's tokens for the zigzag layout (`step.arrange`), int [seq_len]; None without it."""
    shards = parallel.mesh.shape["context"] if parallel.mesh is not None else 1
    return context_layout.zigzag_order(seq_len, shards) if parallel.zigzag and shards > 1 else None


def train_program(
    config: ConfigDict, stage: str, mesh: jax.sharding.Mesh, *, vocab_size: int, num_sources: int = 1
) -> tuple[jax.stages.Wrapped, state.TrainState, dict[str, jax.ShapeDtypeStruct]]:
    """The training step of a stage: (jitted (state, batch) -> state, abstract state, abstract batch).

    The state is donated. Abstract values are ShapeDtypeStructs with shardings, for placing real arrays and for
    `.lower(state, batch)`.

    Args:
        config: the run's config.
        stage: midtrain1, midtrain2 or sft.
        mesh: from `sharding.mesh.make_mesh`, or of a described topology.
        vocab_size: of the embedding.
        num_sources: number of mixture components.
    """
    settings = config[stage]
    model = qwen2.Qwen2Config.from_config(config.model, vocab_size)
    optimizer = make_optimizer(settings)
    parallel = resolve_parallel(config, stage, mesh, model)
    shapes = jax.eval_shape(lambda: state.new_state(_zeros(qwen2.param_shapes(model)), optimizer, num_sources))
    shardings = state.state_shardings(shapes, mesh)
    program = jax.jit(
        functools.partial(
            train_step,
            config=model,
            optimizer=optimizer,
            clip_norm=settings.clip_norm,
            limits=guards.NormLimits.from_config(settings.guard),
            num_sources=num_sources,
            loss_chunk=settings.loss_chunk,
            z_loss=settings.z_loss,
            microbatches=settings.microbatches,
            parallel=parallel,
        ),
        donate_argnums=0,
        in_shardings=(shardings, None),
        out_shardings=shardings,
    )
    return program, _with_shardings(shapes, shardings), _abstract_batch(settings, mesh)


def eval_program(
    config: ConfigDict, stage: str, mesh: jax.sharding.Mesh, *, vocab_size: int, num_sources: int = 1
) -> tuple[jax.stages.Wrapped, dict[str, Any], dict[str, jax.ShapeDtypeStruct]]:
    """The loss of a batch of a stage: (jitted (params, batch) -> sums, abstract params, abstract batch).

    The sums are those of `step.empty_sums`.
    """
    settings = config[stage]
    model = qwen2.Qwen2Config.from_config(config.model, vocab_size)
    shapes = qwen2.param_shapes(model)
    program = jax.jit(
        functools.partial(
            eval_step,
            config=model,
            num_sources=num_sources,
            loss_chunk=settings.loss_chunk,
            parallel=resolve_parallel(config, stage, mesh, model),
        )
    )
    return program, _with_shardings(shapes, rules.param_shardings(shapes, mesh)), _abstract_batch(settings, mesh)


def _zeros(shapes: Any) -> Any:
    return jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), shapes)


def _with_shardings(shapes: Any, shardings: Any) -> Any:
    return jax.tree.map(lambda s, p: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=p), shapes, shardings)


def _abstract_batch(settings: ConfigDict, mesh: jax.sharding.Mesh) -> dict[str, jax.ShapeDtypeStruct]:
    by_token, by_sequence = rules.batch_sharding(mesh), rules.batch_sharding(mesh, ndim=1)
    shape = (settings.batch_size, settings.seq_len)
    batch = {name: jax.ShapeDtypeStruct(shape, dtype, sharding=by_token) for name, dtype in BATCH_FIELDS.items()}
    return batch | {"source": jax.ShapeDtypeStruct(shape[:1], jnp.int32, sharding=by_sequence)}
