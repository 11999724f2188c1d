"""Where checkpoints lie: a folder, or a prefix of an object store (gs://); what both can do, under one name.

An object store has no directories and no rename: what is there is what was written. There a checkpoint exists when its
manifest, which is written last, does. In a folder it exists when its directory has its final name. A mounted bucket is a
folder; it must rename directories in one operation (on Google Cloud: hierarchical namespace).

gs:// was never run against a bucket. s3:// is refused: orbax 0.12.8 writes its arrays to a path that it has garbled.
"""

import hashlib
import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from etils import epath

from stepdr_jax import files
from stepdr_jax.errors import UserError

MANIFEST = "manifest.json"


def location(directory: str | os.PathLike):
    """A Path, or an epath.Path with the same methods for gs://, which needs gcsfs installed."""
    if os.fspath(directory).startswith("s3://"):
        raise UserError(
            f"{directory}: expected a folder or gs://BUCKET/..., got s3://; mount the bucket and give its folder"
        )
    if not is_remote(directory):
        return Path(directory).absolute()
    try:
        path = epath.Path(os.fspath(directory))
        path.exists()
    except ImportError as error:
        raise UserError(f"{directory}: {error}; install gcsfs, or mount the bucket and give its folder") from error
    return path


def is_remote(directory: str | os.PathLike) -> bool:
    return os.fspath(directory).startswith("gs://")


def steps(directory: str | os.PathLike, *, unfinished: bool = False) -> list[int]:
    """Steps that have a checkpoint, whole or damaged, in increasing order; with `unfinished` those begun in a bucket too."""
    directory = location(directory)
    if not directory.is_dir():
        return []
    found = (path for path in directory.iterdir() if path.name.isdigit())
    if is_remote(directory) and not unfinished:
        return sorted(int(path.name) for path in found if (path / MANIFEST).exists())
    return sorted(int(path.name) for path in found if path.is_dir())


def files_below(root) -> Iterator[tuple[str, Any]]:
    """(name relative to `root` with slashes, path) of every file."""
    for path in root.iterdir():
        if path.is_dir():
            yield from ((f"{path.name}/{name}", below) for name, below in files_below(path))
        else:
            yield path.name, path


def digest(path) -> list:
    """[bytes, sha256] of a file."""
    with path.open("rb") as file:
        sha256 = hashlib.file_digest(file, "sha256").hexdigest()
        return [file.tell(), sha256]


def read_json(path) -> Any | None:
    """None when the file is absent or is not JSON."""
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError):
        return None


def write_json(path, value: Any) -> None:
    """Whole or absent: by rename in a folder, by nature in a bucket."""
    if is_remote(path):
        path.write_text(json.dumps(value, ensure_ascii=False, sort_keys=True))
    else:
        files.write_json(path, value)


def remove(path, *, quietly: bool = False) -> None:
    """Removes a checkpoint; its manifest first, so that what is left of an interrupted removal is no checkpoint."""
    try:
        if is_remote(path):
            (path / MANIFEST).unlink(missing_ok=True)
            path.rmtree()
        else:
            shutil.rmtree(path, ignore_errors=quietly)
    except FileNotFoundError:  # a cache of names was late
        pass
