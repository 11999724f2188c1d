"""The retrieval cache: content-addressed, shared by all sessions, one computation per key; failures are not stored.

A key is the hash of (kind, version, arguments); a value is JSON. Values are held in memory (LRU eviction) and, when one
is given, in a store that outlives the process and that other processes share. A computation runs once in this process
and, by a claim in the store, once among all processes. A failure is repeated to callers for a short time, so that they
do not overload a broken service, and is never stored.
"""

import asyncio
import collections
import contextvars
import hashlib
import json
import math
import os
import time
from collections.abc import Awaitable, Callable
from typing import Any

from tools_env.cache.shared_work import SharedWork
from tools_env.cache.stores import CacheStore, SqliteStore
from tools_env.errors import ToolError, ToolHostError

CACHE_MODES = ("read_through", "replay_only", "live")
SESSION_MODE: contextvars.ContextVar[str] = contextvars.ContextVar("stepdr_cache_mode", default="")
STORE_PAUSE = 1.0  # seconds without the store after an error, so that a hanging store does not slow every call
CLAIM_SECONDS = 30.0  # a claim of a dead process expires after this
POLL_SECONDS = 0.02


def cache_key(what: str, version: str, arguments: Any) -> str:
    """Returns the key of a result: equal arguments give equal keys whatever the order of their fields."""
    canonical = json.dumps([what, version, arguments], ensure_ascii=False, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(canonical.encode()).hexdigest()


class RetrievalCache:
    """`get` is called on the event loop. A store failure costs speed, not the call, except in replay_only."""

    def __init__(
        self,
        path: str | os.PathLike | None = None,
        *,
        store: CacheStore | None = None,
        entries: int = 20_000,
        mode: str = "read_through",
        failure_seconds: float = 0.0,
        clock: Callable[[], float] = time.monotonic,
        count: Callable[[str], None] = lambda result: None,
    ):
        """
        Args:
          path: a SQLite file as the store; `store` names any other.
          entries: values held in memory.
          failure_seconds: how long a failure is returned without another attempt.
          count: called with "hit", "miss", "failure" or "store_error".

        Raises ToolHostError for an unknown mode or a file that is not a cache.
        """
        if mode not in CACHE_MODES:
            raise ToolHostError(f"expected a cache mode of {', '.join(CACHE_MODES)}, got {mode!r}")
        self._mode = mode
        self._entries = entries
        self._failure_seconds = failure_seconds
        self._clock = clock
        self._count = count
        self._memory: collections.OrderedDict[str, Any] = collections.OrderedDict()
        self._failures: collections.OrderedDict[str, tuple[float, str]] = collections.OrderedDict()
        self._work = SharedWork()
        self._store_back = -math.inf  # when a failed store is used again
        self._store = SqliteStore(path) if store is None and path is not None else store

    async def get(self, address: str, compute: Callable[[], Awaitable[Any]]) -> tuple[Any, bool]:
        """Returns (value, came from the cache). Exceptions of `compute` reach every waiting caller and are not kept.

        The session's cache mode (SESSION_MODE) overrides the host's. Raises ToolError on a miss in replay_only mode,
        Unavailable when the store does not answer in that mode.
        """
        mode = SESSION_MODE.get() or self._mode
        if mode != "live":
            value = await self._read(address, required=mode == "replay_only")
            if value is not None:
                self._count("hit")
                return value, True
        if mode == "replay_only":
            raise ToolError("not in the replayed cache")
        if mode == "read_through":
            until, message = self._failures.get(address, (0.0, ""))
            if until > self._clock():
                self._count("failure")
                raise ToolError(message)
        self._count("miss")
        # Live calls share no work: each needs the present state.
        shared = f"{mode} {address}"
        return await self._work.run(shared, lambda: self._fill(address, compute, keep=mode != "live")), False

    async def _read(self, address: str, required: bool = False) -> Any:
        if address in self._memory:
            self._memory.move_to_end(address)
            return self._memory[address]
        if self._store is None or not (required or self._store_works()):
            return None
        try:
            text = await self._store.get(address)
        except self._store.errors:
            self._store_broke()
            if required:
                raise
            return None
        if text is None:
            return None
        value = json.loads(text)
        self._remember(address, value)
        return value

    async def _fill(self, address: str, compute: Callable[[], Awaitable[Any]], keep: bool) -> Any:
        if not keep:
            return await compute()
        claimed = await self._claim(address)
        try:
            # Another process may have finished between our lookup and our claim.
            if claimed is not None and (value := await self._read(address)) is not None:
                return value
            try:
                value = await compute()
            except ToolError as error:
                self._fail(address, str(error))
                raise
            self._remember(address, value)
            if self._store is not None and self._store_works():
                try:
                    await self._store.put(address, json.dumps(value, ensure_ascii=False))
                except self._store.errors:
                    self._store_broke()
            return value
        finally:
            if claimed:
                try:
                    await self._store.release(address, claimed)
                except self._store.errors:
                    self._store_broke()

    def _store_works(self) -> bool:
        return self._clock() >= self._store_back

    def _store_broke(self) -> None:
        self._count("store_error")
        self._store_back = self._clock() + STORE_PAUSE

    async def _claim(self, address: str) -> str | None:
        """Returns the claim's token when this process computes, "" when another has finished, None without a store."""
        if self._store is None or not self._store.shared or not self._store_works():
            return None
        end = self._clock() + CLAIM_SECONDS
        try:
            while self._clock() < end:
                if token := await self._store.claim(address, CLAIM_SECONDS):
                    return token
                await asyncio.sleep(POLL_SECONDS)
                if await self._read(address) is not None:
                    return ""
        except self._store.errors:
            self._store_broke()
        return None

    def _fail(self, address: str, message: str) -> None:
        if self._failure_seconds > 0:
            self._failures[address] = (self._clock() + self._failure_seconds, message)
            self._failures.move_to_end(address)
            if len(self._failures) > self._entries:
                self._failures.popitem(last=False)

    def _remember(self, address: str, value: Any) -> None:
        self._memory[address] = value
        self._memory.move_to_end(address)
        if len(self._memory) > self._entries:
            self._memory.popitem(last=False)

    def close(self) -> None:
        if self._store is not None:
            self._store.close()
            self._store = None
