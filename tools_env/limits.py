"""Backpressure: so many calls at a time, so many waiting, and an honest refusal beyond that.

grpc.aio's own `maximum_concurrent_rpcs` loses count under cancellation (grpc issue 41531), so calls are counted here.
"""

import asyncio
import contextlib
from collections.abc import AsyncIterator

from tools_env.errors import RetryLater


class Limit:
    """A semaphore with a bounded queue."""

    def __init__(self, name: str, concurrency: int, queue: int):
        self.name = name
        self.concurrency = concurrency
        self.queue = queue
        self.waiting = 0
        self._slots = asyncio.Semaphore(concurrency)

    @contextlib.asynccontextmanager
    async def slot(self) -> AsyncIterator[None]:
        """Holds one slot. Raises RetryLater at once when the queue is full."""
        if self._slots.locked():
            if self.waiting >= self.queue:
                raise RetryLater(
                    f"{self.name}: {self.concurrency} calls run and {self.waiting} wait; retry later",
                    retry_seconds=0.05 * (1 + self.waiting / self.concurrency),
                )
            self.waiting += 1
            try:
                await self._slots.acquire()
            finally:
                self.waiting -= 1
        else:
            await self._slots.acquire()
        try:
            yield
        finally:
            self._slots.release()
