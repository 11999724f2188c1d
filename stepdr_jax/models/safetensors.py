"""The safetensors format: tensors found without reading them, mapped one at a time, and written one at a time.

A file is an 8-byte little-endian length, that many bytes of JSON {name: {dtype, shape, data_offsets}}, and the data.
Only the floating types that a checkpoint to train from may have are read; nothing here needs torch.
"""

import dataclasses
import json
import math
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import ml_dtypes
import numpy as np

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
DTYPES = {"F32": np.dtype(np.float32), "BF16": np.dtype(ml_dtypes.bfloat16), "F16": np.dtype(np.float16)}
NAMES = {dtype: name for name, dtype in DTYPES.items()}
_LONGEST_HEADER = 100_000_000  # bytes, the format's own limit


@dataclasses.dataclass(frozen=True)
class Stored:
    """Where one tensor lies.

    dtype is the format's name of it, a key of DTYPES if this project can read it; offset is in bytes from the start of
    the file at `path`.
    """

    path: Path
    dtype: str
    shape: tuple[int, ...]
    offset: int

    def map(self) -> np.ndarray:
        """The tensor as a read-only view of the file: only what is indexed is read, and freed with the view."""
        return np.memmap(self.path, DTYPES[self.dtype], mode="r", offset=self.offset, shape=self.shape)


def find(directory: Path) -> tuple[Mapping[str, Stored | None], list[str]]:
    """(tensors of the checkpoint in a directory by name, what is wrong with its files); reads headers only.

    None stands for a tensor whose file is missing or damaged.

    A single file goes before an index, as in transformers.
    """
    if (directory / SINGLE).is_file():
        return header(directory / SINGLE)
    if not (directory / INDEX).is_file():
        return {}, [f"neither {SINGLE} nor {INDEX} is there" + _other_weights(directory)]
    try:
        weight_map = json.loads((directory / INDEX).read_text())["weight_map"]
        listed = {name: Path(file) for name, file in weight_map.items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        return {}, [f"{INDEX} has no readable weight_map ({type(error).__name__})"]
    found: dict[str, Stored | None] = {}
    problems: list[str] = []
    for file in sorted(set(listed.values())):
        if file.name != str(file):
            problems.append(f"{INDEX} points to {file}, which is not in the same folder")
        elif not (directory / file).is_file():
            problems.append(f"file {file} of {INDEX} is missing")
            found |= {name: None for name, where in listed.items() if where == file}  # missing once, not per tensor
        else:
            tensors, wrong = header(directory / file)
            problems += wrong
            if wrong and not tensors:
                found |= {name: None for name, where in listed.items() if where == file}
            problems += [f"{name} is in two files" for name in tensors if found.get(name) is not None]
            found |= tensors
    return found, problems


def header(path: Path) -> tuple[dict[str, Stored], list[str]]:
    """(tensors of one file, what is wrong with it); a file without a readable header has no tensors."""
    size = path.stat().st_size
    with open(path, "rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if size < 8 or length > min(size - 8, _LONGEST_HEADER):
            return {}, [f"{path.name} is truncated or not safetensors ({size} bytes, header of {length})"]
        text = file.read(length)
    start = 8 + length
    tensors, problems, end = {}, [], 0
    try:
        entries = json.loads(text)
        entries.pop("__metadata__", None)
        for name, entry in entries.items():
            first, last = entry["data_offsets"]
            stored = Stored(path, entry["dtype"], tuple(entry["shape"]), start + first)
            end = max(end, last)
            needed = math.prod(stored.shape) * DTYPES[stored.dtype].itemsize if stored.dtype in DTYPES else last - first
            if first < 0 or last - first != needed:
                problems.append(f"{name} in {path.name} is at bytes {first} to {last}, expected {needed} of them")
            tensors[name] = stored
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        return {}, [f"{path.name} has an unreadable header ({type(error).__name__})"]
    if size != start + end:
        problems.append(f"{path.name} is truncated or damaged: {size} bytes, expected {start + end}")
    return tensors, problems


def write(
    path: Path, tensors: Sequence[tuple[str, np.dtype, tuple[int, ...]]], arrays: Iterable[np.ndarray | None]
) -> None:
    """Writes a file whose `tensors` (name, dtype, shape) come from `arrays` in the same order, one in memory at a
    time."""
    entries: dict[str, dict] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, dtype, shape in tensors:
        first, end = end, end + math.prod(shape) * dtype.itemsize
        entries[name] = {"dtype": NAMES[dtype], "shape": list(shape), "data_offsets": [first, end]}
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # data is aligned
    with open(path, "wb") as out:
        out.write(len(text).to_bytes(8, "little") + text)
        for (_, dtype, shape), array in zip(tensors, arrays, strict=True):
            assert array is not None and array.dtype == dtype and array.shape == shape and array.flags.c_contiguous
            out.write(array.reshape(-1).view(np.uint8).data)
        out.flush()
        os.fsync(out.fileno())


def _other_weights(directory: Path) -> str:
    if any(directory.glob("*.safetensors")):
        return "; its shards are, so download the index too"
    if any(directory.glob("*.bin")) or any(directory.glob("*.pt")):
        return "; weights in PyTorch's own format are not read: save them with safetensors first"
    return ""
