"""Hangs and slow hosts: a thread that dumps all stacks when steps stop, and a comparison of hosts.

All times are of the monotonic clock: setting the machine's clock has no effect.
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
from typing import Any

import jax
import numpy as np
from ml_collections import ConfigDict

from stepdr_jax.runtime import distributed

WINDOW = 100  # recent steps whose durations set the limit


class Watchdog:
    """Dumps the Python stacks of all threads to standard error and to `folder` when no step has ended for too long.

    Too long is settings.factor times the median of recent steps, at least settings.floor_seconds; before three steps
    have ended, settings.first_seconds, because the first step compiles. After each dump the limit doubles. With
    settings.exit the process exits with status 75 after the dump, so that its supervisor restarts it. A context
    manager.

    Args:
        folder: receives <host>-<process>.txt.
        settings: config.watchdog.
        on_hang: called after the dump with the seconds since the last step.
    """

    def __init__(
        self, folder: Path, settings: ConfigDict, on_hang: Callable[[float], object] = lambda seconds: None
    ) -> None:
        self.settings, self.on_hang = settings, on_hang
        self.path = Path(folder) / f"{socket.gethostname()}-{jax.process_index()}.txt"
        self._steps: collections.deque[float] = collections.deque(maxlen=WINDOW)
        self._last, self._dumps, self._paused = time.monotonic(), 0, False
        self._end = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)

    def record_step(self, seconds: float) -> None:
        """Records a step that has just ended."""
        self._steps.append(seconds)
        self._last, self._dumps = time.monotonic(), 0

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Turns the watchdog off for long work between steps, such as an evaluation."""
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

    def __exit__(self, *_: object) -> None:
        self._end.set()
        if self._thread.is_alive():
            self._thread.join()

    def limit(self) -> float:
        """Seconds without a step after which the process counts as hanging."""
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
        label, limit = distributed.process_label(), self.limit()
        title = f"{label}: no step for {silent:.0f} s (limit {limit:.0f} s); stacks of all threads:\n"
        sys.stderr.write(title)
        sys.stderr.flush()
        if sys.__stderr__ is not None:
            faulthandler.dump_traceback(sys.__stderr__, all_threads=True)
        with contextlib.suppress(OSError):  # the disk may be what hangs
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with open(self.path, "a") as out:
                out.write(title)
                out.flush()
                faulthandler.dump_traceback(out, all_threads=True)


class Stragglers:
    """Finds the host that holds the others up.

    Steps end together on all hosts, so their durations are equal. The slow host is the one that spends the least time
    waiting for its devices, so hosts are compared by the part of a step that they did not spend waiting.
    """

    def __init__(self) -> None:
        self._busy: list[float] = []
        names = distributed.gather(np.frombuffer(socket.gethostname().encode()[:64].ljust(64), np.uint8))
        self._hosts = [bytes(row).decode(errors="replace").strip() for row in names.astype(np.uint8)]

    def record_step(self, seconds: float, waited: float) -> None:
        """Records the duration of a step, and how much of it this process waited for its devices."""
        self._busy.append(seconds - waited)

    def slowest(self) -> dict[str, Any] | None:
        """{"host", "process", "busy_seconds", "median"} since the last call; None in a run of one process.

        `busy_seconds` is the host's median, `median` the median over hosts. Every process must call it.
        """
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
