"""Weight synchronization from the trainer's layout and mesh to the sampler's: in buckets, so that no second copy is
ever whole.

A bucket is made where the parameters are, by one program over all their devices: layers unstacked, matrices in the
compute dtype, every array whole or, where the devices allow it, in as many parts as a replica of the sampler has
devices. The sampler's devices take their parts from there (`sharding.memory.land`): nothing moves where a part was made
on the device that wants it. With several processes each lands its own replicas; the buckets are programs of all, in the
same order.
"""

import dataclasses
import functools
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec, SingleDeviceSharding

from stepdr_jax.engine.programs import Layout
from stepdr_jax.models.qwen2 import Qwen2Config, unembedding
from stepdr_jax.sharding import memory

BUCKET_BYTES = 1 << 30  # bytes of a bucket on one device


@dataclasses.dataclass(frozen=True)
class Bucket:
    """What is copied together: parameters `names` of `count` layers from `start`, or, with count 0, of none of them."""

    names: tuple[str, ...]
    start: int = 0
    count: int = 0


def unstack(params: dict, *, config: Qwen2Config) -> dict:
    """The sampler's layout of a parameter tree: layers unstacked, matrices in the compute dtype, unembedding [D, V]."""
    names = tuple(params["layers"])
    ends = _in_bucket(params, 0, names=("embedding", "final_norm", "unembedding"), count=0, config=config)
    return ends | {"layers": _in_bucket(params, 0, names=names, count=config.num_layers, config=config)}


def transfer(params: dict, targets: Sequence[tuple[Layout, jax.Device]], *, limit: int = BUCKET_BYTES) -> list[dict]:
    """Copies a parameter tree to each of the sampler's replicas; `params` stay as they are.

    Beside `params` and what has arrived, a device holds at most `limit` bytes of weights in transit.

    Args:
        params: tree of `qwen2.param_shapes(config)`, on one device or on a mesh, in device memory.
        targets: layout of each replica, equal but for its devices, and its first device. All are of this process.
        limit: bytes of a bucket on one device.

    Raises:
        ValueError: one array alone is larger than the limit.
    """
    config = targets[0][0].config
    placed: list[dict] = [{"layers": [{} for _ in range(config.num_layers)]} for _ in targets]
    for bucket, program, arguments in buckets(params, targets[0][0], limit):
        arrived = land(program(*arguments), targets)
        for weights, pieces in zip(placed, jax.block_until_ready(arrived), strict=True):
            if bucket.count:
                for layer, piece in enumerate(pieces, bucket.start):
                    weights["layers"][layer] |= piece
            else:
                weights |= pieces
    return placed


def land(pieces: Any, targets: Sequence[tuple[Layout, jax.Device]]) -> list[Any]:
    """What a bucket's program returned, for each replica on its devices."""

    def placing(layout: Layout, device: jax.Device):
        if layout.mesh is None:
            return lambda name: SingleDeviceSharding(device)
        return lambda name: NamedSharding(layout.mesh, layout.weight_spec(name))

    return [_by_name(pieces, placing(layout, device), memory.land) for layout, device in targets]


