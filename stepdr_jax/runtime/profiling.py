"""Traces of a few steps on request, for TensorBoard or Perfetto: by config, by a signal, or by touching a file.

    --config.profile.steps=100,103           traces steps 100 to 103
    kill -USR1 PID                           traces the next config.profile.length steps of that process
    touch run_dir/seed0/midtrain1/profile    the same, of the first process; for when there is no shell on the machine

Traces lie in <stage>/profiles/<step>/, one folder per process and trace.
"""

import contextlib
import importlib.util
import signal
import sys
import threading
from collections.abc import Callable
from pathlib import Path

import jax

REQUEST = "profile"


class Profiler:
    """Starts and stops jax's profiler around steps.

    Args:
        home: folder of the stage.
        settings: config.profile.
        event: `writers.Journal.event`, told when a trace is written.
    """

    def __init__(self, home: Path, settings, event: Callable):
        self.home, self.length, self.event = Path(home), int(settings.length), event
        self.planned = tuple(settings.steps)
        self.first_process = jax.process_index() == 0
        self.asked = threading.Event()
        self.running: tuple[int, int, Path] | None = None
        self.previous = None
        if threading.current_thread() is threading.main_thread():
            self.previous = signal.signal(signal.SIGUSR1, lambda *_: self.asked.set())

    def before(self, step: int) -> None:
        """Call before step `step`, counted from 1, is taken."""
        if self.running:
            return
        last = self._due(step)
        if last and (reason := _crashes()):
            print(f"no trace of step {step}: {reason}", file=sys.stderr, flush=True)
        elif last:
            folder = self.home / "profiles" / f"{step:08d}"
            jax.profiler.start_trace(str(folder))
            self.running = (step, last, folder)

    def after(self, step: int) -> None:
        """Call when the devices have finished step `step`."""
        if self.running and step >= self.running[1]:
            self._stop(step)

    def close(self, step: int) -> None:
        """Ends a trace that the end of training cuts short, and gives the signal back."""
        if self.running:
            self._stop(step)
        if self.previous is not None:
            signal.signal(signal.SIGUSR1, self.previous)

    def _due(self, step: int) -> int:
        """The last step of a trace that begins at `step`; 0 for none."""
        if self.first_process and self.planned[0] and step == self.planned[0]:
            return max(self.planned)
        if self.asked.is_set() or (self.first_process and (self.home / REQUEST).exists()):
            self.asked.clear()
            with contextlib.suppress(FileNotFoundError):
                (self.home / REQUEST).unlink()
            return step + self.length - 1
        return 0

    def _stop(self, step: int) -> None:
        first, _, folder = self.running
        self.running = None
        jax.profiler.stop_trace()
        self.event("profile", step=step, first=first, folder=str(folder))


def _crashes() -> str:
    """Why jax's profiler would end this process, or "".

    jax 0.10.2 with libtpu 0.0.51 on a machine without a TPU: libtpu's part of the profiler is of another version, and
    starting it is a segmentation fault unless jax was told not to look for TPUs.
    """
    if jax.default_backend() == "cpu" and not jax.config.jax_platforms and importlib.util.find_spec("libtpu"):
        return "libtpu is installed but there is no TPU; start with JAX_PLATFORMS=cpu"
    return ""
