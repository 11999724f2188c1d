"""Arrays of a checkpoint in a bucket: zarr version 3, one object per chunk, each written once by one process.

    arrays/<leaf, keys joined by dots>/zarr.json      shape, dtype, shape of a chunk
    arrays/<leaf>/c/<index>/<index>/...               chunk at that place of the grid: its bytes, little-endian, C order

The chunk grid follows the sharding, so no two processes write the same object. A chunk has at most MAX_CHUNK_BYTES,
which bounds the memory in flight. Arrays can be read with any other sharding, and by zarr's libraries and tensorstore.
orbax is not used here: its 0.12.8 writes s3:// to a garbled path, and needs another package's file system for gs://.
"""

import dataclasses
import functools
import hashlib
import json
import urllib.parse
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jax
import numpy as np
import tensorstore as ts

from stepdr_jax.errors import UserError
from stepdr_jax.runtime import buckets, distributed

FORMAT = "zarr3"
MAX_CHUNK_BYTES = 2**26  # S3 takes at most 5 GiB in one request
THREADS = 16  # concurrent requests of a process


@dataclasses.dataclass(frozen=True)
class HostArray:
    """This process's shards of an array, in host memory.

    name: of the leaf. shape, chunk: of the full array and of a chunk. shards: (start index in every dimension, values).
    """

    name: str
    dtype: np.dtype
    shape: tuple[int, ...]
    chunk: tuple[int, ...]
    shards: list[tuple[tuple[int, ...], np.ndarray]]


def copy_to_host(tree: Any) -> list[HostArray]:
    """Copies what this process has to write of `tree`.

    Each shard is written by the process that holds its first replica; leaves that are no jax.Array by the lead process.
    """
    leaves = [(_leaf_name(path), leaf) for path, leaf in jax.tree_util.tree_leaves_with_path(tree)]
    for _, leaf in leaves:
        if isinstance(leaf, jax.Array):
            leaf.copy_to_host_async()
    out = []
    for name, leaf in leaves:
        if isinstance(leaf, jax.Array):
            first = [shard for shard in leaf.addressable_shards if shard.replica_id == 0]
            shards = [(_start(shard.index, leaf.shape), np.array(shard.data)) for shard in first]
            grid = leaf.sharding.shard_shape(leaf.shape)
        else:
            leaf = np.array(leaf)
            shards, grid = [((0,) * leaf.ndim, leaf)] if distributed.is_lead() else [], leaf.shape
        out.append(HostArray(name, leaf.dtype, leaf.shape, _chunk_shape(grid, leaf.dtype.itemsize), shards))
    return out


def write_arrays(directory: buckets.BucketPath, arrays: list[HostArray]) -> dict[str, list[int | str]]:
    """Writes arrays below `directory`. Returns name -> [bytes, sha256] of every object of this process."""
    jobs: list[tuple[str, Callable[[], bytes]]] = []
    for array in arrays:
        if distributed.is_lead():
            jobs.append((f"{array.name}/zarr.json", functools.partial(_zarr_metadata, array)))
        for start, values in array.shards:
            sizes = list(zip(values.shape, array.chunk, strict=True))
            for index in np.ndindex(*(size // chunk for size, chunk in sizes)):
                box = tuple(slice(i * n, (i + 1) * n) for i, n in zip(index, array.chunk, strict=True))
                place = [first // n + i for first, i, n in zip(start, index, array.chunk, strict=True)]
                jobs.append(("/".join([array.name, "c", *map(str, place)]), functools.partial(_bytes_of, values, box)))

    def write_object(job: tuple[str, Callable[[], bytes]]) -> tuple[str, list[int | str]]:
        name, data = job[0], job[1]()
        (directory / name).write_bytes(data)
        return name, [len(data), hashlib.sha256(data).hexdigest()]

    with ThreadPoolExecutor(THREADS) as pool:
        return dict(pool.map(write_object, jobs))


def _bytes_of(values: np.ndarray, box: tuple[slice, ...]) -> bytes:
    return values[box].tobytes()


def read_arrays(kvstore: dict[str, Any], abstract: Any, where: Path | buckets.BucketPath) -> Any:
    """Reads arrays with the structure and shardings of `abstract` (jax.ShapeDtypeStruct or arrays).

    Args:
        kvstore: tensorstore's specification of the directory of arrays.
        where: names it in errors.

    Raises:
        UserError: an array is absent, has another shape, or cannot be read.
    """

    def read_leaf(item: tuple[tuple[Any, ...], Any]) -> Any:
        name, like = _leaf_name(item[0]), item[1]
        leaf_store = kvstore | {"path": f"{kvstore['path']}{name}/"}
        refused = "could not be read ({}); run the same command again"
        return buckets.with_retries(f"{where}/{name}", lambda: _read_leaf(leaf_store, like), refused)

    paths, structure = jax.tree_util.tree_flatten_with_path(abstract)
    with ThreadPoolExecutor(THREADS) as pool:
        return jax.tree.unflatten(structure, list(pool.map(read_leaf, paths)))


def _read_leaf(kvstore: dict[str, Any], like: Any) -> jax.Array | np.ndarray:
    # Stored chunks never change: one that several devices need is fetched once.
    cached = {"recheck_cached_data": False, "context": {"cache_pool": {"total_bytes_limit": 4 * MAX_CHUNK_BYTES}}}
    spec = {"driver": "zarr3", "kvstore": kvstore, "fill_missing_data_reads": False} | cached
    stored = ts.open(spec, read=True, open=True).result()
    shape = tuple(np.shape(like))
    if stored.shape != shape:
        raise UserError(f"{kvstore['path']}: expected an array of shape {shape}, the checkpoint has {stored.shape}")
    if getattr(like, "sharding", None) is None:
        return stored.read().result().astype(like.dtype, copy=False)
    boxes = {str(box): box for box in like.sharding.addressable_devices_indices_map(shape).values()}
    pending = {name: stored[box].read() for name, box in boxes.items()}
    parts = {name: future.result().astype(like.dtype, copy=False) for name, future in pending.items()}
    return jax.make_array_from_callback(shape, like.sharding, lambda box: parts[str(box)])


def _leaf_name(path: tuple[Any, ...]) -> str:
    return urllib.parse.quote(jax.tree_util.keystr(path, simple=True, separator="."), safe="")


def _start(index: tuple[slice, ...], shape: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(part.indices(size)[0] for part, size in zip(index, shape, strict=True))


def _chunk_shape(shape: tuple[int, ...], itemsize: int) -> tuple[int, ...]:
    """`shape` divided by its smallest factors, in early dimensions first, until it has at most MAX_CHUNK_BYTES."""
    chunk = list(shape)
    while int(np.prod(chunk)) * itemsize > MAX_CHUNK_BYTES:
        factors = [next((f for f in range(2, int(n**0.5) + 1) if n % f == 0), n) if n > 1 else np.inf for n in chunk]
        axis = int(np.argmin(factors))
        chunk[axis] //= int(factors[axis])
    return tuple(chunk)


def _zarr_metadata(array: HostArray) -> bytes:
    fields = {
        "zarr_format": 3,
        "node_type": "array",
        "shape": array.shape,
        "data_type": array.dtype.name,
        "chunk_grid": {"name": "regular", "configuration": {"chunk_shape": array.chunk}},
        "chunk_key_encoding": {"name": "default", "configuration": {"separator": "/"}},
        "codecs": [{"name": "bytes", "configuration": {"endian": "little"}}],
        "fill_value": False if array.dtype.kind == "b" else 0,
        "attributes": {},
    }
    return json.dumps(fields).encode()
