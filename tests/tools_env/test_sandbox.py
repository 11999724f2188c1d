"""Attacks on the sandbox's walls. With the option that makes a wall taken away, the same attack succeeds."""

import os
import platform
import shutil
import socket
import struct
import subprocess
import threading

import pytest

from tools_env.errors import ToolHostError
from tools_env.sandbox import disk, isolation, seccomp
from tools_env.sandbox.cgroups import ControlGroups

pytestmark = [
    pytest.mark.sandbox,
    pytest.mark.skipif(shutil.which("bwrap") is None, reason="bubblewrap is not installed"),
]


@pytest.fixture
def inside(tmp_path):
    """Runs a script in the sandbox of a fresh workspace; `without` are options taken off, with so many values each."""
    (tmp_path / "session" / "workspace").mkdir(parents=True)
    isolation.write_control(tmp_path / "session" / "shell")

    def run(script: str, without: dict[str, int] | None = None, limits=None, **settings) -> str:
        session = tmp_path / "session"
        argv = isolation.sandbox_command(
            session / "workspace",
            session / "shell",
            limits or isolation.SandboxLimits(),
            None,
            ["bash", "-c", script],
            **settings,
        )
        for option, values in (without or {}).items():
            assert option in argv[2], f"the sandbox has no {option}"
            before, after = argv[2].split(f" {option} ", 1)
            argv[2] = " ".join([before, *after.split(" ")[values:]])
        done = subprocess.run(argv, capture_output=True, text=True, timeout=60, stdin=subprocess.DEVNULL)
        return done.stdout + done.stderr

    return run


@pytest.fixture(scope="module", autouse=True)
def sandbox_starts():
    try:
        isolation.check_isolation(ControlGroups())
    except ToolHostError as error:
        pytest.skip(str(error))


def test_this_machine_gives_every_wall_or_says_which_is_missing():
    found = isolation.check_isolation(ControlGroups())
    assert not [words for words in found if "memory" not in words and "number of processes" not in words], found


CONNECT = """python3 - <<'P'
import socket
try:
    socket.create_connection(("127.0.0.1", {port}), 2); print("reached")
except OSError as error:
    print("refused", error)
P"""


def test_a_server_on_the_host_is_not_reached(inside):
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        server.listen()
        script = CONNECT.format(port=server.getsockname()[1])
        assert "refused" in inside(script)
        assert "reached" in inside(script, without={"--unshare-net": 0})


def test_the_hosts_processes_are_not_seen(inside):
    script = f"ls -d /proc/{os.getpid()} 2>/dev/null; kill -0 {os.getpid()} 2>/dev/null && echo signal"
    assert inside(script) == ""


def test_files_of_the_host_and_of_other_sessions_are_not_there(inside, tmp_path):
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "secret").write_text("secret")
    out = inside(
        f"cat {tmp_path}/other/secret; ln -s {tmp_path}/other/secret link; cat link; cat /workspace/../other/secret; "
        f"cat /etc/shadow; ls /root /home; cat /proc/1/root{tmp_path}/other/secret; cd /proc/1/cwd/../..; ls {tmp_path}"
    )
    assert "root:" not in out and "cannot access '/root'" in out and "cannot access '/home'" in out
    assert "secret" not in out.replace("No such file", "").replace(str(tmp_path), "").replace("other/secret", "")


def test_the_hosts_environment_is_not_seen(inside, monkeypatch):
    monkeypatch.setenv("STEPDR_TOOLS_TOKEN", "tokenvalue")
    assert "tokenvalue" not in inside("cat /proc/*/environ; env")


def test_only_the_workspace_and_temporary_folders_are_writable(inside):
    out = inside(
        "for d in / /usr /usr/bin /etc /dev /run /run/commands /proc/sys/kernel; do touch $d/x 2>/dev/null && echo $d; done;"
        "for d in /workspace /tmp /dev/shm; do touch $d/x || echo no $d; done"
    )
    assert out == ""


def test_the_kernels_settings_cannot_be_opened_for_writing(inside):
    script = "find /proc/sys -type f -perm /222 | while read f; do (: >> $f) 2>/dev/null && echo $f; done"
    assert inside(script) == ""
    if os.getuid() == 0:
        assert "/proc/sys/kernel/" in inside(script, without={"--ro-bind /proc/sys /proc/sys": 0})


def test_no_capability_and_no_nested_namespace(inside):
    assert "CapEff:\t0000000000000000" in inside("cat /proc/self/status")
    assert "nested" not in inside("unshare --user --map-root-user echo nested")


