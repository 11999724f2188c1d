"""Checkpoints that are whole or ignored: orbax arrays, a manifest of digests, an atomic rename, and a retreat.

    <directory>/<step, 8 digits>/arrays/          the tree, written by orbax
    <directory>/<step, 8 digits>/manifest.json    {"step", "metadata", "files": {path: [bytes, sha256]}}

A checkpoint exists once its directory has its final name; a killed writer leaves only a hidden one, which the next save
removes. Reading verifies every file against the manifest: what does not match is named on standard error and the one
before it is used. The learner of PPO saves its trees here too; whatever the stage, the weights that act are under
"params" and metadata["model"] has their `Qwen2Config` fields, so that `training.state.load_params` reads any stage.
"""

import dataclasses
import errno
import hashlib
import json
import logging
import os
import shutil
import sys
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp

from stepdr_jax import files
from stepdr_jax.errors import UserError
from stepdr_jax.training import distributed

_HIDDEN = ".writing-"


@dataclasses.dataclass(frozen=True)
class Restored:
    """A verified checkpoint: its step, the tree asked for, and what was saved beside it."""

    step: int
    tree: Any
    metadata: dict


def save(directory: str | os.PathLike, step: int, tree: Any, metadata: dict, *, keep: int) -> Path:
    """Writes `tree` as the checkpoint of `step`, then removes all but the latest `keep`.

    Checkpoints of later steps are removed first: they belong to a future that was damaged or abandoned.

    Args:
        directory: of all checkpoints of a stage.
        step: optimiser steps or PPO iterations done.
        tree: nested dict (or registered dataclass) of arrays.
        metadata: JSON-able.
        keep: how many to keep, at least 1; 2 or more survive damage to the latest.

    Raises:
        UserError: when the disk is full.
    """
    directory = Path(directory).absolute()
    final, hidden = directory / f"{step:08d}", directory / f"{_HIDDEN}{step:08d}"
    try:
        directory.mkdir(parents=True, exist_ok=True)
        for leftover in directory.glob(f"{_HIDDEN}*"):
            shutil.rmtree(leftover)
        for later in steps(directory):
            if later >= step:
                shutil.rmtree(directory / f"{later:08d}")
        _write_arrays(hidden / "arrays", tree)
        digests = {str(path.relative_to(hidden)): _digest(path) for path in sorted(_files(hidden))}
        files.write_json(hidden / "manifest.json", {"step": step, "metadata": metadata, "files": digests})
        os.rename(hidden, final)
        files.sync_directory(directory)
    except Exception as error:
        shutil.rmtree(hidden, ignore_errors=True)
        if _disk_full(error):
            raise UserError(
                f"disk full while writing checkpoint {final}; free space and run the same command: "
                "it continues from the checkpoint before"
            ) from error
        raise
    for old in steps(directory)[:-keep]:
        shutil.rmtree(directory / f"{old:08d}")
    return final


def restore(directory: str | os.PathLike, abstract: Any, *, report=None) -> Restored | None:
    """Reads the latest checkpoint that is whole; None when there is none at all.

    Args:
        directory: of all checkpoints of a stage.
        abstract: tree of jax.ShapeDtypeStruct or arrays with the wanted structure and shardings; keys that a saved dict
            has beyond these are not read. A function from metadata to such a tree is called first.
        report: receives one line for each damaged checkpoint; default standard error.

    Raises:
        UserError: when checkpoints exist and every one is damaged.
    """
    directory = Path(directory).absolute()
    report = report or _say
    problems = []
    for step in reversed(steps(directory)):
        path = directory / f"{step:08d}"
        problem, manifest = verify(path)
        if problem is None:
            wanted = abstract(manifest["metadata"]) if callable(abstract) else abstract
            return Restored(step, _read_arrays(path / "arrays", wanted), manifest["metadata"])
        problems.append(f"{path} ({problem})")
        report(f"checkpoint {path} is damaged: {problem}; trying the one before")
    if problems:
        raise UserError(
            f"no usable checkpoint in {directory}: {'; '.join(problems)}; "
            f"delete {directory.parent} and run the same command to train this stage again"
        )
    return None


def latest_metadata(directory: str | os.PathLike) -> dict:
    """What was saved beside the latest checkpoint. Raises UserError when there is none that can be read."""
    for step in reversed(steps(directory)):
        try:
            return json.loads((Path(directory) / f"{step:08d}" / "manifest.json").read_text())["metadata"]
        except (OSError, ValueError, KeyError, TypeError):
            continue
    raise UserError(
        f"{directory} has no checkpoint; make one from Hugging Face's files with "
        "python -m launch.convert --hf=DIR --out=DIR"
    )


def steps(directory: str | os.PathLike) -> list[int]:
    """Steps that have a checkpoint, whole or damaged, in increasing order."""
    directory = Path(directory)
    if not directory.is_dir():
        return []
    return sorted(int(path.name) for path in directory.iterdir() if path.name.isdigit() and path.is_dir())


def remove_after(directory: str | os.PathLike, step: int) -> None:
    """Removes the checkpoints of steps past `step`: what a run that goes back undoes."""
    for later in steps(directory):
        if later > step:
            shutil.rmtree(Path(directory) / f"{later:08d}")


def verify(path: Path) -> tuple[str | None, dict]:
    """(what is wrong or None, manifest) of one checkpoint directory; reads every byte."""
    try:
        manifest = json.loads((path / "manifest.json").read_text())
        listed = manifest["files"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        return f"manifest.json is unreadable ({type(error).__name__})", {}
    for name, expected in listed.items():
        file = path / name
        if not file.is_file():
            return f"{name} is missing", manifest
        if file.stat().st_size != expected[0]:
            return f"{name} has {file.stat().st_size} bytes, expected {expected[0]}", manifest
        if _digest(file) != expected:
            return f"the content of {name} has changed", manifest
    return None, manifest


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


def _write_arrays(path: Path, tree: Any) -> None:
    with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as checkpointer:
        checkpointer.save(path, args=ocp.args.PyTreeSave(tree))


def _read_arrays(path: Path, abstract: Any) -> Any:
    arguments = ocp.args.PyTreeRestore(
        item=abstract,
        restore_args=ocp.checkpoint_utils.construct_restore_args(abstract),
        partial_restore=True,
    )
    with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as checkpointer:
        return checkpointer.restore(path, args=arguments)


def _files(root: Path):
    return (path for path in root.rglob("*") if path.is_file())


def _digest(path: Path) -> list:
    with open(path, "rb") as file:
        return [path.stat().st_size, hashlib.file_digest(file, "sha256").hexdigest()]


def _disk_full(error: BaseException | None) -> bool:
    while error is not None:
        if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
            return True
        if "No space left on device" in str(error):  # tensorstore reports it as text
            return True
        error = error.__cause__ or error.__context__
    return False


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)
