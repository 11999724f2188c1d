"""Profiler traces of a few steps, for TensorBoard or Perfetto: requested by config, by a signal or by a file.

    --config.profile.steps=100,103           traces steps 100 to 103
    kill -USR1 PID                           traces the next config.profile.length steps of that process
    touch run_dir/seed0/midtrain1/profile    the same for the lead process, without a shell on its machine

Traces are written to <stage>/profiles/<step>/, one folder per process and trace.
"""

import importlib.util
import signal
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any

import jax
from ml_collections import ConfigDict

from stepdr_jax.runtime import distributed
from stepdr_jax.runtime.layout import StageLayout


class Profiler:
    """Starts and stops jax's profiler around steps.

    Args:
        layout: of the stage.
        settings: config.profile.
        write_event: `writers.StageWriters.write_event`, called when a trace is written.
    """

    def __init__(self, layout: StageLayout, settings: ConfigDict, write_event: Callable[..., None]) -> None:
        self.layout, self.length, self.write_event = layout, int(settings.length), write_event
        self.planned = tuple(settings.steps)
        self.requested = threading.Event()
        self.running: tuple[int, int, Path] | None = None  # first step, last step, folder
        self.previous: signal.Handlers | Callable[[int, FrameType | None], Any] | int | None = None
        if threading.current_thread() is threading.main_thread():
            self.previous = signal.signal(signal.SIGUSR1, lambda *_: self.requested.set())

    def before(self, step: int) -> None:
        """Call before step `step`, counted from 1."""
        if self.running:
            return
        last = self._last_step_of_trace(step)
        if last and (reason := _crash_reason()):
            print(f"no trace of step {step}: {reason}", file=sys.stderr, flush=True)
        elif last:
            folder = self.layout.traces / f"{step:08d}"
            jax.profiler.start_trace(str(folder))
            self.running = (step, last, folder)

    def after(self, step: int) -> None:
        """Call when the devices have finished step `step`."""
        if self.running and step >= self.running[1]:
            self._stop(step)

    def close(self, step: int) -> None:
        """Ends a trace that is not complete, and restores the signal handler."""
        if self.running:
            self._stop(step)
        if self.previous is not None:
            signal.signal(signal.SIGUSR1, self.previous)

    def _last_step_of_trace(self, step: int) -> int:
        """The last step of a trace that begins at `step`; 0 for none."""
        if distributed.is_lead() and self.planned[0] and step == self.planned[0]:
            return max(self.planned)
        if self.requested.is_set() or (distributed.is_lead() and self.layout.trace_request.exists()):
            self.requested.clear()
            self.layout.trace_request.unlink(missing_ok=True)
            return step + self.length - 1
        return 0

    def _stop(self, step: int) -> None:
        assert self.running is not None
        first, _, folder = self.running
        self.running = None
        jax.profiler.stop_trace()
        self.write_event("profile", step=step, first=first, folder=str(folder))


def _crash_reason() -> str:
    """Why starting jax's profiler would crash this process, or "".

    With jax 0.10.2 and libtpu 0.0.51 on a machine without a TPU, libtpu's profiler is of another version and starting
    it is a segmentation fault, unless JAX_PLATFORMS excludes TPUs.
    """
    platforms = jax.config.jax_platforms  # type: ignore[attr-defined]  # jax defines its flags at run time
    if jax.default_backend() == "cpu" and not platforms and importlib.util.find_spec("libtpu"):
        return "libtpu is installed but there is no TPU; start with JAX_PLATFORMS=cpu"
    return ""
