"""The sandbox: one bubblewrap command line, and a check that this kernel enforces it.

Inside: a read-only system, one writable folder (the session's workspace), private /tmp, no network, no other
processes, no capabilities, a system call filter. The size of the workspace is checked from outside, in `disk`.
"""

import dataclasses
import os
import shlex
import shutil
import subprocess
import tempfile
from pathlib import Path

from tools_env.errors import ToolHostError
from tools_env.sandbox import seccomp
from tools_env.sandbox.cgroups import ControlGroup, ControlGroups

COMMANDS = "/run/commands"  # where the sandbox sees its control folder, read only
_NEEDED = {"bwrap": "bubblewrap", "prlimit": "util-linux", "setpriv": "util-linux"}
_FILTER_FD = 9


@dataclasses.dataclass(frozen=True)
class SandboxLimits:
    """Limits of one session's sandbox."""

    memory_mb: int = 512
    processes: int = 128
    cpu_seconds: int = 600  # of one process
    open_files: int = 256
    file_mb: int = 64  # one file
    disk_mb: int = 256  # the workspace
    files: int = 20_000  # entries of the workspace
    tmp_mb: int = 64  # /tmp and /dev/shm, each; memory


def write_control(control: Path) -> None:
    """Writes the files that every sandbox of a session reads from its control folder: filter, users, bashrc."""
    control.mkdir(parents=True, exist_ok=True)
    program = seccomp.filter_program()
    if program is not None:
        (control / "filter").write_bytes(program)
    (control / "passwd").write_text("user:x:1000:1000::/workspace:/bin/bash\n")
    (control / "group").write_text("user:x:1000:\n")
    # The terminal's title carries the prompt count and the last exit status, invisible on the screen.
    (control / "bashrc").write_text(
        "__count=0\n"
        "__prompt() { local status=$?; __count=$((__count + 1)); printf '\\033]2;%s:%s\\007' $__count $status; }\n"
        "trap '' XFSZ\n"  # too large a file is an error of the write, not the end of the shell
        "PROMPT_COMMAND=__prompt PS1='$ ' HISTFILE=\n"
    )


def sandbox_command(
    workspace: Path,
    control: Path,
    limits: SandboxLimits,
    group: ControlGroup | None,
    inner: list[str],
    *,
    may_write: bool = True,
) -> list[str]:
    """Returns the command line that runs `inner` in the sandbox, with or without a terminal."""
    mb = 1 << 20
    bwrap = [
        *("bwrap", "--unshare-user", "--unshare-pid", "--unshare-net", "--unshare-ipc", "--unshare-uts"),
        *("--unshare-cgroup-try", "--disable-userns", "--die-with-parent", "--cap-drop", "ALL"),
        *("--uid", "1000", "--gid", "1000", "--hostname", "sandbox", "--clearenv"),
        *("--setenv", "PATH", "/usr/local/bin:/usr/bin:/bin", "--setenv", "HOME", "/workspace"),
        *("--setenv", "TERM", "screen", "--setenv", "LANG", "C.UTF-8", "--setenv", "USER", "user"),
        *("--ro-bind", "/usr", "/usr", "--symlink", "usr/bin", "/bin", "--symlink", "usr/sbin", "/sbin"),
        *("--symlink", "usr/lib", "/lib", "--symlink", "usr/lib64", "/lib64"),
        *("--ro-bind-try", "/etc/alternatives", "/etc/alternatives", "--ro-bind-try", "/etc/terminfo", "/etc/terminfo"),
        *("--ro-bind-try", "/etc/ld.so.cache", "/etc/ld.so.cache", "--ro-bind-try", "/etc/vim", "/etc/vim"),
        *("--ro-bind", str(control / "passwd"), "/etc/passwd", "--ro-bind", str(control / "group"), "/etc/group"),
        # A host that runs as root owns the kernel's settings, with or without capabilities: they must be read only.
        *("--proc", "/proc", "--ro-bind", "/proc/sys", "/proc/sys"),
        *("--ro-bind-try", "/proc/sysrq-trigger", "/proc/sysrq-trigger", "--dev", "/dev"),
        *("--size", str(limits.tmp_mb * mb), "--tmpfs", "/dev/shm"),
        *("--size", str(limits.tmp_mb * mb), "--tmpfs", "/tmp", "--ro-bind", str(control), COMMANDS),
        *("--bind", str(workspace), "/workspace", "--chdir", "/workspace", "--remount-ro", "/dev"),
        *("--remount-ro", "/"),
    ]
    filtered = (control / "filter").exists()
    if filtered:
        bwrap += ["--seccomp", str(_FILTER_FD)]
    prlimit = [
        *("prlimit", f"--as={2 * limits.memory_mb * mb}", f"--cpu={limits.cpu_seconds}", "--core=0"),
        f"--fsize={limits.file_mb * mb if may_write else 0}",
        *(f"--nofile={limits.open_files}", f"--nproc={limits.processes}", "--"),
    ]
    joins = [f"echo $$ > {shlex.quote(str(path))}" for path in (group.procs if group else [])]
    opened = [f"exec {_FILTER_FD}< {shlex.quote(str(control / 'filter'))}"] if filtered else []
    # env -i: the sandbox can read the environment of its first process, which is bwrap, not what bwrap runs.
    clean = ["env", "-i", "PATH=/usr/local/bin:/usr/bin:/bin", "TERM=screen"]
    script = " && ".join([*joins, *opened, "exec " + shlex.join([*clean, *bwrap, *prlimit, *inner])])
    return ["/bin/sh", "-c", script]


