"""Hugging Face Qwen2 checkpoints in and out: one map of names, streamed to sharded arrays and from them.

A kernel is stored [out, in] there and [in, out] here; layers are separate tensors there and one stacked array here.
Neither direction holds the model in host memory: reading holds what this host's devices need of about CHUNK bytes of
one parameter (at least of one layer of it), writing one tensor.
"""

import collections
import contextlib
import dataclasses
import functools
import math
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from stepdr_jax import files
from stepdr_jax.errors import UserError
from stepdr_jax.models import hf_config, safetensors
from stepdr_jax.models.qwen2 import Qwen2Config, param_shapes
from stepdr_jax.sharding.rules import param_shardings

# our leaf under "layers" -> (name inside `model.layers.<i>.`, transposed)
LAYER_NAMES = {
    "attention_norm": ("input_layernorm.weight", False),
    "q_kernel": ("self_attn.q_proj.weight", True),
    "q_bias": ("self_attn.q_proj.bias", False),
    "k_kernel": ("self_attn.k_proj.weight", True),
    "k_bias": ("self_attn.k_proj.bias", False),
    "v_kernel": ("self_attn.v_proj.weight", True),
    "v_bias": ("self_attn.v_proj.bias", False),
    "output_kernel": ("self_attn.o_proj.weight", True),
    "mlp_norm": ("post_attention_layernorm.weight", False),
    "gate_kernel": ("mlp.gate_proj.weight", True),
    "up_kernel": ("mlp.up_proj.weight", True),
    "down_kernel": ("mlp.down_proj.weight", True),
}
TOP_NAMES = {
    "embedding": ("model.embed_tokens.weight", False),
    "final_norm": ("model.norm.weight", False),
    "unembedding": ("lm_head.weight", False),
}
CHUNK = 2**26  # bytes of one parameter that are read before they go to the devices
SHOWN = 12  # problems that one error lists
Report = Callable[[int, int], None]  # (bytes done, bytes in all)


@dataclasses.dataclass(frozen=True)
class Place:
    """One tensor of a checkpoint and where its values are in our tree.

    leaf is a key of LAYER_NAMES or TOP_NAMES, layer the index on its first axis (None for a leaf that is not stacked),
    shape that of the tensor there.
    """

    name: str
    leaf: str
    layer: int | None
    transposed: bool
    shape: tuple[int, ...]


def places(config: Qwen2Config) -> list[Place]:
    """Every tensor of a checkpoint of this shape, in the order of the network."""
    shapes = param_shapes(config)

    def top(leaf):
        name, transposed = TOP_NAMES[leaf]
        shape = shapes[leaf].shape
        return Place(name, leaf, None, transposed, shape[::-1] if transposed else shape)

    def layer(i, leaf):
        name, transposed = LAYER_NAMES[leaf]
        shape = shapes["layers"][leaf].shape[1:]
        return Place(f"model.layers.{i}.{name}", leaf, i, transposed, shape[::-1] if transposed else shape)

    layers = [layer(i, leaf) for i in range(config.num_layers) for leaf in LAYER_NAMES]
    return [top("embedding"), *layers, *(top(leaf) for leaf in TOP_NAMES if leaf in shapes and leaf != "embedding")]


# --------------------------------------------------------------------------------------------------------------- in


