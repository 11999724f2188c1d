"""Single-flight execution: work that several callers await runs once.

The work is a separate task, so the cancellation of one caller does not affect the others. When the last caller has
left, the task is cancelled, because nobody would read its result.
"""

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any


class SharedWork:
    """Joins concurrent calls by key. Stores nothing after the work has ended."""

    def __init__(self):
        self._running: dict[str, tuple[asyncio.Task, list[int]]] = {}

    def __len__(self) -> int:
        return len(self._running)

    async def run(self, key: str, work: Callable[[], Awaitable[Any]]) -> Any:
        """Returns work()'s result or raises its exception; a call with a running key joins it."""
        if key not in self._running:
            task = asyncio.get_running_loop().create_task(work())
            self._running[key] = (task, [0])
            task.add_done_callback(lambda done: self._forget(key, done))
        task, waiters = self._running[key]
        waiters[0] += 1
        try:
            return await asyncio.shield(task)
        finally:
            waiters[0] -= 1
            if not waiters[0] and not task.done():
                self._forget(key, task)
                task.cancel()

    def _forget(self, key: str, task: asyncio.Task) -> None:
        if self._running.get(key, (None,))[0] is task:
            del self._running[key]
        if task.done() and not task.cancelled():
            task.exception()  # every waiter may have left; an unread exception would be logged as a fault
