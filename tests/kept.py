"""Processes of tests that are killed and come back."""

import os
import socket
import subprocess
import sys
import threading
from pathlib import Path

ROOT = Path(__file__).parents[1]


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as probe:
        return probe.getsockname()[1]


class Kept:
    """A server `python -m module --port=...` that is started again on its port whenever it dies, `away` seconds later.

    A context manager. `settings` are flags of every start, `first` of the first one alone.
    """

    def __init__(self, module: str, port: int, *settings: str, first: tuple[str, ...] = (), away: float = 0.0):
        self._command = [sys.executable, "-m", module, f"--port={port}", *settings]
        self._away, self.deaths, self._stopped = away, 0, threading.Event()
        self.process = self._start(*first)
        self._thread = threading.Thread(target=self._watch)

    def _start(self, *more: str) -> subprocess.Popen:
        return subprocess.Popen([*self._command, *more], cwd=ROOT, env=os.environ | {"JAX_PLATFORMS": "cpu"})

    def _watch(self) -> None:
        while not self._stopped.wait(0.02):
            if self.process.poll() is not None:
                self.deaths += 1
                if not self._stopped.wait(self._away):
                    self.process = self._start()

    def __enter__(self) -> "Kept":
        self._thread.start()
        return self

    def __exit__(self, *exc) -> None:
        self._stopped.set()
        self._thread.join()
        self.process.kill()
        self.process.wait()
