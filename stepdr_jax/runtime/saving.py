"""Writing checkpoints in the background, by all processes together; atomic, whatever interrupts them.

A save proceeds as follows: the arrays leave the devices (training waits for this only); every process writes its shards
into a hidden directory and digests them; the lead process writes a manifest of all digests and renames the directory. A
bucket has no rename: there the manifest, written last, makes the checkpoint exist (`storage.saved_steps`). orbax writes
the arrays in a folder, `chunks` in a bucket.
"""

import errno
import os
import threading
import time
from collections.abc import Collection, Iterator
from pathlib import Path
from types import TracebackType
from typing import Any, NoReturn

import jax
import jax.numpy as jnp
import orbax.checkpoint as ocp

from stepdr_jax import files
from stepdr_jax.errors import UserError
from stepdr_jax.runtime import chunks, distributed, storage

HIDDEN = ".writing-"
TIMEOUT = 1800.0  # seconds that all processes together may take to write a checkpoint


class Saver:
    """Saves to one directory, at most one checkpoint at a time. A context manager.

    Args:
        directory: of all checkpoints of a stage; see `storage.location`.
        background: `save` returns when the arrays have left the devices, not when everything is written.
    """

    def __init__(self, directory: str | os.PathLike | storage.BucketPath, *, background: bool = True) -> None:
        self.directory, self.background = storage.location(directory), background
        self._orbax: ocp.AsyncCheckpointer | None = None
        if not storage.is_remote(self.directory):
            self._orbax = ocp.AsyncCheckpointer(ocp.PyTreeCheckpointHandler(), timeout_secs=int(TIMEOUT))
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None

    def save(
        self,
        step: int,
        tree: Any,
        metadata: dict[str, Any],
        *,
        keep: int,
        keep_every: int = 0,
        spare: Collection[int] = (),
        emergency: bool = False,
    ) -> None:
        """Writes `tree` as the checkpoint of `step`, then removes old checkpoints. Every process must call it.

        Checkpoints of this and later steps are removed first: they are damaged, or were undone by a rollback.

        Args:
            step: optimizer steps or PPO iterations done.
            tree: nested dict (or registered dataclass) of arrays.
            metadata: JSON-serializable.
            keep: how many recent checkpoints to keep, at least 1; with 2 or more the run survives damage to the latest.
            keep_every: checkpoints of multiples of this step are never removed; 0 = none.
            spare: steps that this call must not remove.
            emergency: an unscheduled checkpoint, which the next save may remove.

        Raises:
            UserError: the disk is full, or the storage is gone; for a save in the background, from the next call.
        """
        self.wait()
        final = self.directory / f"{step:08d}"
        target = final if storage.is_remote(final) else self.directory / f"{HIDDEN}{step:08d}"
        host_arrays: list[chunks.HostArray] | None = None
        try:
            if distributed.is_lead():
                self._clear(step)
            if self._orbax is None:
                with jax.transfer_guard("allow"):
                    host_arrays = chunks.copy_to_host(tree)
                distributed.barrier(f"cleared for {step}")  # nothing that is written from here on is removed
            else:
                if self.background and jax.devices()[0].platform == "cpu":
                    # On CPUs orbax reads the arrays' own memory, which the next step would overwrite.
                    tree = _copied(tree)
                self._orbax.save(target / "arrays", args=ocp.args.PyTreeSave(tree))
        except Exception as error:
            self._raise_failure(error, target)
        manifest = {"step": step, "metadata": metadata, "emergency": emergency}
        policy = dict(keep=keep, keep_every=keep_every, spare=spare)
        self._thread = threading.Thread(
            target=self._in_background, args=(target, final, manifest, policy, host_arrays), name="commit"
        )
        self._thread.start()
        if not self.background:
            self.wait()

    def wait(self) -> None:
        """Returns when nothing is being written any more; raises the error of a failed save."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        error, self._error = self._error, None
        if error is not None:
            self._raise_failure(error, self.directory)

    def check(self) -> None:
        """Raises the error of a failed save, without waiting for one that is being written."""
        if self._thread is not None and not self._thread.is_alive():
            self.wait()

    def close(self) -> None:
        """Waits, and ends orbax's threads."""
        self.wait()
        if self._orbax is not None:
            self._orbax.close()

    def __enter__(self) -> "Saver":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        """Finishes the current save. After an error it raises nothing, and does not wait for other processes."""
        if kind is None:
            self.close()
        elif self._thread is not None and jax.process_count() == 1:
            self._thread.join()

    # ------------------------------------------------------------------------------------------------------ details

    def _clear(self, step: int) -> None:
        """Removes unfinished files of killed processes, and what this save replaces."""
        if isinstance(self.directory, Path):
            self.directory.mkdir(parents=True, exist_ok=True)
            for leftover in self.directory.glob(f"{HIDDEN}*"):
                storage.remove(leftover)
        complete = storage.saved_steps(self.directory)
        for number in storage.numbered_entries(self.directory):
            if number >= step or number not in complete:
                storage.remove(self.directory / f"{number:08d}")

    def _in_background(
        self,
        target: Path | storage.BucketPath,
        final: Path | storage.BucketPath,
        manifest: dict[str, Any],
        policy: dict[str, Any],
        host_arrays: list[chunks.HostArray] | None,
    ) -> None:
        try:
            if host_arrays is None:
                assert self._orbax is not None and isinstance(target, Path)
                self._orbax.wait_until_finished()
                own = {name: storage.digest(path) for name, path in self._own_files(target)}
            else:
                assert isinstance(target, storage.BucketPath)
                written = chunks.write_arrays(target / "arrays", host_arrays)
                own = {f"arrays/{name}": found for name, found in written.items()}
                manifest["arrays"] = chunks.FORMAT
                host_arrays.clear()
            if not distributed.is_lead():
                storage.write_json(target / _digests_name(jax.process_index()), own)
                return
            for process in range(1, jax.process_count()):
                digests = target / _digests_name(process)
                own |= _await_json(digests)
                storage.remove_file(digests)
            manifest["files"] = dict(sorted(own.items()))
            storage.write_json(target / storage.MANIFEST, manifest)
            if isinstance(target, Path) and isinstance(final, Path):
                os.rename(target, final)
                files.sync_directory(final.parent)
            self._prune(**policy)
        except BaseException as error:  # raised by the next call of the main thread
            self._error = error

    def _own_files(self, target: Path) -> Iterator[tuple[str, Path]]:
        """(name, path) of the files that this process digests: its own; the lead process also those of no process."""
        mine = f"ocdbt.process_{jax.process_index()}"
        for name, path in sorted(storage.files_below(target)):
            parts = name.split("/")
            owner = next((part for part in parts if part.startswith("ocdbt.process_")), None)
            if owner == mine or (owner is None and distributed.is_lead() and parts[-1][0] != "."):
                yield name, path

    def _prune(self, *, keep: int, keep_every: int, spare: Collection[int]) -> None:
        present = storage.saved_steps(self.directory)
        scheduled = [step for step in present if not _is_emergency(self.directory / f"{step:08d}")]
        kept = {*scheduled[-keep:], *spare, present[-1]}
        for step in present:
            if step not in kept and not (keep_every and step % keep_every == 0 and step in scheduled):
                storage.remove(self.directory / f"{step:08d}")

    def _raise_failure(self, error: BaseException, where: Path | storage.BucketPath) -> NoReturn:
        if distributed.is_lead() and isinstance(self.directory, Path):
            for leftover in self.directory.glob(f"{HIDDEN}*"):
                storage.remove(leftover, quietly=True)
        if _caused_by(error, (errno.ENOSPC, errno.EDQUOT), "No space left on device"):
            raise UserError(
                f"disk full while writing checkpoint {where}; free space and run the same command: "
                "it continues from the checkpoint before"
            ) from error
        if _caused_by(error, LOST):
            raise UserError(
                f"the storage of checkpoint {where} failed ({_first_line(error)}); when it is back, run the same "
                "command: it continues from the checkpoint before"
            ) from error
        raise error


