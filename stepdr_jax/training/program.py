"""The compiled programs of a training stage, for the devices at hand or for a topology that is only described.

One place decides how a config's step is split over a mesh; the loop runs what the planner compiles.
"""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from stepdr_jax.errors import UserError
from stepdr_jax.models import qwen2
from stepdr_jax.models.parallel import Parallel
from stepdr_jax.ops import context_layout
from stepdr_jax.sharding import hardware, rules
from stepdr_jax.training import guards, state
from stepdr_jax.training.optimizer import optimizer_of
from stepdr_jax.training.step import evaluate, train_step

ROWS = {
    "tokens": jnp.int32,
    "targets": jnp.int32,
    "positions": jnp.int32,
    "segment_ids": jnp.int32,
    "capability": jnp.int32,
    "weight": jnp.float32,
}


def parallel_of(config: ConfigDict, stage: str, mesh: jax.sharding.Mesh, model: qwen2.Qwen2Config) -> Parallel:
    """config.parallel for one stage (or ppo) on `mesh`, every "auto" resolved.

    Raises:
        UserError: a size that its mesh axis does not divide; the message names both fields.
    """
    settings, asked = config[stage], config.parallel
    context, tensor = mesh.shape["context"], mesh.shape["tensor"]
    rows = mesh.shape["data"] * mesh.shape["fsdp"]
    if stage == "ppo":
        length, batch, remat = config.agent.max_episode_tokens, settings.microbatch_sequences, settings.remat
        fields = "ppo.microbatch_sequences: expected a multiple of mesh.data * mesh.fsdp"
    else:
        length, batch, remat = settings.seq_len, settings.batch_size, asked.remat
        rows *= settings.microbatches
        fields = f"{stage}.batch_size: expected a multiple of mesh.data * mesh.fsdp * {stage}.microbatches"
    if batch % rows:
        raise UserError(f"{fields} = {rows}, got {batch}")
    for name, size in (
        ("num_kv_heads", model.num_kv_heads),
        ("intermediate_size", model.intermediate_size),
        ("vocab_size", model.vocab_size),
    ):
        if size % tensor:
            raise UserError(f"mesh.tensor: expected a divisor of model.{name} {size}, got {tensor}")
    device = mesh.devices.flat[0]
    attention = "splash" if asked.attention == "auto" and device.platform == "tpu" else asked.attention
    strategy, zigzag, reason = asked.context_strategy, bool(asked.zigzag) and context > 1, "as configured"
    if context == 1:
        strategy, reason = "none", "mesh.context is 1"
    else:
        heads = (model.num_heads // tensor, model.num_kv_heads // tensor)
        layout = dict(axis_size=context, zigzag=zigzag)
        if strategy == "auto":
            strategy, reason = context_layout.choose(
                length,
                *heads,
                model.head_dim,
                speeds=hardware.SPEEDS.get(device.device_kind),
                device_kind=device.device_kind,
                rows=batch // rows,
                **layout,
            )
        context_layout.check_layout(length, *heads, strategy=strategy, backend=attention, **layout)
    parallel = Parallel(mesh, strategy, reason, zigzag, attention, remat)
    head = parallel.placement(model).head(tied=model.tie_embeddings)
    words = model.vocab_size // math.prod(mesh.shape[axis] for axis in (*head.v_axes, head.tensor[0]) if axis)
    return dataclasses.replace(parallel, vocab_tiles=_nearest_divisor(words, asked.vocab_tiles))


def _nearest_divisor(number: int, wanted: int) -> int:
    """The divisor of `number` whose ratio to `wanted` is nearest to 1."""
    divisors = (d for d in range(1, number + 1) if number % d == 0)
    return min(divisors, key=lambda d: abs(math.log(d / wanted)))


def order_of(parallel: Parallel, length: int) -> np.ndarray | None:
    """The order of a row's tokens that `step.arrange` takes; None where the row's own will do."""
    shards = parallel.mesh.shape["context"]
    return context_layout.zigzag_order(length, shards) if parallel.zigzag and shards > 1 else None


def train_program(
    config: ConfigDict, stage: str, mesh: jax.sharding.Mesh, *, vocab_size: int, num_sources: int = 1
) -> tuple[jax.stages.Wrapped, state.TrainState, dict]:
    """The training step of a stage: (jitted (state, batch) -> state, abstract state, abstract batch).

    The state is donated. Abstract values are ShapeDtypeStructs with their shardings: what to place real arrays by, and
    all that `.lower(state, batch)` needs.

    Args:
        config: the run's config.
        stage: midtrain1, midtrain2 or sft.
        mesh: from `sharding.mesh.make_mesh`, or of a described topology.
        vocab_size: rows of the embedding.
        num_sources: mixture components.
    """
    settings = config[stage]
    model = qwen2.Qwen2Config.from_config(config.model, vocab_size)
    optimizer = optimizer_of(settings)
    parallel = parallel_of(config, stage, mesh, model)
    shapes = jax.eval_shape(lambda: state.new_state(_zeros(qwen2.param_shapes(model)), optimizer, num_sources))
    shardings = state.state_shardings(shapes, mesh)
    program = jax.jit(
        functools.partial(
            train_step,
            config=model,
            optimizer=optimizer,
            clip_norm=settings.clip_norm,
            limits=guards.NormLimits.of(settings.guard),
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
) -> tuple[jax.stages.Wrapped, dict, dict]:
    """The loss of a stage's batch: (jitted (params, batch) -> sums as in `step.empty_sums`, abstract params, abstract batch)."""
    settings = config[stage]
    model = qwen2.Qwen2Config.from_config(config.model, vocab_size)
    shapes = qwen2.param_shapes(model)
    program = jax.jit(
        functools.partial(
            evaluate,
            config=model,
            num_sources=num_sources,
            loss_chunk=settings.loss_chunk,
            parallel=parallel_of(config, stage, mesh, model),
        )
    )
    return program, _with_shardings(shapes, rules.param_shardings(shapes, mesh)), _abstract_batch(settings, mesh)


def _zeros(shapes):
    return jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), shapes)


def _with_shardings(shapes, shardings):
    return jax.tree.map(lambda s, p: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=p), shapes, shardings)


def _abstract_batch(settings, mesh) -> dict:
    rows, row = rules.batch_sharding(mesh), rules.batch_sharding(mesh, ndim=1)
    shape = (settings.batch_size, settings.seq_len)
    batch = {name: jax.ShapeDtypeStruct(shape, dtype, sharding=rows) for name, dtype in ROWS.items()}
    return batch | {"source": jax.ShapeDtypeStruct(shape[:1], jnp.int32, sharding=row)}
