"""Memory and process limits of a group of processes, by control groups of version 1 or 2 where they are writable."""

import asyncio
import contextlib
import dataclasses
import os
import re
from pathlib import Path

_PREFIX = "stepdr_"


@dataclasses.dataclass(frozen=True)
class ControlGroup:
    """One control group. A process joins by writing its id to the files `procs`."""

    folders: tuple[Path, ...]

    @property
    def procs(self) -> list[Path]:
        return [folder / "cgroup.procs" for folder in self.folders]

    def processes(self) -> int:
        """Returns the number of tasks in the group."""
        for folder in self.folders:
            if (folder / "pids.current").exists():
                return int((folder / "pids.current").read_text())
        return 0

    def remove(self) -> bool:
        """Removes the group; returns False while it has processes."""
        gone = True
        for folder in self.folders:
            try:
                folder.rmdir()
            except FileNotFoundError:
                pass
            except OSError:
                gone = False
        return gone

    async def remove_when_empty(self) -> None:
        """Waits up to 2 seconds for the last processes to end, then removes the group."""
        for _ in range(100):
            if self.remove():
                return
            await asyncio.sleep(0.02)


class ControlGroups:
    """The control groups of this host. Controllers that are missing or not writable are not used."""

    def __init__(self):
        self._parents = {name: parent for name in ("memory", "pids") if (parent := _parent(name))}
        _remove_stale(set(self._parents.values()))

    @property
    def memory(self) -> bool:
        return "memory" in self._parents

    @property
    def pids(self) -> bool:
        return "pids" in self._parents

    def make(self, name: str, memory_bytes: int, processes: int) -> ControlGroup:
        """Makes a group with these limits, as far as the controllers are available."""
        folders = {}
        for controller, parent in self._parents.items():
            folder = parent / f"{_PREFIX}{os.getpid()}_{name}"
            folder.mkdir(exist_ok=True)
            folders[controller] = folder
        if "memory" in folders:
            if (folders["memory"] / "memory.max").exists():
                _set(folders["memory"] / "memory.max", memory_bytes)
                _set(folders["memory"] / "memory.swap.max", 0)
            else:
                _set(folders["memory"] / "memory.limit_in_bytes", memory_bytes)
                _set(folders["memory"] / "memory.memsw.limit_in_bytes", memory_bytes)
        if "pids" in folders:
            _set(folders["pids"] / "pids.max", processes)
        return ControlGroup(tuple(dict.fromkeys(folders.values())))


def _set(path: Path, value: int) -> None:
    if path.exists():
        path.write_text(str(value))


def _parent(controller: str) -> Path | None:
    """Returns the folder in which groups with this controller can be made."""
    try:
        rows = [line.split(":", 2) for line in Path("/proc/self/cgroup").read_text().splitlines()]
        mounts = [line.split() for line in Path("/proc/self/mounts").read_text().splitlines()]
    except OSError:
        return None
    own = {name: path for _, names, path in rows for name in names.split(",")}  # "" is version 2
    for _, folder, kind, options, *_ in mounts:
        if kind == "cgroup" and controller in options.split(",") and controller in own:
            candidates = [Path(folder + own[controller]), Path(folder)]
        elif kind == "cgroup2" and "" in own:
            here = Path(folder + own[""])
            candidates = [p for p in (here, here.parent, Path(folder)) if _delegates(p, controller)]
        else:
            continue
        for candidate in candidates:
            if candidate.is_dir() and _writable(candidate, controller):
                return candidate
    return None


def _delegates(folder: Path, controller: str) -> bool:
    with contextlib.suppress(OSError):
        return controller in (folder / "cgroup.subtree_control").read_text().split()
    return False


def _writable(folder: Path, controller: str) -> bool:
    probe = folder / f"{_PREFIX}{os.getpid()}_probe"
    try:
        probe.mkdir(exist_ok=True)
        limit = {"memory": ("memory.max", "memory.limit_in_bytes"), "pids": ("pids.max",)}[controller]
        return any(os.access(probe / name, os.W_OK) for name in limit)
    except OSError:
        return False
    finally:
        with contextlib.suppress(OSError):
            probe.rmdir()


def _remove_stale(parents: set[Path]) -> None:
    """Removes empty groups that a killed host left behind."""
    for parent in parents:
        for folder in parent.glob(f"{_PREFIX}*"):
            owner = re.match(rf"{_PREFIX}(\d+)_", folder.name)
            if owner and not Path(f"/proc/{owner.group(1)}").exists():
                with contextlib.suppress(OSError):
                    folder.rmdir()
