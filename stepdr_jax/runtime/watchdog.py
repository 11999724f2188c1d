"""Who hangs and who is slow: a thread that shows every stack when steps stop coming, and the slowest of all hosts.

All times are of the monotonic clock: setting the clock of the machine changes nothing here.
"""

import collections
import contextlib
import faulthandler
import os
import socket
import statistics
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import jax
import numpy as np

from stepdr_jax.runtime import distributed

REMEMBERED = 100  # steps


class Watchdog:
    """Dumps the Python stacks of all threads when no step has ended for too long, to standard error and to `folder`.

    Too long is settings.factor times the median of recent steps, at least settings.floor_seconds; before three steps have
    ended, settings.first_seconds, because they compile. It dumps again after twice the time. A process that
    settings.exit tells to ends with status 75, so that what runs it starts it again.

    A context manager: it watches inside.

    Args:
        folder: receives <host>-<process>.txt.
        settings: config.watchdog.
        on_hang: told the seconds since the last step, after the dump.
    """

    def __init__(self, folder: Path, settings, on_hang: Callable[[float], None] = lambda seconds: None):
        self.settings, self.on_hang = settings, on_hang
        self.path = Path(folder) / f"{socket.gethostname()}-{jax.process_index()}.txt"
        self._steps: collections.deque[float] = collections.deque(maxlen=REMEMBERED)
        self._last, self._dumps, self._paused = time.monotonic(), 0, False
        self._end = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)

    def step(self, seconds: float) -> None:
        """A step has ended and took so long."""
        self._steps.append(seconds)
        self._last, self._dumps = time.monotonic(), 0

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """For work between steps that may take long, such as an evaluation."""
        self._paused = True
        try:
            yield
        finally:
            self._last, self._paused = time.monotonic(), False

    def __enter__(self) -> "Watchdog":
        self._last = time.monotonic()
        if self.settings.factor:
            self._thread.start()
        return self

    def __exit__(self, *_) -> None:
        self._end.set()
        if self._thread.is_alive():
            self._thread.join()

    def limit(self) -> float:
        """Seconds without a step that are too long."""
        if len(self._steps) < 3:
            return float(self.settings.first_seconds)
        return max(self.settings.factor * statistics.median(self._steps), float(self.settings.floor_seconds))

    def _watch(self) -> None:
        while not self._end.wait(min(self.limit() / 4, 5.0)):
            silent = time.monotonic() - self._last
            if self._paused or silent <= self.limit() * 2**self._dumps:
                continue
            self._dumps += 1
            self._dump(silent)
            with contextlib.suppress(OSError):
                self.on_hang(silent)
            if self.settings.exit:
                os._exit(distributed.RESTART)

    def _dump(self, silent: float) -> None:
        title = (
            f"{distributed.name()}: no step for {silent:.0f} s (limit {self.limit():.0f} s); stacks of all threads:\n"
        )
        sys.stderr.write(title)
        sys.stderr.flush()
        faulthandler.dump_traceback(sys.__stderr__, all_threads=True)
        with contextlib.suppress(OSError):  # the disk may be what hangs
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with open(self.path, "a") as out:
                out.write(title)
                out.flush()
                faulthandler.dump_traceback(out, all_threads=True)


class Stragglers:
    """Which host keeps the others waiting.

    Steps end together on all hosts, so their durations say nothing: a host that is slow is one that hardly waits for its
    devices. What is compared is the time of a step that a host did not spend waiting.
    """

    def __init__(self):
        self._busy: list[float] = []
        names = distributed.gather(np.frombuffer(socket.gethostname().encode()[:64].ljust(64), np.uint8))
        self._hosts = [bytes(row).decode(errors="replace").strip() for row in names.astype(np.uint8)]

    def step(self, seconds: float, waited: float) -> None:
        """Takes in a step of so many seconds, `waited` of which for the devices."""
        self._busy.append(seconds - waited)

    def slowest(self) -> dict | None:
        """{"host", "process", "busy_seconds", "median"} since the last call; None for one process. All must call it."""
        if len(self._hosts) == 1 or not self._busy:
            self._busy.clear()
            return None
        busy = distributed.gather(np.float32(statistics.median(self._busy)))[:, 0]
        self._busy.clear()
        process = int(busy.argmax())
        return {
            "host": self._hosts[process],
            "process": process,
            "busy_seconds": round(float(busy[process]), 5),
            "median": round(float(np.median(busy)), 5),
        }
