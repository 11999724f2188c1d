"""Safe access to a session's workspace: no path leads outside.

The shell tool lets a model create links, pipes and devices there, and change them during an access. So a path is walked
folder by folder without following links, files are checked after they are opened, and files are replaced atomically.
"""

import contextlib
import os
import secrets
import stat
from collections.abc import Iterator
from pathlib import Path, PurePosixPath

from tools_env.errors import ToolError

_FOLDER = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC


def parts(name: str) -> tuple[str, ...]:
    """Returns the components of a path in the workspace.

    Raises ToolError for an unusable path or one that leads outside.
    """
    if "\0" in name:
        raise ToolError(f"{name!r} is not a usable path")
    if len(name) > 200:
        raise ToolError("path is too long; use at most 200 characters")
    found: list[str] = []
    for part in PurePosixPath(name).parts:
        if part == ".." and found:
            found.pop()
        elif part == ".." or part.startswith("/"):
            raise ToolError(f"{name} lies outside the workspace; use a relative path")
        else:
            found.append(part)
    try:
        if any(len(part.encode()) > 200 for part in found):
            raise ToolError("path is too long; use at most 200 characters")
    except UnicodeEncodeError:
        raise ToolError(f"{name!r} is not a usable path") from None
    return tuple(found)


def shown(name: str) -> str:
    """Returns the path as the model should see it."""
    return "/".join(parts(name)) or "."


def read_bytes(workspace: Path, name: str, max_bytes: int) -> bytes:
    """Returns a file's content. Raises ToolError unless it is a regular file of at most `max_bytes`."""
    where = parts(name)
    if not where:
        raise ToolError(f"{shown(name)} is a folder; use list")
    with _folder(workspace, where[:-1], name) as folder:
        try:
            # O_NONBLOCK: opening a pipe without a writer would block forever.
            fd = os.open(where[-1], os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, dir_fd=folder)
        except OSError as error:
            raise ToolError(_why(error, name, folder, where[-1])) from None
        try:
            status = os.fstat(fd)
            if stat.S_ISDIR(status.st_mode):
                raise ToolError(f"{shown(name)} is a folder; use list")
            if not stat.S_ISREG(status.st_mode):
                raise ToolError(f"{shown(name)} is not a regular file")
            if status.st_size > max_bytes:
                raise ToolError(f"{shown(name)} has {status.st_size} bytes, at most {max_bytes} can be read")
            with open(fd, "rb", closefd=False) as file:
                content = file.read(max_bytes + 1)
        finally:
            os.close(fd)
    if len(content) > max_bytes:
        raise ToolError(f"{shown(name)} grew above {max_bytes} bytes while it was read")
    return content


def exists(workspace: Path, name: str) -> bool:
    """Returns whether the path exists; links are not followed."""
    where = parts(name)
    try:
        with _folder(workspace, where[:-1], name) as folder:
            os.stat(where[-1] if where else ".", dir_fd=folder, follow_symlinks=False)
    except (OSError, ToolError):
        return False
    return True


def replace(workspace: Path, name: str, content: bytes) -> None:
    """Writes a file atomically and creates its folders. Raises ToolError."""
    where = parts(name)
    if not where:
        raise ToolError("path is a folder")
    with _folder(workspace, where[:-1], name, make=True) as folder:
        try:
            if stat.S_ISDIR(os.stat(where[-1], dir_fd=folder, follow_symlinks=False).st_mode):
                raise ToolError("path is a folder")
        except FileNotFoundError:
            pass
        temporary = f".{secrets.token_hex(8)}.tmp"
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
        try:
            with open(os.open(temporary, flags, 0o644, dir_fd=folder), "wb") as file:
                file.write(content)
            os.replace(temporary, where[-1], src_dir_fd=folder, dst_dir_fd=folder)
        except OSError as error:
            with contextlib.suppress(OSError):
                os.unlink(temporary, dir_fd=folder)
            raise ToolError(f"{shown(name)} could not be written: {os.strerror(error.errno or 0)}") from None


def entries(workspace: Path, name: str = ".") -> Iterator[tuple[str, os.stat_result]]:
    """Yields (path in the workspace, status) of the files below a folder in any order, without following links."""
    where = parts(name)
    with _folder(workspace, where, name) as folder:
        for path, _, files, fd in os.fwalk(".", dir_fd=folder, follow_symlinks=False):
            for file in files:
                if not file.endswith(".tmp"):
                    with contextlib.suppress(OSError):
                        status = os.stat(file, dir_fd=fd, follow_symlinks=False)
                        yield PurePosixPath(*where, path, file).as_posix(), status


@contextlib.contextmanager
def _folder(workspace: Path, where: tuple[str, ...], name: str, make: bool = False) -> Iterator[int]:
    """Yields a descriptor of the folder `where`, opened without following links."""
    try:
        fd = os.open(workspace, _FOLDER)
    except OSError as error:
        raise ToolError(f"the workspace cannot be opened: {os.strerror(error.errno or 0)}") from None
    try:
        for part in where:
            try:
                if make:
                    with contextlib.suppress(FileExistsError):
                        os.mkdir(part, dir_fd=fd)
                deeper = os.open(part, _FOLDER, dir_fd=fd)
            except OSError as error:
                raise ToolError(_why(error, name, fd, part, folder=True)) from None
            os.close(fd)
            fd = deeper
        yield fd
    finally:
        os.close(fd)


def _why(error: OSError, name: str, folder_fd: int, part: str, folder: bool = False) -> str:
    with contextlib.suppress(OSError):
        status = os.stat(part, dir_fd=folder_fd, follow_symlinks=False)
        if stat.S_ISLNK(status.st_mode):
            return f"{name} is or passes a symbolic link, which may lie outside the workspace; use the path itself"
        if folder and not stat.S_ISDIR(status.st_mode):
            return "a part of path is a file, not a folder"
        return f"{shown(name)} cannot be opened: {os.strerror(error.errno or 0)}"
    return f"{shown(name)} does not exist; use list"