def load(
    directory: str | os.PathLike,
    *,
    mesh: jax.sharding.Mesh | None = None,
    shardings: dict | None = None,
    param_dtype: str | None = None,
    report: Report | None = None,
) -> tuple[Qwen2Config, dict]:
    """Reads a Qwen2 or Qwen2.5 checkpoint: config.json and safetensors, one file or sharded with an index.

    Each host reads only the slices of its own devices; every process must call this. Host memory beyond the arrays
    themselves is one slice of about CHUNK bytes, or of one layer of a parameter if that is more.

    Args:
        directory: of the checkpoint.
        mesh: places the parameters by `sharding.rules`; default the first device.
        shardings: placements as a tree like the parameters', instead of `mesh`.
        param_dtype: of the returned parameters; default the narrowest type that holds every tensor exactly.
        report: called with (bytes read, bytes in all) after each piece.

    Returns:
        (config, params): config.dtype is bfloat16 if all weights are, else float32.

    Raises:
        UserError: one for all that is wrong with the configuration, the files and the tensors in them.
    """
    directory = Path(directory)
    if not directory.is_dir():
        raise UserError(f"checkpoint folder {directory} does not exist; give the folder that has its {hf_config.FILE}")
    config, problems = hf_config.read_config(directory)
    found, wrong = safetensors.find(directory)
    problems += wrong
    if config is not None and found:
        problems += _differences(config, found)
    if problems or config is None:
        shown = "; ".join(problems[:SHOWN])
        more = f"; and {len(problems) - SHOWN} more" if len(problems) > SHOWN else ""
        raise UserError(
            f"{directory} is not a Qwen2 checkpoint that can be loaded: {shown}{more}. "
            "Correct its config.json or fetch its files again"
        )
    stored = {name: tensor for name, tensor in found.items() if tensor is not None}
    kept = functools.reduce(jnp.promote_types, (safetensors.DTYPES[tensor.dtype] for tensor in stored.values()))
    config = dataclasses.replace(
        config,
        dtype="bfloat16" if kept == jnp.bfloat16 else "float32",
        param_dtype=param_dtype or jnp.dtype(kept).name,
    )
    shapes = param_shapes(config)
    if shardings is None:
        one = jax.sharding.SingleDeviceSharding(jax.devices()[0])
        shardings = param_shardings(shapes, mesh) if mesh is not None else jax.tree.map(lambda _: one, shapes)
    sources: dict[str, list[Place]] = {}
    for place in places(config):
        sources.setdefault(place.leaf, []).append(place)
    total = sum(math.prod(leaf.shape) * leaf.dtype.itemsize for leaf in jax.tree.leaves(shapes))
    done = 0

    def advance(values):
        nonlocal done
        done += values * jnp.dtype(config.param_dtype).itemsize
        if report is not None:
            report(done, total)

    def read(path, shape, sharding):
        source = [(stored[place.name], place) for place in sources[path[-1].key]]
        return _place(source, shape, sharding, advance)

    return config, jax.tree_util.tree_map_with_path(read, shapes, shardings)


def _differences(config: Qwen2Config, stored: Mapping[str, safetensors.Stored | None]) -> list[str]:
    """What the tensors lack or have beyond those of `config`; None stands for one whose file is damaged."""
    expected = {place.name: place.shape for place in places(config)}
    problems = [f"tensor {name} is missing" for name in expected if name not in stored]
    extra = [name for name in stored if name not in expected]
    head, embedding = stored.get("lm_head.weight"), stored.get("model.embed_tokens.weight")
    if config.tie_embeddings and head is not None and embedding is not None:
        extra.remove("lm_head.weight")
        if not _equal(head, embedding):
            problems.append("lm_head.weight differs from the embedding, but tie_word_embeddings is true")
    problems += [f"tensor {name} is not one of Qwen2's" for name in extra]
    for name, shape in expected.items():
        tensor = stored.get(name)
        if tensor is None:
            continue
        if tensor.shape != shape:
            problems.append(f"{name} has shape {tensor.shape}, expected {shape}")
        if tensor.dtype not in safetensors.DTYPES:
            known = ", ".join(safetensors.DTYPES)
            problems.append(f"{name} has type {tensor.dtype}, expected one of {known}")
    return problems


def _equal(a: safetensors.Stored, b: safetensors.Stored) -> bool:
    if (a.shape, a.dtype) != (b.shape, b.dtype) or a.dtype not in safetensors.DTYPES or not a.shape:
        return False
    x, y = a.map(), b.map()
    return all(np.array_equal(x[i : i + 1024], y[i : i + 1024]) for i in range(0, len(x), 1024))


