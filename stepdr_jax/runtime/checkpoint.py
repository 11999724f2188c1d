"""Reading, verifying and removing checkpoints.

    <directory>/<step, 8 digits>/arrays/          the arrays, written by orbax; in a bucket by `chunks`
    <directory>/<step, 8 digits>/manifest.json    {"step", "metadata", "files": {path: [bytes, sha256]}}

In a folder a checkpoint exists once its directory has its final name; in a bucket once its manifest exists. A killed
writer leaves a hidden directory (objects without a manifest), which the next save removes. Restoring verifies every
file against the manifest: a damaged checkpoint is named on standard error and the one before it is used. PPO saves its
trees here too. In every stage the policy's weights are under "params" and metadata["model"] has the fields of its
`Qwen2Config`, so that `training.state.load_params` reads any stage.
"""

import dataclasses
import hashlib
import json
import logging
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp

from stepdr_jax.errors import UserError
from stepdr_jax.runtime import chunks, distributed, storage
from stepdr_jax.runtime.saving import Saver, save_checkpoint
from stepdr_jax.runtime.storage import saved_steps

__all__ = [
    "Restored",
    "Saver",
    "latest_metadata",
    "fingerprint",
    "params_sha256",
    "remove_after",
    "restore_checkpoint",
    "save_checkpoint",
    "saved_steps",
    "verify_checkpoint",
]


@dataclasses.dataclass(frozen=True)
class Restored:
    """A verified checkpoint: its step, the requested tree, and the metadata saved with it."""

    step: int
    tree: Any
    metadata: dict[str, Any]


def restore_checkpoint(
    directory: str | os.PathLike | storage.BucketPath,
    abstract: Any,
    *,
    step: int | None = None,
    report: Callable[[str], object] | None = None,
) -> Restored | None:
    """Reads the latest undamaged checkpoint; None when there is none at all. Every process of a run must call it.

    The processes share the verification. Their number may differ from when the checkpoint was written.

    Args:
        directory: of all checkpoints of a stage.
        abstract: tree of jax.ShapeDtypeStruct or arrays with the wanted structure and shardings; other saved keys are
            not read. May be a function from metadata to such a tree.
        step: restore this step and no other.
        report: receives one line for each damaged checkpoint; default standard error.

    Raises:
        UserError: when checkpoints exist and all are damaged; or `step` is absent or damaged.
    """
    directory = storage.location(directory)
    report = report or (lambda line: print(line, file=sys.stderr, flush=True))
    present, problems = saved_steps(directory), []
    if step is not None:
        if step not in present:
            raise UserError(f"{directory} has no checkpoint of step {step}; it has {present or 'none'}")
        present = [step]
    while (step := _from_lead(present.pop() if present else -1)) >= 0:
        path = directory / f"{step:08d}"
        problem, manifest = _verify_together(path)
        if problem is None:
            wanted = abstract(manifest["metadata"]) if callable(abstract) else abstract
            return Restored(step, _read_arrays(path / "arrays", wanted, manifest), manifest["metadata"])
        problems.append(f"{path} ({problem})")
        report(f"checkpoint {path} is damaged: {problem}" + ("; trying the one before" if present else ""))
    if problems:
        raise UserError(
            f"no usable checkpoint in {directory}: {'; '.join(problems)}; "
            f"delete {directory.parent} and run the same command to train this stage again"
        )
    return None


def latest_metadata(directory: str | os.PathLike | storage.BucketPath) -> dict[str, Any]:
    """Metadata of the latest checkpoint with a readable manifest. Raises UserError when there is none."""
    directory = storage.location(directory)
    for step in reversed(saved_steps(directory)):
        try:
            return json.loads((directory / f"{step:08d}" / storage.MANIFEST).read_text())["metadata"]
        except (OSError, ValueError, KeyError, TypeError):
            continue
    raise UserError(
        f"{directory} has no checkpoint; convert a Hugging Face checkpoint with "
        "python -m launch.convert --hf=DIR --out=DIR"
    )


