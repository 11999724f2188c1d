"""A component on disk as one list of rows, whatever its shards, and what happens where they are damaged."""

import functools
import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from array_record.python import array_record_module

from stepdr_jax.errors import UserError

# Rows are read at random and many at once. grain's ArrayRecordDataSource starts threads for every such read: half the speed.
_OPTIONS = "readahead_buffer_size:0,max_parallelism:0"
OPEN_SHARDS = 256  # readers kept open, of all components together


class Component:
    """Rows of a component by number, over its shards in order.

    With `on_damage` stop a shard that is missing or damaged is a UserError. With skip its rows are padding without loss: positions
    stay as they are, so every host and every resumed run agrees on all other rows; `damaged` counts them by file.
    """

    def __init__(self, folder: Path, card: dict, on_damage: str = "stop"):
        self._skip = on_damage == "skip"
        self._paths = [folder / shard["file"] for shard in card["shards"]]
        self._sizes = [shard["rows"] for shard in card["shards"]]
        self._ends = np.cumsum(self._sizes)
        self._bytes = 7 * card["context"]
        self.damaged: Counter[str] = Counter()
        for path, shard in zip(self._paths, card["shards"], strict=True):
            found = path.stat().st_size if path.exists() else None
            if found is None:
                self._damage(path, shard["rows"], "it is missing")
            elif found != shard["bytes"]:
                self._damage(path, shard["rows"], f"expected {shard['bytes']} bytes, got {found}")

    def __len__(self) -> int:
        return int(self._ends[-1])

    def read(self, rows: Sequence[int]) -> list[bytes | None]:
        """Returns the stored form of rows (`packing.row_bytes`), None where it is damaged and damage is skipped."""
        rows_N = np.asarray(rows, np.int64)
        shard_N = np.searchsorted(self._ends, rows_N, side="right")
        found: list[bytes | None] = [None] * len(rows_N)
        for shard in np.unique(shard_N):
            places = np.flatnonzero(shard_N == shard)
            within = rows_N[places] - (self._ends[shard] - self._sizes[shard])
            for place, data in zip(places, self._read_shard(int(shard), within.tolist()), strict=True):
                found[place] = data
        return found

    def _read_shard(self, shard: int, rows: list[int]) -> list[bytes | None]:
        path = self._paths[shard]
        try:
            reader = _reader(str(path), path.stat().st_mtime_ns)
            if reader.num_records() != self._sizes[shard]:
                raise ValueError(f"expected {self._sizes[shard]} rows, got {reader.num_records()}")
            return [self._checked(data) for data in reader.read(rows)]
        except Exception as error:  # the reader raises RuntimeError, IndexError or ValueError by the kind of damage
            if len(rows) == 1:
                return [self._damage(path, 1, error)]
        return [data for row in rows for data in self._read_shard(shard, [row])]  # the others may be whole

    def _checked(self, data: bytes) -> bytes:
        if len(data) != self._bytes:
            raise ValueError(f"expected a row of {self._bytes} bytes, got {len(data)}")
        return data

    def _damage(self, path: Path, rows: int, reason) -> None:
        short = (str(reason) or repr(reason)).splitlines()[0][:160]
        if not self._skip:
            raise UserError(
                f"{path} is damaged ({short}); delete it and run launch.build_data again, or set config.data.on_damage=skip"
            )
        if path.name not in self.damaged:
            print(f"{path} is damaged ({short}); its rows are padding", file=sys.stderr, flush=True)
        self.damaged[path.name] += rows


@functools.lru_cache(maxsize=OPEN_SHARDS)
def _reader(path: str, mtime: int):
    """`mtime` makes a rebuilt file another one."""
    del mtime
    return array_record_module.ArrayRecordReader(path, _OPTIONS)
