"""The sampler's programs with abstract arguments, for one replica on devices that may only be described."""

import dataclasses
import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec
from ml_collections import ConfigDict

from stepdr_jax.engine import engine, programs, weights
from stepdr_jax.errors import UserError
from stepdr_jax.models import qwen2
from stepdr_jax.ops import paged_attention


@dataclasses.dataclass(frozen=True)
class Fixed:
    """A jitted function with its static arguments, ready to lower with the others."""

    jitted: jax.stages.Wrapped
    static: dict

    def lower(self, *arguments):
        return self.jitted.lower(*arguments, **self.static)


def layout_of(config: ConfigDict, model: qwen2.Qwen2Config, devices: Sequence[jax.Device]) -> programs.Layout:
    """The layout of one shard of `config.sampler` on the devices of a replica, as `training.sampler.engine_of` has it.

    Raises:
        UserError: sizes that do not fit each other; the message names the section.
    """
    s = config.sampler
    count = s.shards * s.replicas
    if s.slots % count:
        raise UserError(f"sampler.slots: expected a multiple of shards * replicas = {count}, got {s.slots}")
    try:
        return engine.layout_of(
            model,
            s.slots // count,
            config.agent.max_episode_tokens,
            page=s.page,
            pages=s.pages // count,
            attention=s.attention,
            devices=devices,
        )
    except ValueError as error:
        raise UserError(f"sampler: {error}; change the config's sampler section") from None


def decode(layout: programs.Layout, *, slots: int, steps: int, stop_ids: int = 2):
    """(jitted, arguments) of `steps` decode steps of `slots` sequences, as `engine.Shard` calls it."""
    fields = dict.fromkeys(("token", "position", "remaining"), jnp.int32) | {
        "seed": jnp.uint32,
        "temperature": jnp.float32,
    }
    state = {name: _whole(layout, (slots,), dtype) for name, dtype in fields.items()}
    rest = (_table(layout, slots), state, _whole(layout, (stop_ids,)))
    return Fixed(programs.decode, dict(layout=layout, steps=steps)), (*_weights_and_pool(layout), *rest)


def prefill(layout: programs.Layout, *, rows: int, chunk: int):
    """(jitted, arguments) of one chunk of `rows` sequences."""
    rest = (_whole(layout, (rows, chunk)), _whole(layout, (rows,)), _whole(layout, (rows,)))
    return Fixed(programs.prefill, dict(layout=layout)), (*_weights_and_pool(layout), _table(layout, rows), *rest)


def _whole(layout, shape, dtype=jnp.int32):
    return jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(layout.mesh, PartitionSpec()))


def _table(layout, rows):
    return _whole(layout, (rows, layout.columns))


def _weights_and_pool(layout: programs.Layout):
    model = layout.config

    def placed(a, spec):
        return jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=NamedSharding(layout.mesh, spec))

    params = qwen2.param_shapes(model)
    unstacked = jax.eval_shape(functools.partial(weights.unstack, config=model), params)
    page = functools.partial(paged_attention.init_pages, layout.attention, layout.pages, layout.page)
    pool = jax.eval_shape(lambda: [page(model.num_kv_heads, model.head_dim, model.dtype)] * model.num_layers)
    return (
        jax.tree.map(placed, unstacked, layout.weight_specs(unstacked)),
        jax.tree.map(lambda a: placed(a, layout.pool_spec()), pool),
    )