def buckets(
    params: dict, layout: Layout, limit: int = BUCKET_BYTES
) -> Iterator[tuple[Bucket, jax.stages.Wrapped, tuple]]:
    """Yields (bucket, jitted, arguments) in order; `params` may be jax.ShapeDtypeStruct with shardings.

    Every program's results are split over all devices of the parameters, `layout.tensor` parts or one.

    Raises:
        ValueError: one array alone is larger than the limit.
    """
    mesh = _source_mesh(params, layout.tensor)
    shapes = jax.eval_shape(functools.partial(unstack, config=layout.config), params)
    parts = mesh.shape["part"] if mesh is not None else 1

    def size(shape, name: str) -> int:
        split = parts if "tensor" in layout.weight_spec(name) else 1
        return shape.size * shape.dtype.itemsize // split

    ends = {name: size(shape, name) for name, shape in shapes.items() if name != "layers"}
    for names in _packed(ends, limit):
        yield Bucket(names), *_program_of(params, Bucket(names), layout, mesh)
    layer = {name: size(shape, name) for name, shape in shapes["layers"][0].items()}
    for names in _packed(layer, limit):
        many = min(layout.config.num_layers, limit // sum(layer[name] for name in names))
        for start in range(0, layout.config.num_layers, many):
            bucket = Bucket(names, start, min(many, layout.config.num_layers - start))
            yield bucket, *_program_of(params, bucket, layout, mesh)


def _program_of(params: dict, bucket: Bucket, layout: Layout, mesh: Mesh | None) -> tuple[jax.stages.Wrapped, tuple]:
    """The program of a bucket, one for all buckets that differ only in where they start, and its arguments."""
    if bucket.count:
        needed = {"layers": {name: params["layers"][name] for name in bucket.names}}
    else:
        needed = {
            name: leaf for name, leaf in params.items() if name in (*bucket.names, "embedding") and name != "layers"
        }
    specs = tuple((name, layout.weight_spec(name)) for name in bucket.names)
    rest = tuple((name, leaf.sharding) for name, leaf in needed.get("layers", {}).items()) if mesh is not None else ()
    return _program(bucket.names, bucket.count, layout.config, mesh, specs, rest), (needed, np.int32(bucket.start))


@functools.lru_cache
def _program(names, count, config, mesh, specs, rest) -> jax.stages.Wrapped:
    work = functools.partial(_in_bucket, names=names, count=count, config=config, rest=rest)
    if mesh is None:
        return jax.jit(work)

    def split(spec):
        return NamedSharding(mesh, PartitionSpec(*("part" if axis == "tensor" else None for axis in spec)))

    shardings = {name: split(spec) for name, spec in specs}
    return jax.jit(work, out_shardings=[shardings] * count if count else shardings)


def _in_bucket(params: dict, start, *, names: tuple[str, ...], count: int, config: Qwen2Config, rest=()):
    dtype = jnp.dtype(config.dtype)
    if not count:
        ends = {
            "embedding": lambda: jnp.copy(params["embedding"].astype(dtype)),
            "final_norm": lambda: jnp.copy(params["final_norm"]),
            "unembedding": lambda: jnp.copy(unembedding(params).T).astype(dtype),
        }
        return {name: ends[name]() for name in names}

    held = dict(rest)

    def one(name, layer):
        w = jax.lax.dynamic_index_in_dim(params["layers"][name], start + layer, keepdims=False)
        w = w.astype(dtype) if name.endswith("kernel") else w
        if name not in held:
            return w
        # Split as it rests until it is cut out and narrow: else XLA may gather all layers first.
        split = NamedSharding(held[name].mesh, PartitionSpec(*held[name].spec[1:]))
        return jax.lax.with_sharding_constraint(w, split)

    return [{name: one(name, layer) for name in names} for layer in range(count)]


def _by_name(pieces, sharding_of, place):
    if isinstance(pieces, list):
        return [_by_name(layer, sharding_of, place) for layer in pieces]
    return {name: place(a, sharding_of(name)) for name, a in pieces.items()}


def _packed(sizes: dict[str, int], limit: int) -> list[tuple[str, ...]]:
    """Names in order, in groups of at most `limit` bytes."""
    groups: list[list[str]] = []
    room = 0
    for name, size in sizes.items():
        if size > limit:
            raise ValueError(f"expected a bucket of at least {size} bytes, for {name}, got {limit}")
        if not groups or size > room:
            groups.append([])
            room = limit
        groups[-1].append(name)
        room -= size
    return [tuple(group) for group in groups]


def _source_mesh(params: dict, tensor: int) -> Mesh | None:
    """The devices of the parameters, in their order, with an axis `part` as long as `tensor` if every process then
    holds every part, else of 1; None when they are on one device."""
    mesh = getattr(params["embedding"].sharding, "mesh", None)
    if mesh is None or mesh.size == 1:
        return None
    devices = mesh.devices.flatten()
    held: dict[int, set[int]] = {}
    for place, device in enumerate(devices):
        held.setdefault(device.process_index, set()).add(place % tensor)
    everywhere = len(devices) % tensor == 0 and all(len(parts) == tensor for parts in held.values())
    return Mesh(devices.reshape(-1, tensor if everywhere else 1), ("copy", "part"))
