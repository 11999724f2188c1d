"""The retrieval cache: content-addressed, shared by all sessions, one computation per key, never a failure.

A key is the hash of (what, version, arguments); a value is JSON. Values live in memory (least recently used goes
first) and, when a path is given, in a SQLite file that outlives the host.
"""

import collections
import hashlib
import json
import os
import sqlite3
from collections.abc import Awaitable, Callable
from typing import Any

from tools_env.errors import ToolError, ToolHostError
from tools_env.shared_work import SharedWork

MODES = ("read_through", "replay", "live")


def key(what: str, version: str, arguments: Any) -> str:
    """Returns the address of a result: equal arguments give equal keys whatever the order of their fields."""
    canonical = json.dumps([what, version, arguments], ensure_ascii=False, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(canonical.encode()).hexdigest()


class Cache:
    """`get` is called on the event loop; SQLite rows are small and on local disk, so they are read there too."""

    def __init__(self, path: str | os.PathLike | None = None, *, entries: int = 20_000, mode: str = "read_through"):
        """Raises ToolHostError for an unknown mode or a file that is not a cache."""
        if mode not in MODES:
            raise ToolHostError(f"expected a cache mode of {', '.join(MODES)}, got {mode!r}")
        self._mode = mode
        self._entries = entries
        self._memory: collections.OrderedDict[str, Any] = collections.OrderedDict()
        self._work = SharedWork()
        self._database = None
        if path is not None:
            try:
                self._database = sqlite3.connect(path, isolation_level=None, timeout=5.0)
                # A lost last second of a cache costs a fetch, so commits need not wait for the disk.
                self._database.execute("PRAGMA journal_mode=WAL")
                self._database.execute("PRAGMA synchronous=OFF")
                self._database.execute(
                    "CREATE TABLE IF NOT EXISTS results (key TEXT PRIMARY KEY, value TEXT) WITHOUT ROWID"
                )
            except sqlite3.DatabaseError as error:
                raise ToolHostError(f"{path} is not a usable retrieval cache ({error}); delete it") from None

    async def get(self, address: str, compute: Callable[[], Awaitable[Any]]) -> tuple[Any, bool]:
        """Returns (value, came from the cache). Exceptions of `compute` reach every waiting caller and are not kept.

        Raises ToolError on a miss in replay mode.
        """
        if self._mode != "live":
            value = self._read(address)
            if value is not None:
                return value, True
        if self._mode == "replay":
            raise ToolError("not in the replayed cache")
        return await self._work.run(address, lambda: self._fill(address, compute)), False

    def _read(self, address: str) -> Any:
        if address in self._memory:
            self._memory.move_to_end(address)
            return self._memory[address]
        if self._database is not None:
            row = self._database.execute("SELECT value FROM results WHERE key = ?", (address,)).fetchone()
            if row:
                value = json.loads(row[0])
                self._remember(address, value)
                return value
        return None

    async def _fill(self, address: str, compute: Callable[[], Awaitable[Any]]) -> Any:
        value = await compute()
        if self._mode != "live":
            self._remember(address, value)
            if self._database is not None:
                row = (address, json.dumps(value, ensure_ascii=False))
                self._database.execute("INSERT OR REPLACE INTO results VALUES (?, ?)", row)
        return value

    def _remember(self, address: str, value: Any) -> None:
        self._memory[address] = value
        self._memory.move_to_end(address)
        if len(self._memory) > self._entries:
            self._memory.popitem(last=False)

    def close(self) -> None:
        if self._database is not None:
            self._database.close()
            self._database = None
