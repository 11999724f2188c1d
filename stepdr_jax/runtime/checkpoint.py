"""Checkpoints that are whole or ignored: arrays, a manifest of digests, one act that makes them visible, and a retreat.

    <directory>/<step, 8 digits>/arrays/          the tree, written by orbax; in a bucket by `chunks`
    <directory>/<step, 8 digits>/manifest.json    {"step", "metadata", "files": {path: [bytes, sha256]}}

A checkpoint exists once its directory has its final name (in a bucket: its manifest); a killed writer leaves only a
hidden one (without), which the next save removes. Reading verifies every file against the manifest: what does not match is named on standard error and the one
before it is used. The learner of PPO saves its trees here too; whatever the stage, the weights that act are under
"params" and metadata["model"] has their `Qwen2Config` fields, so that `training.state.load_params` reads any stage.
"""

import dataclasses
import hashlib
import json
import logging
import os
import sys
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp

from stepdr_jax.errors import UserError
from stepdr_jax.runtime import chunks, distributed, storage
from stepdr_jax.runtime.saving import Saver, save
from stepdr_jax.runtime.storage import steps

__all__ = [
    "Restored",
    "Saver",
    "latest_metadata",
    "mark",
    "params_sha256",
    "remove_after",
    "restore",
    "save",
    "steps",
    "verify",
]


@dataclasses.dataclass(frozen=True)
class Restored:
    """A verified checkpoint: its step, the tree asked for, and what was saved beside it."""

    step: int
    tree: Any
    metadata: dict


def restore(
    directory: str | os.PathLike | storage.BucketPath, abstract: Any, *, step: int | None = None, report=None
) -> Restored | None:
    """Reads the latest checkpoint that is whole; None when there is none at all. Every process of a run must call it.

    The processes share the work of verifying. They may be more or fewer than those that wrote.

    Args:
        directory: of all checkpoints of a stage.
        abstract: tree of jax.ShapeDtypeStruct or arrays with the wanted structure and shardings; keys that a saved dict
            has beyond these are not read. A function from metadata to such a tree is called first.
        step: this one and no other.
        report: receives one line for each damaged checkpoint; default standard error.

    Raises:
        UserError: when checkpoints exist and every one is damaged; or `step` is absent or damaged.
    """
    directory = storage.location(directory)
    report = report or _say
    present, problems = steps(directory), []
    if step is not None:
        if step not in present:
            raise UserError(f"{directory} has no checkpoint of step {step}; it has {present or 'none'}")
        present = [step]
    while (step := _of_lead(present.pop() if present else -1)) >= 0:
        path = directory / f"{step:08d}"
        problem, manifest = _verified_by_all(path)
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


def latest_metadata(directory: str | os.PathLike | storage.BucketPath) -> dict:
    """What was saved beside the latest checkpoint. Raises UserError when there is none that can be read."""
    directory = storage.location(directory)
    for step in reversed(steps(directory)):
        try:
            return json.loads((directory / f"{step:08d}" / storage.MANIFEST).read_text())["metadata"]
        except (OSError, ValueError, KeyError, TypeError):
            continue
    raise UserError(
        f"{directory} has no checkpoint; make one from Hugging Face's files with "
        "python -m launch.convert --hf=DIR --out=DIR"
    )


def mark(directory: str | os.PathLike | storage.BucketPath, step: int) -> str:
    """Tells a checkpoint from another one that is or was under the same name. Raises FileNotFoundError."""
    return storage.digest(storage.location(directory) / f"{step:08d}" / storage.MANIFEST)[1]


def remove_after(directory: str | os.PathLike | storage.BucketPath, step: int) -> None:
    """Removes the checkpoints of steps past `step`: what a run that goes back undoes."""
    directory = storage.location(directory)
    for later in steps(directory):
        if later > step:
            storage.remove(directory / f"{later:08d}")


def verify(path: Path | storage.BucketPath, *, part: int = 0, parts: int = 1) -> tuple[str | None, dict]:
    """(what is wrong or None, manifest) of one checkpoint directory; reads every byte of every `parts`-th file."""
    try:
        manifest = json.loads((path / storage.MANIFEST).read_text())
        listed = manifest["files"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        return f"manifest.json is unreadable ({type(error).__name__})", {}
    problems = storage.in_parallel(lambda item: _damage(path, *item), sorted(listed.items())[part::parts])
    return next(filter(None, problems), None), manifest


def _damage(path, name: str, expected: list) -> str | None:
    """What is wrong with one file."""
    try:
        found = storage.digest(path / name)
    except FileNotFoundError:
        return f"{name} is missing"
    except OSError as error:
        return f"{name} cannot be read ({error.strerror or type(error).__name__})"
    if found[0] != expected[0]:
        return f"{name} has {found[0]} bytes, expected {expected[0]}"
    return None if found == expected else f"the content of {name} has changed"


def _of_lead(number: int) -> int:
    return int(distributed.gather(np.int32(number))[0, 0])


def _verified_by_all(path) -> tuple[str | None, dict]:
    """`verify`, each process a share; what one finds, all are told of."""
    problem, manifest = verify(path, part=jax.process_index(), parts=jax.process_count())
    bad = distributed.gather(np.int32(problem is not None))[:, 0]
    if problem is None and bad.any():
        problem = f"process {int(bad.argmax())} found a file damaged"
    return problem, manifest


def params_sha256(params: Any) -> str:
    """Digest of every parameter's path, type, shape and bytes: equal exactly when the trees are bit-equal.

    The same however the arrays are spread over devices and processes; every process of a run must call it.
    """
    digest = hashlib.sha256()
    for path, leaf in jax.tree_util.tree_leaves_with_path(params):
        digest.update(f"{jax.tree_util.keystr(path)} {leaf.dtype} {leaf.shape}\n".encode())
        for piece in distributed.host_pieces(leaf):
            digest.update(piece.tobytes())
    return digest.hexdigest()


def _raised_anyway(record: logging.LogRecord) -> bool:
    """False for the stack traces that orbax's threads log of errors which they also raise to us."""
    return "_SignalingThread" not in record.getMessage()


logging.getLogger("absl").addFilter(_raised_anyway)


def _read_arrays(path, abstract: Any, manifest: dict) -> Any:
    if manifest.get("arrays") == chunks.FORMAT:
        with jax.transfer_guard("allow"):
            return chunks.read(storage.kvstore(path), abstract, path)
    if storage.is_remote(path):
        raise UserError(f"{path} was copied from a folder, whose arrays orbax wrote; copy it to a folder to read it")
    arguments = ocp.args.PyTreeRestore(
        item=abstract,
        restore_args=ocp.checkpoint_utils.construct_restore_args(abstract),
        partial_restore=True,
    )
    with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as checkpointer:
        return checkpointer.restore(path, args=arguments)


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)
