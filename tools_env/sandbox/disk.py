"""Disk usage of a workspace, measured from outside the sandbox."""

import contextlib
import os
import stat
from pathlib import Path


def disk_usage(workspace: Path, max_entries: int) -> tuple[int, int]:
    """Returns (bytes on disk, entries) of a folder, links not followed; stops counting above `max_entries`."""
    size = entries = 0
    stack = [os.fspath(workspace)]
    while stack and entries <= max_entries:
        try:
            with os.scandir(stack.pop()) as folder:
                for entry in folder:
                    entries += 1
                    if entries > max_entries:
                        break
                    try:
                        status = entry.stat(follow_symlinks=False)
                    except OSError:
                        continue
                    size += status.st_blocks * 512
                    if stat.S_ISDIR(status.st_mode):
                        stack.append(entry.path)
        except OSError:
            continue
    return size, entries


def deleted_but_open(root: int) -> int:
    """Returns the bytes of deleted files that the process `root` and its descendants hold open.

    A file that is removed while open keeps its blocks, and a walk over the folder does not see it.
    """
    seen: dict[tuple[int, int], int] = {}
    stack = [root]
    while stack:
        pid = stack.pop()
        for name in _listed(f"/proc/{pid}/task"):
            with contextlib.suppress(OSError), open(f"/proc/{pid}/task/{name}/children") as children:
                stack += map(int, children.read().split())
        for name in _listed(f"/proc/{pid}/fd"):
            with contextlib.suppress(OSError):
                status = os.stat(f"/proc/{pid}/fd/{name}")
                if stat.S_ISREG(status.st_mode) and status.st_nlink == 0:
                    seen[status.st_dev, status.st_ino] = status.st_blocks * 512
    return sum(seen.values())


def _listed(folder: str) -> list[str]:
    try:
        return os.listdir(folder)
    except OSError:
        return []