# Errors of a disk or network file system that is gone.
LOST = (
    errno.EIO, errno.ESTALE, errno.ENOTCONN, errno.ETIMEDOUT, errno.EHOSTDOWN, errno.ENODEV, errno.ENXIO, errno.EROFS,
    errno.ENOENT, errno.EACCES, errno.EPERM, errno.ENOTDIR,
)  # fmt: skip


_copied = jax.jit(lambda tree: jax.tree.map(jnp.copy, tree))


def save_checkpoint(
    directory: str | os.PathLike | storage.BucketPath, step: int, tree: Any, metadata: dict[str, Any], *, keep: int
) -> Path | storage.BucketPath:
    """`Saver.save`, everything written when it returns. Returns the checkpoint's path."""
    saver = Saver(directory, background=False)
    try:
        saver.save(step, tree, metadata, keep=keep)
    finally:
        saver.close()
    return saver.directory / f"{step:08d}"


def _is_emergency(path: Path | storage.BucketPath) -> bool:
    return bool((storage.read_json(path / storage.MANIFEST) or {}).get("emergency"))


def _digests_name(process: int) -> str:
    return f".digests-{process}.json"


def _await_json(path: Path | storage.BucketPath) -> dict[str, Any]:
    """Waits for a file of another process. Raises TimeoutError."""
    deadline = time.monotonic() + TIMEOUT
    while time.monotonic() < deadline:
        found = storage.read_json(path)
        if found is not None:
            return found
        time.sleep(1.0 if storage.is_remote(path) else 0.05)
    raise TimeoutError(
        f"{path} did not appear in {TIMEOUT:.0f} seconds: a process is gone, or it writes to another disk"
    )


def _caused_by(error: BaseException | None, numbers: tuple[int, ...], text: str = "\0") -> bool:
    """Whether an error, or one that it was raised from, is an OSError of these numbers or contains `text`."""
    while error is not None:
        if isinstance(error, OSError) and error.errno in numbers:
            return True
        if text in str(error):  # tensorstore reports as text
            return True
        error = error.__cause__ or error.__context__
    return False


def _first_line(error: BaseException) -> str:
    return (str(error) or type(error).__name__).splitlines()[0][:200]
