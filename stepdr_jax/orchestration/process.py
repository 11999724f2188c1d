"""One stage as a child process: its lines, its log, its memory; and the lock that keeps two runs apart.

A process for each stage returns all memory between stages and keeps TensorFlow, which only data preparation needs, out
of training. The child is told to die with its parent, so that a killed run leaves nothing that still writes.
"""

import contextlib
import dataclasses
import fcntl
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import psutil

from stepdr_jax.errors import UserError

DIE_WITH_PARENT = "STEPDR_DIE_WITH_PARENT"  # read by launch.entry
# XLA on a CPU allocates and frees its temporaries at every step: kept by malloc, and in huge pages, they cost no page
# faults, which are a quarter of a small model's training step.
MALLOC = (
    "glibc.malloc.hugetlb=1:glibc.malloc.mmap_threshold=4294967296:glibc.malloc.trim_threshold=8589934592:"
    "glibc.malloc.top_pad=67108864"
)
STOP_SECONDS = 20.0  # an interrupted child may write its last checkpoint for so long


@dataclasses.dataclass(frozen=True)
class Outcome:
    """How a child ended. `error` is its last line that starts with "error:", or its last line."""

    status: int
    seconds: float
    peak_bytes: int  # resident memory of the child and all its children together, sampled
    error: str


def run_module(
    module: str, arguments: Sequence[str], log_path: Path, on_line: Callable[[str], None], *, every: float = 0.5
) -> Outcome:
    """Runs `python -m module arguments` to its end. Its output goes line by line to the log and to `on_line`.

    On KeyboardInterrupt the child is interrupted too, given STOP_SECONDS to save, and the interrupt is raised again.
    """
    environment = {"GLIBC_TUNABLES": MALLOC} | os.environ
    environment |= {
        DIE_WITH_PARENT: str(os.getpid()),
        "PYTHONUNBUFFERED": "1",
        "TF_CPP_MIN_LOG_LEVEL": "2",  # TensorFlow's and XLA's greetings
        "GRPC_VERBOSITY": "ERROR",
    }
    log_path.parent.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, "-m", module, *arguments]
    began = time.monotonic()
    with open(log_path, "a", buffering=1) as log:
        log.write(f"$ {' '.join(command)}\n")
        child = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            bufsize=1,
            env=environment,
            start_new_session=True,  # Ctrl-C reaches the child once, from here
        )
        memory = _Memory(child.pid, every)
        error, last = "", ""
        try:
            for line in child.stdout:
                line = line.rstrip("\n")
                log.write(line + "\n")
                last = line.strip() or last
                error = last if last.startswith("error:") else error
                on_line(line)
            status = child.wait()
        except BaseException:
            _stop(child)
            raise
        finally:
            memory.stop()
        log.write(f"[exit {status}]\n")
    return Outcome(status, time.monotonic() - began, memory.peak, (error or last).removeprefix("error:").strip())


def describe(status: int) -> str:
    """An exit status in words."""
    if status == -signal.SIGKILL:
        return "killed (signal 9); if nobody did it, the machine ran out of memory"
    if status < 0:
        return f"ended by signal {-status} ({signal.Signals(-status).name})"
    return {1: "failed", 2: "stopped", 130: "interrupted", 143: "terminated", 75: "preempted; saved"}.get(
        status, f"exit status {status}"
    )


def _stop(child: subprocess.Popen) -> None:
    with contextlib.suppress(ProcessLookupError):
        child.send_signal(signal.SIGINT)
    try:
        child.wait(STOP_SECONDS)
    except subprocess.TimeoutExpired:
        child.kill()
        child.wait()


class _Memory:
    """Samples the resident memory of a process tree in a thread."""

    def __init__(self, pid: int, every: float):
        self.peak = 0
        self._pid, self._every, self._end = pid, every, threading.Event()
        self._thread = threading.Thread(target=self._sample, daemon=True)
        self._thread.start()

    def _sample(self) -> None:
        while True:
            with contextlib.suppress(psutil.Error):
                root = psutil.Process(self._pid)
                self.peak = max(self.peak, sum(map(_resident, [root, *root.children(recursive=True)])))
            if self._end.wait(self._every):
                return

    def stop(self) -> None:
        self._end.set()
        self._thread.join()


def _resident(process: psutil.Process) -> int:
    try:
        return process.memory_info().rss
    except psutil.Error:
        return 0


@contextlib.contextmanager
def exclusive(run_dir: Path) -> Iterator[None]:
    """Locks `run_dir` until this process ends, however it ends. Raises UserError when another process holds it."""
    try:
        run_dir.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(run_dir / ".lock", os.O_RDWR | os.O_CREAT, 0o644)
    except OSError as error:
        raise UserError(
            f"run_dir {run_dir} cannot be written ({error.strerror}); make it writable or choose another with "
            "--config.run_dir=DIR"
        ) from error
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            holder = os.read(descriptor, 32).decode(errors="replace").strip() or "unknown"
            raise UserError(
                f"another quickstart (process {holder}) is working in {run_dir}; wait, stop it or choose another "
                "folder with --config.run_dir=DIR"
            ) from None
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, str(os.getpid()).encode(), 0)
        yield
    finally:
        os.close(descriptor)


def check_space(run_dir: Path, needed_bytes: int) -> None:
    """Raises UserError when the disk of `run_dir` has less than `needed_bytes` free."""
    free = shutil.disk_usage(run_dir).free
    if free < needed_bytes:
        raise UserError(
            f"{run_dir} has {free / 1e9:.1f} GB free, the run needs {needed_bytes / 1e9:.1f} GB; free space or choose "
            "another disk with --config.run_dir=DIR"
        )