def fingerprint(directory: str | os.PathLike | storage.BucketPath, step: int) -> str:
    """Digest that differs between checkpoints written at the same path. Raises FileNotFoundError."""
    return str(storage.digest(storage.location(directory) / f"{step:08d}" / storage.MANIFEST)[1])


def remove_after(directory: str | os.PathLike | storage.BucketPath, step: int) -> None:
    """Removes the checkpoints of steps after `step`, which a rollback undoes."""
    directory = storage.location(directory)
    for later in saved_steps(directory):
        if later > step:
            storage.remove(directory / f"{later:08d}")


def verify_checkpoint(
    path: Path | storage.BucketPath, *, part: int = 0, parts: int = 1
) -> tuple[str | None, dict[str, Any]]:
    """(problem or None, manifest) of one checkpoint; reads every `parts`-th file in full, beginning with `part`."""
    try:
        manifest = json.loads((path / storage.MANIFEST).read_text())
        listed = manifest["files"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        return f"manifest.json is unreadable ({type(error).__name__})", {}
    problems = storage.in_parallel(lambda item: _damage(path, *item), sorted(listed.items())[part::parts])
    return next(filter(None, problems), None), manifest


def _damage(path: Path | storage.BucketPath, name: str, expected: list[int | str]) -> str | None:
    """The problem with one file, or None."""
    try:
        found = storage.digest(path / name)
    except FileNotFoundError:
        return f"{name} is missing"
    except OSError as error:
        return f"{name} cannot be read ({error.strerror or type(error).__name__})"
    if found[0] != expected[0]:
        return f"{name} has {found[0]} bytes, expected {expected[0]}"
    return None if found == expected else f"the content of {name} has changed"


def _from_lead(number: int) -> int:
    return int(distributed.gather(np.int32(number))[0, 0])


def _verify_together(path: Path | storage.BucketPath) -> tuple[str | None, dict[str, Any]]:
    """`verify_checkpoint`, shared by the processes; all return a problem when one has found one."""
    problem, manifest = verify_checkpoint(path, part=jax.process_index(), parts=jax.process_count())
    bad = distributed.gather(np.int32(problem is not None))[:, 0]
    if problem is None and bad.any():
        problem = f"process {int(bad.argmax())} found a file damaged"
    return problem, manifest


def params_sha256(params: Any) -> str:
    """Digest of every parameter's path, type, shape and bytes: equal exactly when the trees are bit-equal.

    It does not depend on how arrays are sharded. Every process of a run must call it.
    """
    digest = hashlib.sha256()
    for path, leaf in jax.tree_util.tree_leaves_with_path(params):
        digest.update(f"{jax.tree_util.keystr(path)} {leaf.dtype} {leaf.shape}\n".encode())
        for chunk in distributed.host_chunks(leaf):
            digest.update(chunk.tobytes())
    return digest.hexdigest()


def _is_not_raised(record: logging.LogRecord) -> bool:
    """False for stack traces that orbax's threads log of errors that they also raise to the caller."""
    return "_SignalingThread" not in record.getMessage()


logging.getLogger("absl").addFilter(_is_not_raised)


def _read_arrays(path: Path | storage.BucketPath, abstract: Any, manifest: dict[str, Any]) -> Any:
    if manifest.get("arrays") == chunks.FORMAT:
        with jax.transfer_guard("allow"):
            return chunks.read_arrays(storage.kvstore(path), abstract, path)
    if storage.is_remote(path):
        raise UserError(f"{path} was copied from a folder and its arrays are orbax's; copy it to a folder to read it")
    arguments = ocp.args.PyTreeRestore(
        item=abstract,
        restore_args=ocp.checkpoint_utils.construct_restore_args(abstract),
        partial_restore=True,
    )
    with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as checkpointer:
        return checkpointer.restore(path, args=arguments)
