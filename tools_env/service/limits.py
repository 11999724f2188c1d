"""Backpressure: bounds on concurrent and waiting calls, and refusal with a retry time beyond them.

`maximum_concurrent_rpcs` of grpc.aio miscounts under cancellation (grpc issue 41531), so calls are counted here.
"""

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator

from tools_env.errors import RetryLater
from tools_env.service import tracing


class ConcurrencyLimit:
    """A semaphore with a bounded queue."""

    def __init__(self, name: str, concurrency: int, queue: int, gauges=None):
        """`gauges`: two objects with inc and dec, for running and for waiting calls."""
        self.name = name
        self.concurrency = concurrency
        self.queue = queue
        self.waiting = 0
        self._slots = asyncio.Semaphore(concurrency)
        self._running, self._waiting = gauges or (None, None)

    @property
    def full(self) -> bool:
        """Returns whether a call would have to wait."""
        return self._slots.locked()

    @contextlib.asynccontextmanager
    async def slot(self) -> AsyncIterator[None]:
        """Holds one slot. Raises RetryLater at once when the queue is full."""
        if self.full:
            if self.waiting >= self.queue:
                raise RetryLater(
                    f"{self.name}: {self.concurrency} calls run and {self.waiting} wait; retry later",
                    retry_seconds=0.05 * (1 + self.waiting / self.concurrency),
                )
            self.waiting += 1
            if self._waiting is not None:
                self._waiting.inc()
            began = time.monotonic()
            try:
                await self._slots.acquire()
            finally:
                tracing.annotate_span(queue_seconds=time.monotonic() - began)
                self.waiting -= 1
                if self._waiting is not None:
                    self._waiting.dec()
        else:
            await self._slots.acquire()
            tracing.annotate_span(queue_seconds=0.0)
        if self._running is not None:
            self._running.inc()
        try:
            yield
        finally:
            self._slots.release()
            if self._running is not None:
                self._running.dec()
