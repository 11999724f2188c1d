"""Runs the idempotent tasks of `launch.build_data` with Apache Beam, on this machine or on a cluster.

A task writes its file atomically, so Beam may repeat tasks, and a killed run continues with the files that are missing.
The default is Beam's in-process runner; `DirectRunner` is not used, as it first tries to download a program. On a
cluster every worker must see run_dir and the sources under the same paths (a mounted bucket or disk).
"""

import dataclasses
import logging
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TypeVar

from stepdr_jax import files
from stepdr_jax.errors import UserError

IN_PROCESS = "FnApiRunner"
T = TypeVar("T")
_stopped: list[BaseException] = []  # a signal that came while a task ran in this process


@dataclasses.dataclass(frozen=True)
class RunnerOptions:
    """`error_dir`: folder that workers and this process share, for UserErrors of tasks; `beam_options`: Beam's pipeline
    options, e.g. --project=p --region=r --temp_location=gs://b/tmp."""

    error_dir: Path
    runner: str = IN_PROCESS
    beam_options: Sequence[str] = ()


def run_tasks(tasks: Sequence[T], work: Callable[[T], None], options: RunnerOptions) -> None:
    """Calls `work` for each task. Does nothing, and imports nothing, without tasks.

    `work` must be importable and picklable. When it raises a UserError, the other tasks still run; then the error is
    raised here.
    """
    if not tasks:
        return
    logging.disable(logging.WARNING)  # Beam's import lists optional packages that are not installed
    import apache_beam as beam
    from apache_beam.options.pipeline_options import PipelineOptions

    logging.disable(logging.NOTSET)
    logging.getLogger("apache_beam").setLevel(logging.CRITICAL)  # failures are raised here
    for old in options.error_dir.glob("*.txt"):
        old.unlink()
    try:
        arguments = PipelineOptions([f"--runner={options.runner}", *options.beam_options])
        with beam.Pipeline(options=arguments) as pipeline:
            (
                pipeline
                | beam.Create(list(enumerate(tasks)), reshuffle=True)
                | beam.Map(_run_task, work=work, error_dir=options.error_dir)
            )
    except Exception as error:
        if _stopped:  # Beam wraps the signal in an error
            raise _stopped.pop() from None
        if isinstance(error, ValueError) and "runner" in str(error).lower():
            raise UserError(f"--runner={options.runner}: {str(error).splitlines()[0]}") from None
        raise
    for path in sorted(options.error_dir.glob("*.txt")):
        raise UserError(path.read_text())


def _run_task(task: tuple[int, T], work: Callable[[T], None], error_dir: Path) -> None:
    number, content = task
    try:
        work(content)
    except UserError as error:
        files.write_atomic(error_dir / f"{number:06d}.txt", str(error))
    except (SystemExit, KeyboardInterrupt) as signal:
        _stopped.append(signal)
        raise
