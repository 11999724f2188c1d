"""Storage of checkpoints: a folder or a prefix of a bucket (gs://, s3://), under one interface.

A bucket has neither directories nor rename. There a checkpoint exists when its manifest, which is written last, exists;
in a folder it exists when its directory has its final name. A bucket mounted as a folder must rename directories
atomically (on Google Cloud: hierarchical namespace).
"""

import hashlib
import json
import os
import re
import shutil
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, TypeVar

from stepdr_jax import files
from stepdr_jax.runtime.buckets import BucketPath

A = TypeVar("A")
B = TypeVar("B")
MANIFEST = "manifest.json"


def location(directory: str | os.PathLike | BucketPath) -> Path | BucketPath:
    """The path of a folder, or of gs://BUCKET/PATH or s3://BUCKET/PATH. Raises UserError for what is neither."""
    if isinstance(directory, BucketPath):
        return directory
    if re.match("(gs|s3):/", os.fspath(directory)):
        return BucketPath.parse(os.fspath(directory))
    return Path(directory).absolute()


def is_remote(directory: Path | BucketPath) -> bool:
    return isinstance(directory, BucketPath)


def kvstore(path: Path | BucketPath) -> dict[str, Any]:
    """tensorstore's specification of everything below a path."""
    return path.kvstore() if isinstance(path, BucketPath) else {"driver": "file", "path": f"{path}/"}


def saved_steps(directory: str | os.PathLike | BucketPath) -> list[int]:
    """Steps that have a checkpoint, damaged or not, in increasing order."""
    directory = location(directory)
    if not isinstance(directory, BucketPath):
        found = directory.iterdir() if directory.is_dir() else ()
        return sorted(int(path.name) for path in found if path.name.isdigit() and path.is_dir())
    names = (name.split("/") for name in directory.names())
    return sorted(int(parts[0]) for parts in names if parts[0].isdigit() and parts[1:] == [MANIFEST])


def numbered_entries(directory: Path | BucketPath) -> list[int]:
    """Numeric names in `directory`, in increasing order; in a bucket also those that are no checkpoint."""
    if isinstance(directory, BucketPath):
        found = {name.partition("/")[0] for name in directory.names()}
    else:
        found = {path.name for path in directory.iterdir()} if directory.is_dir() else set()
    return sorted(int(name) for name in found if name.isdigit())


def files_below(root: Path) -> Iterator[tuple[str, Path]]:
    """(name relative to `root` with slashes, path) of every file."""
    for path in root.iterdir():
        if path.is_dir():
            yield from ((f"{path.name}/{name}", below) for name, below in files_below(path))
        else:
            yield path.name, path


def digest(path: Path | BucketPath) -> list[int | str]:
    """[bytes, sha256] of a file."""
    if isinstance(path, BucketPath):
        data = path.read_bytes()
        return [len(data), hashlib.sha256(data).hexdigest()]
    with path.open("rb") as file:
        sha256 = hashlib.file_digest(file, "sha256").hexdigest()
        return [file.tell(), sha256]


def in_parallel(work: Callable[[A], B], items: Iterable[A], threads: int = 8) -> Iterator[B]:
    """Results in the order of `items`; when the caller stops iterating, calls that have not begun are canceled."""
    with ThreadPoolExecutor(threads) as pool:
        try:
            yield from pool.map(work, items)
        finally:
            pool.shutdown(cancel_futures=True)


def read_json(path: Path | BucketPath) -> Any | None:
    """None when the file is absent or is not JSON."""
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError):
        return None


def write_json(path: Path | BucketPath, value: Any) -> None:
    """Writes atomically: by rename in a folder; an object in a bucket is always atomic."""
    if isinstance(path, BucketPath):
        path.write_bytes(json.dumps(value, ensure_ascii=False, sort_keys=True).encode())
    else:
        files.write_json(path, value)


def remove(path: Path | BucketPath, *, quietly: bool = False) -> None:
    """Removes a folder recursively; in a bucket manifests first, so that an interruption leaves no checkpoint."""
    if isinstance(path, BucketPath):
        names = path.names()
        first = [name for name in names if name.rpartition("/")[2] == MANIFEST]
        for part in (first, [name for name in names if name not in first]):
            list(in_parallel(lambda name: (path / name).remove(), part, threads=16))
        return
    try:
        shutil.rmtree(path, ignore_errors=quietly)
    except FileNotFoundError:  # network file systems may list names that are gone
        pass


def remove_file(path: Path | BucketPath) -> None:
    if isinstance(path, BucketPath):
        path.remove()
    else:
        path.unlink()
