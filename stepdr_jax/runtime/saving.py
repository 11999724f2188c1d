"""Writing checkpoints while training goes on, by all processes together; whole or absent whatever ends them.

Order of a save: the arrays leave the devices (training waits for this only); every process writes its parts into a
directory that nobody reads; every process digests its own parts; the first process adds a manifest of all digests and
makes the directory visible. On a disk that is a rename. Buckets have none: there the manifest itself, written
last, is what makes a checkpoint exist (`storage.steps`). Arrays are orbax's on a disk and `chunks` in a bucket.
"""

import errno
import os
import threading
import time
from collections.abc import Collection
from typing import Any

import jax
import jax.numpy as jnp
import orbax.checkpoint as ocp

from stepdr_jax import files
from stepdr_jax.errors import UserError
from stepdr_jax.runtime import chunks, distributed, storage

HIDDEN = ".writing-"
PATIENCE = 1800.0  # seconds that all processes together may take to write a checkpoint


class Saver:
    """Saves to one directory, at most one checkpoint at a time. A context manager.

    Args:
        directory: of all checkpoints of a stage; see `storage.location`.
        background: whether `save` returns when the arrays have left the devices, or when all is written.
    """

    def __init__(self, directory: str | os.PathLike | storage.BucketPath, *, background: bool = True):
        self.directory, self.background = storage.location(directory), background
        self._orbax = None
        if not storage.is_remote(self.directory):
            self._orbax = ocp.AsyncCheckpointer(ocp.PyTreeCheckpointHandler(), timeout_secs=int(PATIENCE))
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None

    def save(
        self,
        step: int,
        tree: Any,
        metadata: dict,
        *,
        keep: int,
        keep_every: int = 0,
        spare: Collection[int] = (),
        emergency: bool = False,
    ) -> None:
        """Writes `tree` as the checkpoint of `step`, then removes what need not be kept. Every process must call it.

        Checkpoints of later steps are removed first: they belong to a future that was damaged or abandoned.

        Args:
            step: optimiser steps or PPO iterations done.
            tree: nested dict (or registered dataclass) of arrays.
            metadata: JSON-able.
            keep: how many to keep, at least 1; 2 or more survive damage to the latest.
            keep_every: checkpoints of multiples of this step are kept for good; 0 = none.
            spare: steps that are kept as long as they are named here.
            emergency: this one is not of the schedule: the next one takes its place.

        Raises:
            UserError: the disk is full, or the storage is gone; for a save in the background, from the next call.
        """
        self.wait()
        final = self.directory / f"{step:08d}"
        target = final if storage.is_remote(final) else self.directory / f"{HIDDEN}{step:08d}"
        parts = None
        try:
            if distributed.is_lead():
                self._clear(step)
            if self._orbax is None:
                with jax.transfer_guard("allow"):
                    parts = chunks.copied(tree)
                distributed.barrier(f"cleared for {step}")  # what is written from here on stays
            else:
                if self.background and jax.devices()[0].platform == "cpu":
                    # The arrays are the host's own memory: what orbax reads must not be what the next step overwrites.
                    tree = _copied(tree)
                self._orbax.save(target / "arrays", args=ocp.args.PyTreeSave(tree))
        except Exception as error:
            self._failed(error, target)
        manifest = {"step": step, "metadata": metadata, "emergency": emergency}
        policy = dict(keep=keep, keep_every=keep_every, spare=spare)
        self._thread = threading.Thread(
            target=self._in_background, args=(target, final, manifest, policy, parts), name="commit"
        )
        self._thread.start()
        if not self.background:
            self.wait()

    def wait(self) -> None:
        """Returns when nothing is being written any more; raises what went wrong."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        error, self._error = self._error, None
        if error is not None:
            self._failed(error, self.directory)

    def check(self) -> None:
        """Raises what went wrong so far, without waiting."""
        if self._thread is not None and not self._thread.is_alive():
            self.wait()

    def close(self) -> None:
        """Waits, and ends orbax's threads."""
        self.wait()
        if self._orbax is not None:
            self._orbax.close()

    def __enter__(self) -> "Saver":
        return self

    def __exit__(self, kind, *_) -> None:
        """Ends what is being written; after an error without another one, and only alone: others may never answer."""
        if kind is None:
            self.close()
        elif self._thread is not None and jax.process_count() == 1:
            self._thread.join()

    # ------------------------------------------------------------------------------------------------------ details

    def _clear(self, step: int) -> None:
        """Removes what killed writers left and what this save replaces."""
        if not storage.is_remote(self.directory):
            self.directory.mkdir(parents=True, exist_ok=True)
            for leftover in self.directory.glob(f"{HIDDEN}*"):
                storage.remove(leftover)
        whole = storage.steps(self.directory)
        for number in storage.below(self.directory):
            if number >= step or number not in whole:
                storage.remove(self.directory / f"{number:08d}")

    def _in_background(self, target, final, manifest: dict, policy: dict, parts: list | None) -> None:
        try:
            if parts is None:
                self._orbax.wait_until_finished()
                own = {name: storage.digest(path) for name, path in self._own_files(target)}
            else:
                written = chunks.write(target / "arrays", parts)
                own = {f"arrays/{name}": found for name, found in written.items()}
                manifest["arrays"] = chunks.FORMAT
                parts.clear()
            if not distributed.is_lead():
                storage.write_json(target / _digests(jax.process_index()), own)
                return
            for process in range(1, jax.process_count()):
                part = target / _digests(process)
                own |= _await_json(part)
                storage.remove_file(part)
            manifest["files"] = dict(sorted(own.items()))
            storage.write_json(target / storage.MANIFEST, manifest)
            if target != final:
                os.rename(target, final)
                files.sync_directory(self.directory)
            self._prune(**policy)
        except BaseException as error:  # raised by the next call of the main thread
            self._error = error

    def _own_files(self, target):
        """(name, path) of what this process wrote: its parts of the arrays; the lead has everything that is nobody's."""
        mine = f"ocdbt.process_{jax.process_index()}"
        for name, path in sorted(storage.files_below(target)):
            parts = name.split("/")
            owner = next((part for part in parts if part.startswith("ocdbt.process_")), None)
            if owner == mine or (owner is None and distributed.is_lead() and parts[-1][0] != "."):
                yield name, path

    def _prune(self, *, keep: int, keep_every: int, spare: Collection[int]) -> None:
        present = storage.steps(self.directory)
        scheduled = [step for step in present if not _is_emergency(self.directory / f"{step:08d}")]
        kept = {*scheduled[-keep:], *spare, present[-1]}
        for step in present:
            if step not in kept and not (keep_every and step % keep_every == 0 and step in scheduled):
                storage.remove(self.directory / f"{step:08d}")

    def _failed(self, error: BaseException, where) -> None:
        if distributed.is_lead() and not storage.is_remote(self.directory):
            for leftover in self.directory.glob(f"{HIDDEN}*"):
                storage.remove(leftover, quietly=True)
        if _is(error, (errno.ENOSPC, errno.EDQUOT), "No space left on device"):
            raise UserError(
                f"disk full while writing checkpoint {where}; free space and run the same command: "
                "it continues from the checkpoint before"
            ) from error
        if _is(error, LOST):
            raise UserError(
                f"the storage of checkpoint {where} failed ({_first_line(error)}); when it is back, run the same command: "
                "it continues from the checkpoint before"
            ) from error
        raise error