def missing_programs() -> str | None:
    """Returns an instruction to install the missing programs, or None."""
    packages = sorted({package for name, package in _NEEDED.items() if shutil.which(name) is None})
    return f"install {' '.join(packages)} (Debian, Ubuntu: apt-get install {' '.join(packages)})" if packages else None


_PROBE = r"""
echo started
[ "$(tail -n +3 /proc/net/dev | cut -d: -f1 | tr -d ' ')" = lo ] && echo network
[ "$(ls -d /proc/[0-9]* | wc -l)" -lt 12 ] && echo processes
touch /usr/probe /probe /etc/probe 2>/dev/null || echo root
settings=$(find /proc/sys/kernel -maxdepth 1 -type f -perm /222 |
  while read -r f; do (: >> "$f") 2>/dev/null && echo "$f"; done)
[ -z "$settings" ] && echo settings
grep -q '^CapEff:.0*$' /proc/self/status && grep -q '^NoNewPrivs:.1' /proc/self/status && echo privileges
grep -q '^Seccomp:.2' /proc/self/status && echo filter
unshare --user true 2>/dev/null || echo userns
"""


def check_isolation(groups: ControlGroups) -> list[str]:
    """Runs a sandbox and returns a description of each weakness; an empty list means full isolation.

    Raises ToolHostError when no sandbox can be run at all.
    """
    if fix := missing_programs():
        raise ToolHostError(f"the shell tool needs a sandbox: {fix}, or leave shell out of --tools")
    with tempfile.TemporaryDirectory() as folder:
        workspace, control = Path(folder, "workspace"), Path(folder, "control")
        workspace.mkdir()
        write_control(control)
        argv = sandbox_command(workspace, control, SandboxLimits(), None, ["bash", "-c", _PROBE])
        done = subprocess.run(argv, capture_output=True, text=True, timeout=30, stdin=subprocess.DEVNULL)
    seen = done.stdout.split()
    if "started" not in seen:
        reason = (done.stderr.strip().splitlines() or ["no output"])[-1]
        raise ToolHostError(
            f"the shell tool's sandbox does not start ({reason}); allow user namespaces to this user, or leave shell "
            "out of --tools"
        )
    weak = {
        "network": "the network is reachable",
        "processes": "other processes are visible",
        "root": "the system is writable",
        "settings": "the kernel's settings are writable",
        "privileges": "capabilities are kept",
        "filter": "no system call filter on this machine",
        "userns": "nested user namespaces are allowed",
    }
    found = [words for name, words in weak.items() if name not in seen]
    if not groups.memory:
        found.append("memory is limited for each process only (no writable memory control group)")
    if not groups.pids and os.getuid() == 0:
        found.append("the number of processes is not limited (no writable pids control group, and running as root)")
    return found