@pytest.mark.skipif(platform.machine() != "x86_64", reason="system call numbers of x86-64")
@pytest.mark.parametrize(
    ("call", "expected"),
    [("101, 0, 0, 0", 1), ("298, 0, 0, 0", 1), ("425, 1, 0, 0", 1), ("250, 0, 0, 0", 1), ("41, 40, 1, 0", 97)],
    ids=["ptrace", "perf_event_open", "io_uring", "keyctl", "vsock"],
)
def test_refused_system_calls_fail_by_the_filter(inside, call, expected):
    script = f"python3 -c 'import ctypes; c = ctypes.CDLL(None, use_errno=True); r = c.syscall({call}); print(r, ctypes.get_errno())'"
    assert inside(script) == f"-1 {expected}\n"
    if expected != 97:
        assert inside(script, without={"--seccomp": 1}) != f"-1 {expected}\n"


def test_ordinary_programs_pass_the_filter(inside):
    assert (
        inside('python3 -c \'import threading, subprocess; print(subprocess.check_output(["echo", "a"]))\'')
        == "b'a\\n'\n"
    )


def test_a_file_memory_and_open_files_are_limited(inside):
    limits = isolation.SandboxLimits(file_mb=2, memory_mb=200, open_files=20)
    assert "File size limit" in inside("dd if=/dev/zero of=x bs=1M count=5 status=none; true", limits=limits)
    assert "MemoryError" in inside("python3 -c 'x = bytearray(1 << 30)'", limits=limits)
    assert "Too many open files" in inside("python3 -c 'x = [open(\"/dev/null\") for _ in range(40)]'", limits=limits)


def test_temporary_folders_are_bounded(inside):
    limits = isolation.SandboxLimits(tmp_mb=2)
    for folder in ("/tmp", "/dev/shm"):
        assert "No space left" in inside(f"dd if=/dev/zero of={folder}/x bs=1M count=5 status=none", limits=limits)


def test_a_full_workspace_can_be_cleared_not_filled(inside):
    inside("echo old > old")
    out = inside("trap '' XFSZ; echo new > new; rm old; ls; wc -c < new", may_write=False)
    assert out.startswith("new\n0\n") and "too large" in out


def test_memory_of_all_processes_together_is_limited(tmp_path):
    groups = ControlGroups()
    if not groups.memory:
        pytest.skip("no writable memory control group")
    (tmp_path / "w").mkdir()
    isolation.write_control(tmp_path / "c")
    group = groups.make("test_memory", 100 << 20, 64)
    script = (
        "for i in 1 2 3 4; do python3 -c 'x = bytearray(60 << 20); import time; time.sleep(1)' || echo killed; done & "
        * 2
    )
    argv = isolation.sandbox_command(
        tmp_path / "w", tmp_path / "c", isolation.SandboxLimits(), group, ["bash", "-c", script + "wait"]
    )
    done = subprocess.run(argv, capture_output=True, text=True, timeout=60)
    assert "illed" in done.stdout + done.stderr
    assert _gone(group)


def test_a_fork_bomb_stays_within_its_group(tmp_path):
    groups = ControlGroups()
    if not groups.pids:
        pytest.skip("no writable pids control group")
    (tmp_path / "w").mkdir()
    isolation.write_control(tmp_path / "c")
    group = groups.make("test_forks", 256 << 20, 40)
    bomb = "f() { f | f & f; }; f 2>/dev/null & sleep 1; exit 0"
    argv = isolation.sandbox_command(
        tmp_path / "w", tmp_path / "c", isolation.SandboxLimits(), group, ["bash", "-c", bomb]
    )
    process = subprocess.Popen(argv, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    most = 0
    while process.poll() is None:
        most = max(most, group.processes())
        threading.Event().wait(0.02)
    assert 20 < most <= 40
    assert _gone(group)


def _gone(group) -> bool:
    for _ in range(200):
        if group.remove():
            return True
        threading.Event().wait(0.02)
    return False


def test_disk_use_counts_blocks_links_not_followed_and_files_without_a_name(tmp_path):
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "x").write_bytes(b"x" * 100_000)
    (tmp_path / "a" / "up").symlink_to("/")
    size, entries = disk.disk_usage(tmp_path, 100)
    assert 100_000 <= size < 130_000 and entries == 3
    assert disk.disk_usage(tmp_path, 1)[1] == 2
    with open(tmp_path / "hidden", "wb") as hidden:
        hidden.write(b"x" * 1_000_000)
        hidden.flush()
        assert disk.deleted_but_open(os.getpid()) < 1_000_000
        os.unlink(tmp_path / "hidden")
        assert disk.deleted_but_open(os.getpid()) >= 1_000_000


def test_the_filter_is_whole_and_jumps_stay_inside():
    program = seccomp.filter_program()
    if program is None:
        pytest.skip("no filter for this machine")
    lines = [struct.unpack("<HBBI", program[i : i + 8]) for i in range(0, len(program), 8)]
    for at, (code, if_true, if_false, _) in enumerate(lines):
        if code & 0x07 == 0x05:
            assert at + 1 + max(if_true, if_false) < len(lines)


def test_without_bubblewrap_the_error_names_the_package(monkeypatch):
    monkeypatch.setattr(isolation.shutil, "which", lambda name: None)
    with pytest.raises(ToolHostError, match="apt-get install bubblewrap"):
        isolation.check_isolation(None)