# What a disk that has gone away answers.
LOST = (
    errno.EIO, errno.ESTALE, errno.ENOTCONN, errno.ETIMEDOUT, errno.EHOSTDOWN, errno.ENODEV, errno.ENXIO, errno.EROFS,
    errno.ENOENT, errno.EACCES, errno.EPERM, errno.ENOTDIR,
)  # fmt: skip


_copied = jax.jit(lambda tree: jax.tree.map(jnp.copy, tree))


def save(directory: str | os.PathLike, step: int, tree: Any, metadata: dict, *, keep: int):
    """`Saver.save`, all written when it returns. Returns the checkpoint's path."""
    saver = Saver(directory, background=False)
    try:
        saver.save(step, tree, metadata, keep=keep)
    finally:
        saver.close()
    return saver.directory / f"{step:08d}"


def _is_emergency(path) -> bool:
    return bool((storage.read_json(path / storage.MANIFEST) or {}).get("emergency"))


def _digests(process: int) -> str:
    return f".digests-{process}.json"


def _await_json(path) -> dict:
    """What another process writes there; TimeoutError when it does not."""
    deadline = time.monotonic() + PATIENCE
    while time.monotonic() < deadline:
        found = storage.read_json(path)
        if found is not None:
            return found
        time.sleep(1.0 if storage.is_remote(path) else 0.05)
    raise TimeoutError(f"{path} did not appear in {PATIENCE:.0f} seconds: a process is gone or its disk is another")


def _is(error: BaseException | None, numbers: tuple[int, ...], text: str = "\0") -> bool:
    while error is not None:
        if isinstance(error, OSError) and error.errno in numbers:
            return True
        if text in str(error):  # tensorstore reports as text
            return True
        error = error.__cause__ or error.__context__
    return False


def _first_line(error: BaseException) -> str:
    return (str(error) or type(error).__name__).splitlines()[0][:200]
