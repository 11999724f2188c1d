"""Reads a component on disk as one list of packed sequences over all its shards, and handles damaged ones."""

import functools
import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from array_record.python import array_record_module

from stepdr_jax.errors import UserError

# Many sequences are read at random at once; grain's ArrayRecordDataSource starts threads for each read: half the speed.
_OPTIONS = "readahead_buffer_size:0,max_parallelism:0"
OPEN_SHARDS = 256  # readers kept open, of all components together


class ComponentReader:
    """The packed sequences of a component by number, over its shards in order.

    With `on_damage` stop a missing or damaged shard is a UserError. With skip its sequences are read as padding without
    loss. All other sequences keep their positions, so hosts and resumed runs agree; `damaged` counts skips by file.
    """

    def __init__(self, folder: Path, card: dict, on_damage: str = "stop"):
        self._skip = on_damage == "skip"
        self._paths = [folder / shard["file"] for shard in card["shards"]]
        self._sizes = [shard["sequences"] for shard in card["shards"]]
        self._ends = np.cumsum(self._sizes)
        self._bytes = 7 * card["seq_len"]
        self.damaged: Counter[str] = Counter()
        for path, shard in zip(self._paths, card["shards"], strict=True):
            found = path.stat().st_size if path.exists() else None
            if found is None:
                self._damage(path, shard["sequences"], "it is missing")
            elif found != shard["bytes"]:
                self._damage(path, shard["sequences"], f"expected {shard['bytes']} bytes, got {found}")

    def __len__(self) -> int:
        return int(self._ends[-1])

    def read(self, ids: Sequence[int]) -> list[bytes | None]:
        """Returns sequences as stored (`packing.sequence_bytes`), None for a damaged one that is skipped."""
        ids_N = np.asarray(ids, np.int64)
        shard_N = np.searchsorted(self._ends, ids_N, side="right")
        found: list[bytes | None] = [None] * len(ids_N)
        for shard in np.unique(shard_N):
            places = np.flatnonzero(shard_N == shard)
            within = ids_N[places] - (self._ends[shard] - self._sizes[shard])
            for place, data in zip(places, self._read_shard(int(shard), within.tolist()), strict=True):
                found[place] = data
        return found

    def _read_shard(self, shard: int, ids: list[int]) -> list[bytes | None]:
        path = self._paths[shard]
        try:
            reader = _reader(str(path), path.stat().st_mtime_ns)
            if reader.num_records() != self._sizes[shard]:
                raise ValueError(f"expected {self._sizes[shard]} sequences, got {reader.num_records()}")
            return [self._checked(data) for data in reader.read(ids)]
        except Exception as error:  # the reader raises RuntimeError, IndexError or ValueError by the kind of damage
            if len(ids) == 1:
                return [self._damage(path, 1, error)]
        return [data for id_ in ids for data in self._read_shard(shard, [id_])]  # the others may be intact

    def _checked(self, data: bytes) -> bytes:
        if len(data) != self._bytes:
            raise ValueError(f"expected a sequence of {self._bytes} bytes, got {len(data)}")
        return data

    def _damage(self, path: Path, count: int, reason) -> None:
        short = (str(reason) or repr(reason)).splitlines()[0][:160]
        if not self._skip:
            raise UserError(
                f"{path} is damaged ({short}); delete it and run launch.build_data again, "
                f"or set config.data.on_damage=skip"
            )
        if path.name not in self.damaged:
            print(f"{path} is damaged ({short}); its sequences are read as padding", file=sys.stderr, flush=True)
        self.damaged[path.name] += count


@functools.lru_cache(maxsize=OPEN_SHARDS)
def _reader(path: str, mtime: int):
    """`mtime` is part of the cache key, so that a rebuilt file is opened again."""
    del mtime
    return array_record_module.ArrayRecordReader(path, _OPTIONS)
