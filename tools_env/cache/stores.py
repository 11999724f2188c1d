"""Stores of the retrieval cache: a SQLite file for one host, Redis for several hosts."""

import os
import secrets
import sqlite3
import time
from typing import Protocol

from tools_env.errors import ToolHostError, Unavailable


class CacheStore(Protocol):
    """Keys are hex digests, values are JSON. Methods raise one of `errors` when the store does not answer."""

    errors: tuple[type[Exception], ...]
    shared: bool  # other processes also write to it, so computations are claimed

    async def get(self, address: str) -> str | None: ...

    async def put(self, address: str, value: str) -> None: ...

    async def claim(self, address: str, seconds: float) -> str | None:
        """Returns a token when nobody else holds the claim to compute this value, else None.

        Claims expire after `seconds`.
        """

    async def release(self, address: str, token: str) -> None: ...

    def close(self) -> None: ...


class SqliteStore:
    """Rows are small and on local disk, so they are read and written on the event loop."""

    errors = (sqlite3.Error, Unavailable)

    def __init__(self, path: str | os.PathLike, *, shared: bool = False):
        """Raises ToolHostError for a file that is not a cache."""
        self.shared = shared
        try:
            self._database = sqlite3.connect(path, isolation_level=None, timeout=5.0)
            # Losing the last second of a cache costs only a fetch, so commits do not wait for the disk.
            self._database.execute("PRAGMA journal_mode=WAL")
            self._database.execute("PRAGMA synchronous=OFF")
            for table in (
                "results (key TEXT PRIMARY KEY, value TEXT)",
                "claims (key TEXT PRIMARY KEY, token TEXT, until REAL)",
            ):
                self._database.execute(f"CREATE TABLE IF NOT EXISTS {table} WITHOUT ROWID")
        except sqlite3.DatabaseError as error:
            raise ToolHostError(f"{path} is not a usable retrieval cache ({error}); delete it") from None

    async def get(self, address: str) -> str | None:
        row = self._database.execute("SELECT value FROM results WHERE key = ?", (address,)).fetchone()
        return row[0] if row else None

    async def put(self, address: str, value: str) -> None:
        self._database.execute("INSERT OR REPLACE INTO results VALUES (?, ?)", (address, value))

    async def claim(self, address: str, seconds: float) -> str | None:
        token, now = secrets.token_hex(8), time.time()
        changed = self._database.execute(
            "INSERT INTO claims VALUES (?, ?, ?) ON CONFLICT (key) DO UPDATE SET token = excluded.token, "
            "until = excluded.until WHERE claims.until < ?",
            (address, token, now + seconds, now),
        ).rowcount
        return token if changed == 1 else None

    async def release(self, address: str, token: str) -> None:
        self._database.execute("DELETE FROM claims WHERE key = ? AND token = ?", (address, token))

    def close(self) -> None:
        self._database.close()


class RedisStore:
    """Values and claims in a Redis server that several hosts share."""

    shared = True
    _RELEASE = "if redis.call('get', KEYS[1]) == ARGV[1] then return redis.call('del', KEYS[1]) end return 0"

    def __init__(self, url: str, *, keep_seconds: float = 30 * 86400.0, timeout: float = 1.0):
        """
        Args:
          url: redis://host:port/database or rediss://...
          keep_seconds: expiry time of a value.
          timeout: seconds for one answer; a hanging server must not delay calls further.

        Raises ToolHostError for an invalid address. Connects on first use.
        """
        import redis.asyncio
        from redis.asyncio.retry import Retry
        from redis.backoff import NoBackoff
        from redis.exceptions import RedisError

        self.errors = (RedisError, OSError, Unavailable)
        self._redis_errors = (RedisError, OSError)
        self._keep = keep_seconds
        try:
            self._redis = redis.asyncio.Redis.from_url(
                url,
                decode_responses=True,
                socket_timeout=timeout,
                socket_connect_timeout=timeout,
                retry=Retry(NoBackoff(), 1),  # one retry, for a pooled connection that a restarted server has closed
            )
        except ValueError as error:
            raise ToolHostError(f"cannot use {url!r} as a Redis ({error}); write redis://host:port/0") from None

    async def _ask(self, work):
        try:
            return await work
        except self._redis_errors as error:
            raise Unavailable(f"the retrieval cache does not answer ({type(error).__name__})") from None

    async def get(self, address: str) -> str | None:
        return await self._ask(self._redis.get(f"stepdr:value:{address}"))

    async def put(self, address: str, value: str) -> None:
        await self._ask(self._redis.set(f"stepdr:value:{address}", value, px=int(self._keep * 1000)))

    async def claim(self, address: str, seconds: float) -> str | None:
        token = secrets.token_hex(8)
        done = await self._ask(self._redis.set(f"stepdr:claim:{address}", token, nx=True, px=int(seconds * 1000)))
        return token if done else None

    async def release(self, address: str, token: str) -> None:
        await self._ask(self._redis.eval(self._RELEASE, 1, f"stepdr:claim:{address}", token))

    def close(self) -> None:
        """Does nothing: `aclose` closes the connections."""

    async def aclose(self) -> None:
        await self._redis.aclose()
