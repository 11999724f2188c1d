"""Which memory arrays are in, and parts of arrays on other devices: leaf by leaf, without compiled programs.

Every function works on what this process holds of an array and never waits for another process.
"""

from typing import Any

import jax
from jax.sharding import Sharding, SingleDeviceSharding

DEVICE, HOST = "device", "pinned_host"


def has_host_memory(device: jax.Device) -> bool:
    """Whether arrays can wait in pinned host memory beside `device`."""
    return any(memory.kind == HOST for memory in device.addressable_memories())


def copied(tree: Any, kind: str) -> Any:
    """The tree in memory of `kind`, one array after the other; arrays that are there already are the same objects."""
    return jax.tree.map(lambda a: _in(a, kind), tree)


def moved(tree: Any, kind: str) -> Any:
    """As `copied`, but every array that had to be copied is deleted before the next: at most one is there twice."""

    def leaf(a):
        new = jax.block_until_ready(_in(a, kind))
        if new is not a:
            a.delete()
        return new

    return jax.tree.map(leaf, tree)


def _in(array: jax.Array, kind: str) -> jax.Array:
    if array.sharding.memory_kind == kind:
        return array
    parts = [
        jax.device_put(part.data, SingleDeviceSharding(part.device, memory_kind=kind))
        for part in array.addressable_shards
    ]
    return jax.make_array_from_single_device_arrays(array.shape, array.sharding.with_memory_kind(kind), parts)


def land(array: jax.Array, sharding: Sharding) -> jax.Array:
    """`array` placed by `sharding`, all of whose devices are of this process.

    Each device takes its part from itself if it holds it (nothing is copied then: the result shares memory with
    `array`), else from a device of this process that does. Raises ValueError when none holds all of a part.
    """
    held = [(part.device, _bounds(part.index, array.shape), part.data) for part in array.addressable_shards]
    parts = []
    for place, (device, index) in enumerate(sharding.addressable_devices_indices_map(array.shape).items()):
        assert index is not None  # of an array with a shape
        wanted = _bounds(index, array.shape)
        turned = held[place % len(held) :] + held[: place % len(held)]  # not all from one device
        own_first = sorted(turned, key=lambda found: found[0] != device)
        found = next((f for f in own_first if _contains(f[1], wanted)), None)
        if found is None:
            raise ValueError(f"expected a device of this process to hold {wanted} of an array of {array.shape}")
        _, bounds, data = found
        if bounds != wanted:
            data = data[tuple(slice(a - c, b - c) for (a, b), (c, _) in zip(wanted, bounds, strict=True))]
        parts.append(jax.device_put(data, device))
    return jax.make_array_from_single_device_arrays(array.shape, sharding, parts)


def _bounds(index: tuple[slice, ...], shape: tuple[int, ...]) -> list[tuple[int, int]]:
    return [cut.indices(size)[:2] for cut, size in zip(index, shape, strict=True)]


def _contains(outer: list[tuple[int, int]], inner: list[tuple[int, int]]) -> bool:
    return all(a <= c and d <= b for (a, b), (c, d) in zip(outer, inner, strict=True))
