"""Arrays of a checkpoint in a bucket: zarr version 3, an object for each piece, written without reading anything back.

    arrays/<leaf, keys joined by dots>/zarr.json      shape, dtype, shape of a piece
    arrays/<leaf>/c/<index>/<index>/...               the piece at that place of the grid: its bytes, little-endian, C order

The grid follows the sharding, so every process writes objects of its own and needs no other; pieces are at most PIECE
bytes, which bounds what is in flight. Reading takes any other sharding. zarr's libraries and tensorstore read it too.
orbax is not used here: its 0.12.8 writes s3:// to a garbled path, and needs another package's file system for gs://.
"""

import hashlib
import json
import urllib.parse
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jax
import numpy as np
import tensorstore as ts

from stepdr_jax.errors import UserError
from stepdr_jax.runtime import buckets, distributed

FORMAT = "zarr3"
PIECE = 2**26  # bytes; S3 takes at most 5 GiB in one request
THREADS = 16  # requests of a process at a time


def copied(tree: Any) -> list[tuple[str, Any, tuple[int, ...], list[tuple[tuple[int, ...], np.ndarray]]]]:
    """What this process has to write of `tree`, in host memory: (leaf, dtype, shape of a whole, [(start, values)]).

    Each part of an array is written by the process that holds its first copy; what is no jax.Array by the lead.
    """
    leaves = [(_name(path), leaf) for path, leaf in jax.tree_util.tree_leaves_with_path(tree)]
    for _, leaf in leaves:
        if isinstance(leaf, jax.Array):
            leaf.copy_to_host_async()
    out = []
    for name, leaf in leaves:
        if isinstance(leaf, jax.Array):
            shards = [shard for shard in leaf.addressable_shards if shard.replica_id == 0]
            held = [(_start(shard.index, leaf.shape), np.array(shard.data)) for shard in shards]
            grid = leaf.sharding.shard_shape(leaf.shape)
        else:
            leaf = np.array(leaf)
            held, grid = [((0,) * leaf.ndim, leaf)] if distributed.is_lead() else [], leaf.shape
        out.append((name, leaf.dtype, (leaf.shape, _piece(grid, leaf.dtype.itemsize)), held))
    return out


def write(directory, parts: list) -> dict[str, list]:
    """Writes what `copied` gave below `directory`. Returns name -> [bytes, sha256] of every object of this process."""
    jobs = []
    for name, dtype, (shape, piece), held in parts:
        if distributed.is_lead():
            jobs.append((f"{name}/zarr.json", lambda a=(shape, dtype, piece): _description(*a)))
        for start, values in held:
            for cut in np.ndindex(*(size // small for size, small in zip(values.shape, piece, strict=True))):
                box = tuple(slice(i * n, (i + 1) * n) for i, n in zip(cut, piece, strict=True))
                place = [first // n + i for first, i, n in zip(start, cut, piece, strict=True)]
                jobs.append(("/".join([name, "c", *map(str, place)]), lambda v=values, b=box: v[b].tobytes()))

    def one(job) -> tuple[str, list]:
        name, data = job[0], job[1]()
        (directory / name).write_bytes(data)
        return name, [len(data), hashlib.sha256(data).hexdigest()]

    with ThreadPoolExecutor(THREADS) as pool:
        return dict(pool.map(one, jobs))


def read(kvstore: dict, abstract: Any, where) -> Any:
    """The arrays of `abstract` (jax.ShapeDtypeStruct, or arrays for their kind) with its shardings.

    Args:
        kvstore: tensorstore's description of the directory of arrays.
        where: names it in errors.

    Raises:
        UserError: an array is absent, has another shape, or cannot be read.
    """

    def one(item):
        path, like = item
        below = kvstore | {"path": f"{kvstore['path']}{_name(path)}/"}
        return buckets.patiently(
            f"{where}/{_name(path)}",
            lambda: _read_leaf(below, like),
            "could not be read ({}); run the same command again",
        )

    paths, structure = jax.tree_util.tree_flatten_with_path(abstract)
    with ThreadPoolExecutor(THREADS) as pool:
        return jax.tree.unflatten(structure, list(pool.map(one, paths)))


def _read_leaf(kvstore: dict, like: Any):
    # What lies there does not change: a piece that several devices need is fetched once.
    kept = {"recheck_cached_data": False, "context": {"cache_pool": {"total_bytes_limit": 4 * PIECE}}}
    spec = {"driver": "zarr3", "kvstore": kvstore, "fill_missing_data_reads": False} | kept
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


def _name(path) -> str:
    return urllib.parse.quote(jax.tree_util.keystr(path, simple=True, separator="."), safe="")


def _start(index: tuple[slice, ...], shape: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(part.indices(size)[0] for part, size in zip(index, shape, strict=True))


def _piece(shape: tuple[int, ...], itemsize: int) -> tuple[int, ...]:
    """`shape` divided by small factors, of early dimensions if they do, until it has at most PIECE bytes."""
    piece = list(shape)
    while int(np.prod(piece)) * itemsize > PIECE:
        factors = [next((f for f in range(2, int(n**0.5) + 1) if n % f == 0), n) if n > 1 else np.inf for n in piece]
        axis = int(np.argmin(factors))
        piece[axis] //= int(factors[axis])
    return tuple(piece)


def _description(shape: tuple[int, ...], dtype, piece: tuple[int, ...]) -> bytes:
    fields = {
        "zarr_format": 3,
        "node_type": "array",
        "shape": shape,
        "data_type": np.dtype(dtype).name,
        "chunk_grid": {"name": "regular", "configuration": {"chunk_shape": piece}},
        "chunk_key_encoding": {"name": "default", "configuration": {"separator": "/"}},
        "codecs": [{"name": "bytes", "configuration": {"endian": "little"}}],
        "fill_value": False if np.dtype(dtype).kind == "b" else 0,
        "attributes": {},
    }
    return json.dumps(fields).encode()