def _place(source: list, shape: jax.ShapeDtypeStruct, sharding, advance: Callable[[int], None]) -> jax.Array:
    """The array of one parameter, read in pieces of whole layers; `advance` is told how many values each piece has."""
    values = math.prod(shape.shape)
    layers = len(source)
    split = sharding.shard_shape(shape.shape)
    on_host = collections.defaultdict(set)
    for device, index in sharding.devices_indices_map(shape.shape).items():
        on_host[device.process_index].add(str(index))
    # Of the host with most: all processes must run the same updates.
    bytes_here = max(map(len, on_host.values())) * math.prod(split) * shape.dtype.itemsize
    if layers == 1 or split[0] < layers or bytes_here <= CHUNK:
        array = _from_files(source, shape.shape, shape.dtype, sharding)
        advance(values)
        return array
    fitting = [n for n in range(1, layers) if layers % n == 0 and bytes_here * n <= CHUNK * layers]
    at_once = max(fitting, default=1)
    array = jax.jit(functools.partial(jnp.zeros, shape.shape, shape.dtype), out_shardings=sharding)()
    set_layers = jax.jit(_set_layers, donate_argnums=0, out_shardings=sharding)
    for first in range(0, layers, at_once):
        piece = _from_files(source[first : first + at_once], (at_once, *shape.shape[1:]), shape.dtype, sharding)
        array = jax.block_until_ready(set_layers(array, piece, np.int32(first)))
        advance(values * at_once // layers)
    return array


def _set_layers(array, piece, first):
    return jax.lax.dynamic_update_slice_in_dim(array, piece, first, 0)


def _from_files(source: list, shape: tuple[int, ...], dtype, sharding) -> jax.Array:
    """The array of one parameter (or of some layers of it); equal slices of several devices are read once."""
    stacked = source[0][1].layer is not None
    slices = {}

    def read(index):
        ranges = tuple(range(*one.indices(size)) for one, size in zip(index, shape, strict=True))
        if ranges not in slices:
            layers, inner = (ranges[0], ranges[1:]) if stacked else (range(1), ranges)
            reads = []
            out = np.empty([len(layers), *map(len, inner)], dtype)
            with ThreadPoolExecutor(os.cpu_count()) as threads:
                for i, one in zip(layers, out, strict=True):
                    parts = _parts(one, inner, source[i][1].transposed)
                    reads += [threads.submit(_read, *source[i], *part) for part in parts]
            for done in reads:
                done.result()  # raises what the thread raised
            slices[ranges] = out if stacked else out[0]
        return slices[ranges]

    return jax.block_until_ready(jax.make_array_from_callback(shape, sharding, read))


def _parts(out: np.ndarray, inner: tuple[range, ...], transposed: bool) -> Iterator[tuple[np.ndarray, tuple]]:
    """(part of `out`, its index in our array of one layer) for each thousand rows of the stored tensor."""
    axis = 1 if transposed else 0
    for first in range(0, out.shape[axis], 1024):
        last = min(first + 1024, out.shape[axis])
        index = [slice(one.start, one.stop) for one in inner]
        index[axis] = slice(inner[axis].start + first, inner[axis].start + last)
        yield out[:, first:last] if transposed else out[first:last], tuple(index)


def _read(stored: safetensors.Stored, place: Place, out: np.ndarray, index: tuple[slice, ...]) -> None:
    _copy(out, stored.map(), index, place.transposed)


def _copy(out: np.ndarray, tensor: np.ndarray, index: tuple[slice, ...], transposed: bool) -> None:
    """out = tensor[index], or (tensor.T)[index] in blocks that stay in the cache: three times faster than at once."""
    if not transposed:
        out[...] = tensor[index]
        return
    rows, columns = index
    for start in range(columns.start, columns.stop, 64):
        block = tensor[start : min(start + 64, columns.stop), rows]
        out[:, start - columns.start : start - columns.start + len(block)] = block.T


# -------------------------------------------------------------------------------------------------------------- out


def save(
    config: Qwen2Config,
    params: dict,
    directory: str | os.PathLike,
    *,
    max_shard_bytes: float = 5e9,
    dtype: str | None = None,
    max_position_embeddings: int | None = None,
    report: Report | None = None,
) -> None:
    """Writes a directory that `transformers` loads: config.json and safetensors, more than one with an index if large.

    A checkpoint that is already there is replaced; other files stay. A killed writer leaves either the old checkpoint
    or one without config.json, which nothing loads. Every process must call this; the first one writes.

    Args:
        config: model shape.
        params: tree of `param_shapes(config)`, numpy or jax, sharded or not; fetched one tensor at a time.
        directory: made if absent.
        max_shard_bytes: of one file, unless a single tensor is larger.
        dtype: float32, bfloat16 or float16; default the parameters' own.
        max_position_embeddings: longest sequence to declare; default the one that YaRN reaches, or original_context.
        report: called with (bytes fetched, bytes in all) as each tensor goes to its file.

    Raises:
        ValueError: when params and config do not belong together.
    """
    directory = Path(directory)
    shapes, given = jax.tree.map(lambda leaf: leaf.shape, param_shapes(config)), jax.tree.map(np.shape, params)
    if shapes != given:
        raise ValueError(f"expected the parameters of {config}, of shapes {shapes}, got {given}")
    types = {name: np.dtype(dtype or leaf.dtype) for name, leaf in _leaves(params).items()}
    entries = [(place.name, types[place.leaf], place.shape) for place in places(config)]
    sizes = [math.prod(shape) * dtype.itemsize for _, dtype, shape in entries]
    shards = _cut(sizes, max_shard_bytes)
    names = [safetensors.SINGLE]
    if len(shards) > 1:
        names = [f"model-{i:05d}-of-{len(shards):05d}.safetensors" for i in range(1, len(shards) + 1)]
    arrays: Iterator[np.ndarray] = (
        array.astype(types[place.leaf], copy=False) for place, array in _fetched(params, config)
    )
    if report is not None:
        arrays = _reported(arrays, sum(sizes), report)
    if jax.process_index():  # the first process writes, all take part in fetching
        for _ in arrays:
            pass
        return
    with _replacing(directory) as hidden:
        for name, shard in zip(names, shards, strict=True):
            safetensors.write(hidden / name, entries[shard], (next(arrays) for _ in range(*shard.indices(len(sizes)))))
        if len(shards) > 1:
            weight_map = {e[0]: name for name, shard in zip(names, shards, strict=True) for e in entries[shard]}
            index = {"metadata": {"total_size": sum(sizes)}, "weight_map": weight_map}
            files.write_json(hidden / safetensors.INDEX, index)
        widest = functools.reduce(jnp.promote_types, types.values())
        content = hf_config.write_config(config, dtype=widest.name, max_position_embeddings=max_position_embeddings)
        files.write_json(hidden / hf_config.FILE, content)


def tensors(config: Qwen2Config, params: dict) -> Iterator[tuple[str, np.ndarray]]:
    """(Hugging Face's name, contiguous array) of every parameter, one at a time."""
    return ((place.name, array) for place, array in _fetched(params, config))


def _fetched(params: dict, config: Qwen2Config) -> Iterator[tuple[Place, np.ndarray]]:
    leaves = _leaves(params)
    for place in places(config):
        array = _fetch(leaves[place.leaf], place.layer)
        if place.transposed:
            out = np.empty(place.shape, array.dtype)
            _copy(out, array, tuple(slice(0, size) for size in place.shape), transposed=True)
            array = out
        yield place, np.ascontiguousarray(array)


def _leaves(params: dict) -> dict:
    return {name: leaf for name, leaf in params.items() if name != "layers"} | params["layers"]


def _fetch(leaf, layer: int | None) -> np.ndarray:
    """One layer of a stacked leaf, or a whole leaf, on this host."""
    if not isinstance(leaf, jax.Array):
        return np.asarray(leaf if layer is None else leaf[layer])
    # A new array each time: numpy's copy of an array lives as long as the array.
    part = _whole(leaf) if layer is None else _layer(leaf, np.int32(layer))
    if part.is_fully_addressable:
        return np.asarray(part)
    from jax.experimental import multihost_utils

    return multihost_utils.process_allgather(part, tiled=True)


@jax.jit
def _whole(leaf):
    return jnp.copy(leaf)


@jax.jit
def _layer(leaf, i):
    return jax.lax.dynamic_index_in_dim(leaf, i, keepdims=False)


def _cut(sizes: list[int], most: float) -> list[slice]:
    """Consecutive runs of at most `most` bytes, or of one tensor that is larger."""
    cuts, room = [0], most
    for i, size in enumerate(sizes):
        if size > room and i > cuts[-1]:
            cuts.append(i)
            room = most
        room -= size
    return [slice(*ends) for ends in zip(cuts, [*cuts[1:], len(sizes)], strict=True)]


def _reported(arrays: Iterator[np.ndarray], total: int, report: Report) -> Iterator[np.ndarray]:
    done = 0
    for array in arrays:
        done += array.nbytes
        report(done, total)
        yield array


@contextlib.contextmanager
def _replacing(directory: Path) -> Iterator[Path]:
    """A hidden folder whose files replace the checkpoint in `directory` at the end; config.json goes first and comes
    last."""
    hidden = directory / ".writing"
    try:
        shutil.rmtree(hidden, ignore_errors=True)
        hidden.mkdir(parents=True)
        yield hidden
        written = sorted(hidden.iterdir(), key=lambda path: path.name == hf_config.FILE)
        (directory / hf_config.FILE).unlink(missing_ok=True)
        for old in (directory / safetensors.INDEX, *directory.glob("model*.safetensors")):
            old.unlink(missing_ok=True)
        for path in written:
            os.replace(path, directory / path.name)
        files.sync_directory(directory)
    finally:
        shutil.rmtree(hidden, ignore_errors=True)
