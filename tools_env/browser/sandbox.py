"""Isolation of Chromium, and how much of it this machine allows.

The strongest is a bubblewrap sandbox (no network but the proxy's port, no files but the system's, no other processes)
around Chromium's own sandbox. `strongest_isolation` tries every combination, from both to neither.
"""

import contextlib
import dataclasses
import functools
import os
import shlex
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

from tools_env.errors import ToolHostError
from tools_env.sandbox.cgroups import ControlGroup

PORT = 3128  # of the proxy, inside the sandbox
CONTROL = "/run/browser"  # where the sandbox sees the folder of its control socket
_PROGRAMS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")


@dataclasses.dataclass(frozen=True)
class Isolation:
    """Which sandboxes are in place."""

    namespaces: bool  # bubblewrap's
    chromium: bool  # Chromium's own

    @property
    def weakness(self) -> str:
        """Describes what is missing; empty when nothing is."""
        if self.namespaces:
            return (
                "" if self.chromium else "Chromium's own sandbox does not start, so one page's break-in is every page's"
            )
        missing = "no sandbox of namespaces (bubblewrap): Chromium sees the host's network and files"
        return missing if self.chromium else missing + ", and its own sandbox does not start"


def find_chromium(executable: str) -> str:
    """Returns the path of the browser: `executable`, or the first known program on PATH. Raises ToolHostError."""
    found = [path for name in ([executable] if executable else _PROGRAMS) if (path := shutil.which(name))]
    if not found:
        wanted = executable or ", ".join(_PROGRAMS)
        raise ToolHostError(
            f"the browser tool needs Chromium, and none was found ({wanted}); install it "
            "(apt-get install chromium), or "
            "name it with the tool's option executable"
        )
    return found[0]


@functools.cache
def strongest_isolation(executable: str, bubblewrap: bool) -> Isolation:
    """Starts the browser with weaker and weaker isolation until it starts. About a second. Raises ToolHostError.

    `bubblewrap`: whether that program is installed.
    """
    reason = "no output"
    for namespaces in (True, False) if bubblewrap else (False,):
        for chromium in (True, False):
            isolation = Isolation(namespaces, chromium)
            with tempfile.TemporaryDirectory(prefix="stepdr_browser_") as folder:
                flags = ["--headless", "--disable-gpu", f"--user-data-dir={folder}/profile", "--dump-dom"]
                flags += [] if chromium else ["--no-sandbox"]
                argv = [*(_bwrap(Path(folder), executable) if namespaces else []), executable, *flags, "about:blank"]
                try:
                    done = subprocess.run(
                        argv,
                        capture_output=True,
                        text=True,
                        timeout=30,
                        stdin=subprocess.DEVNULL,
                        env=_environment(folder),
                    )
                except subprocess.TimeoutExpired:
                    reason = "it hangs"
                    continue
            if "<html>" in done.stdout:
                return isolation
            reason = (done.stderr.strip().splitlines() or ["no output"])[0][:200]
    raise ToolHostError(
        f"the browser tool's Chromium ({executable}) does not start: {reason}; repair it or "
        "leave browser out of --tools"
    )


@contextlib.contextmanager
def sandboxed_program(executable: str, isolation: Isolation, group: ControlGroup | None) -> Iterator[tuple[str, Path]]:
    """Yields (program that starts the isolated browser, folder of its control socket `handover`)."""
    with tempfile.TemporaryDirectory(prefix="stepdr_browser_") as name:
        folder = Path(name)
        joins = [f"echo $$ > {shlex.quote(str(path))}" for path in (group.procs if group else [])]
        command = [executable]
        if isolation.namespaces:
            python = os.path.realpath(sys.executable)
            handover = [python, "-I", "-S", "/run/handover.py", f"{CONTROL}/handover", str(PORT)]
            command = [*_bwrap(folder, executable), *handover, executable]
        program = folder / "browser"
        program.write_text("#!/bin/sh\n" + " && ".join([*joins, f'exec {shlex.join(command)} "$@"']) + "\n")
        program.chmod(0o700)
        yield str(program), folder


def _environment(home: str) -> dict[str, str]:
    return {"PATH": "/usr/local/bin:/usr/bin:/bin", "HOME": home, "LANG": "C.UTF-8"}


def _bwrap(control: Path, executable: str) -> list[str]:
    """Returns the start of a command line; what follows runs in the sandbox."""
    elsewhere = [str(Path(executable).resolve().parent), sys.base_prefix]
    binds = [word for path in elsewhere if not path.startswith("/usr/") for word in ("--ro-bind", path, path)]
    system = [
        word
        for path in ("alternatives", "fonts", "chromium", "chromium.d", "opt", "ld.so.cache")
        for word in ("--ro-bind-try", f"/etc/{path}", f"/etc/{path}")
    ]
    return [
        *("bwrap", "--unshare-user", "--unshare-pid", "--unshare-net", "--unshare-ipc", "--unshare-uts"),
        *("--unshare-cgroup-try", "--die-with-parent", "--cap-drop", "ALL", "--uid", "1000", "--gid", "1000"),
        *("--hostname", "browser", "--clearenv", "--setenv", "PATH", "/usr/local/bin:/usr/bin:/bin"),
        *("--setenv", "HOME", "/tmp", "--setenv", "LANG", "C.UTF-8"),
        *("--ro-bind", "/usr", "/usr", "--symlink", "usr/bin", "/bin", "--symlink", "usr/sbin", "/sbin"),
        *("--symlink", "usr/lib", "/lib", "--symlink", "usr/lib64", "/lib64", *system),
        # A host that runs as root owns the kernel's settings, with or without capabilities: they must be read only.
        *("--proc", "/proc", "--ro-bind", "/proc/sys", "/proc/sys", "--dev", "/dev"),
        *("--tmpfs", "/dev/shm", "--tmpfs", "/tmp", *binds, "--ro-bind", str(control), CONTROL),
        *("--ro-bind", str(Path(__file__).with_name("handover.py")), "/run/handover.py", "--"),
    ]
