"""Apache Beam as the hands of `launch.build_data`: the same idempotent tasks on this machine or on a cluster.

A task writes a file that is whole or absent, so Beam only has to hand tasks out: it may repeat them, and a run that is killed
anywhere goes on with the files that are missing. Default is Beam's in-process runner; `DirectRunner` is not, as it first tries to
download a program. On a cluster every worker must see run_dir and the sources under the same paths (a mounted bucket or disk).
"""

import logging
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TypeVar

from stepdr_jax import files
from stepdr_jax.errors import UserError

IN_PROCESS = "FnApiRunner"
T = TypeVar("T")
_stopped: list[BaseException] = []  # a signal that came while a task ran in this process


def run(
    tasks: Sequence[T], work: Callable[[T], None], failures: Path, runner: str = IN_PROCESS, options: Sequence[str] = ()
):
    """Does `work` for each task. Does nothing, and imports nothing, without tasks.

    Args:
        work: importable and picklable; a UserError that it raises is kept, other tasks go on, and it is raised here.
        failures: folder for such errors, which workers and this process share.
        options: Beam's pipeline options, e.g. --project=p --region=r --temp_location=gs://b/tmp.
    """
    if not tasks:
        return
    logging.disable(logging.WARNING)  # while it is imported: it names extras that it could use
    import apache_beam as beam
    from apache_beam.options.pipeline_options import PipelineOptions

    logging.disable(logging.NOTSET)
    logging.getLogger("apache_beam").setLevel(logging.CRITICAL)  # what fails is raised here
    for old in failures.glob("*.txt"):
        old.unlink()
    try:
        arguments = PipelineOptions([f"--runner={runner}", *options])
        with beam.Pipeline(options=arguments) as pipeline:
            (
                pipeline
                | beam.Create(list(enumerate(tasks)), reshuffle=True)
                | beam.Map(_guarded, work=work, failures=failures)
            )
    except Exception as error:
        if _stopped:  # Beam has made an error of it
            raise _stopped.pop() from None
        if isinstance(error, ValueError) and "runner" in str(error).lower():
            raise UserError(f"--runner={runner}: {str(error).splitlines()[0]}") from None
        raise
    for path in sorted(failures.glob("*.txt")):
        raise UserError(path.read_text())


def _guarded(task: tuple[int, T], work: Callable[[T], None], failures: Path) -> None:
    number, content = task
    try:
        work(content)
    except UserError as error:
        files.write_atomic(failures / f"{number:06d}.txt", str(error))
    except (SystemExit, KeyboardInterrupt) as signal:
        _stopped.append(signal)
        raise
