"""The sampler's programs with abstract arguments, for one replica on devices that may only be described."""

import dataclasses
import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, SingleDeviceSharding
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
    """The layout of one pool of `config.sampler` on the devices of a replica, as `engine.factory.make_engine` has it.

    Raises:
        UserError: sizes that do not fit each other; the message names the section.
    """
    s = config.sampler
    count = s.pools * s.replicas
    if s.max_num_seqs % count:
        raise UserError(
            f"sampler.max_num_seqs: expected a multiple of pools * replicas = {count}, got {s.max_num_seqs}"
        )
    try:
        return engine.layout_of(
            model,
            s.max_num_seqs // count,
            config.agent.max_episode_tokens,
            page_size=s.page_size,
            num_pages=s.num_pages // count,
            attention=s.attention,
            devices=devices,
        )
    except ValueError as error:
        raise UserError(f"sampler: {error}; change the config's sampler section") from None


def decode(layout: programs.Layout, device: jax.Device, *, max_num_seqs: int, decode_steps: int, stop_ids: int = 2):
    """(what has .lower, arguments) of `decode_steps` decode steps of `max_num_seqs` sequences, as
    `engine.scheduler.Pool` calls it.

    `device` is where everything is when the layout has no mesh.
    """
    fields = dict.fromkeys(("token", "position", "remaining"), jnp.int32) | {
        "seed": jnp.uint32,
        "temperature": jnp.float32,
    }
    state = {name: jax.ShapeDtypeStruct((max_num_seqs,), dtype) for name, dtype in fields.items()}
    rest = (_whole(max_num_seqs, layout.columns), state, _whole(stop_ids))
    return Fixed(programs.decode, dict(layout=layout, decode_steps=decode_steps)), (
        *_weights_and_pool(layout, device),
        *rest,
    )


def prefill(layout: programs.Layout, device: jax.Device, *, prefill_batch: int, prefill_chunk: int):
    """(what has .lower, arguments) of one chunk of `prefill_batch` sequences; see `decode`."""
    R, C = prefill_batch, prefill_chunk
    rest = (_whole(R, layout.columns), _whole(R, C), _whole(R), _whole(R))
    return Fixed(programs.prefill, dict(layout=layout)), (*_weights_and_pool(layout, device), *rest)


def _whole(*shape: int):
    return jax.ShapeDtypeStruct(shape, jnp.int32)  # from the host, with every call


def _weights_and_pool(layout: programs.Layout, device: jax.Device):
    model = layout.config

    def placed(a, spec):
        sharding = SingleDeviceSharding(device) if layout.mesh is None else NamedSharding(layout.mesh, spec)
        return jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=sharding)

    params = qwen2.param_shapes(model)
    unstacked = jax.eval_shape(functools.partial(weights.unstack, config=model), params)
    page = functools.partial(paged_attention.init_pages, layout.attention, layout.num_pages, layout.page_size)
    pool = jax.eval_shape(lambda: [page(model.num_kv_heads, model.head_dim, model.dtype)] * model.num_layers)
    return (
        jax.tree.map(placed, unstacked, layout.weight_specs(unstacked)),
        jax.tree.map(lambda a: placed(a, layout.pool_spec()), pool),
    )
