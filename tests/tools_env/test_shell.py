"""The shell tool against the real programs: commands, terminals, and attacks on limits that hold between calls."""

import asyncio
import contextlib
import functools
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from tools_env.errors import BadArguments, ToolError, ToolHostError
from tools_env.sandbox import isolation
from tools_env.tools import arguments, optional, shell
from tools_env.tools.base import CallContext
from tools_env.web.egress import EgressPolicy

pytestmark = [
    pytest.mark.sandbox,
    pytest.mark.skipif(shutil.which("bwrap") is None, reason="bubblewrap is not installed"),
    pytest.mark.skipif(shutil.which("tmux") is None, reason="tmux is not installed"),
]


class Used:
    """A shell tool and its sessions."""

    def __init__(self, tool, folder: Path):
        self.tool, self.folder = tool, folder

    def directory(self, session: str) -> Path:
        (self.folder / session / "workspace").mkdir(parents=True, exist_ok=True)
        return self.folder / session

    async def output(self, session: str = "one", **given):
        arguments.check_arguments(self.tool.schema, given)
        return await self.tool.run(CallContext(self.directory(session), {}, time.monotonic() + 60, 10_000), given)

    async def __call__(self, *given, **more) -> str:
        return (await self.output(*given, **more)).text


def with_shell(**options):
    """Runs an async test with a shell tool of these options."""

    def decorate(test):
        @functools.wraps(test)
        def run(tmp_path):
            async def inner():
                async with contextlib.AsyncExitStack() as resources:
                    try:
                        tool = shell.build_tool({"accept_weaker_isolation": True} | options, resources)
                    except ToolHostError as error:
                        pytest.skip(str(error))
                    await test(Used(tool, tmp_path))

            asyncio.run(inner())

        del run.__wrapped__  # pytest reads the fixtures from the signature
        return run

    return decorate


@with_shell()
async def test_output_exit_status_and_state_between_commands(use):
    assert await use(command="echo one; echo 二 >&2") == "one\n二"
    assert await use(command="cd /tmp; X='a b'; true") == "no output, exit status 0"
    assert await use(command='pwd; echo "$X"') == "/tmp\na b"
    failed = await use.output(command="echo said; (exit 3)")
    assert failed.failed and failed.text == "said\nexit status 3"


@with_shell()
async def test_text_of_a_command_is_not_read_by_the_terminal_or_by_tmux(use):
    assert await use(command="cat <<'E'\n#{pid} ; $(x) \\; `y`;\nE") == "#{pid} ; $(x) \\; `y`;"
    await use(command="cat > typed", wait=1)
    await use(keys=["a;", "Enter", "#(touch /tmp/x) -t", "Enter", "C-d"])
    assert await use(command="cat typed") == "a;\n#(touch /tmp/x) -t"


@with_shell()
async def test_the_workspace_is_shared_with_the_file_tool(use):
    await use(command="echo kept > notes")
    assert (use.directory("one") / "workspace" / "notes").read_text() == "kept\n"


@with_shell()
async def test_a_long_command_goes_on_and_keys_reach_it(use):
    assert "still running after 1 s" in await use(command="read -p 'name? ' name", wait=1)
    with pytest.raises(ToolError, match="a program runs in terminal main"):
        await use(command="echo no")
    assert await use(command="echo other", terminal="second") == "other"
    await use(keys=["Ada", "Enter"])
    assert await use(command="echo $name") == "Ada"


@with_shell()
async def test_control_c_ends_a_program_and_the_shell_stays(use):
    await use(command="X=1; sleep 100", wait=1)
    await use(keys=["C-c"])
    assert await use(command="echo $X") == "1"


@pytest.mark.skipif(shutil.which("vim") is None, reason="vim is not installed")
@with_shell()
async def test_vim_edits_a_file(use):
    await use(command="vim -u NONE -n text", wait=1)
    await use(keys=["i", "first", "Enter", "second; line", "Escape"])
    assert "second; line" in await use(scrollback=0)
    await use(keys=[":wq", "Enter"])
    assert await use(command="cat text") == "first\nsecond; line"


@pytest.mark.skipif(shutil.which("top") is None, reason="top is not installed")
@with_shell()
async def test_top_shows_only_the_sandbox(use):
    shown = await use(command="top -d 0.3", wait=1)
    assert "load average" in shown and "bash" in shown and "pytest" not in shown
    await use(keys=["q"])
    assert await use(command="echo back") == "back"


@with_shell()
async def test_scrollback_reaches_back(use):
    await use(command="seq 200")
    assert "\n5\n" not in await use() and "\n5\n" in await use(scrollback=250)


@with_shell()
async def test_the_end_of_a_shell_is_told_and_the_next_command_starts_another(use):
    ended = await use.output(command="exit 4")
    assert ended.failed and "the shell ended" in ended.text
    assert await use(command="echo again") == "again"


@with_shell()
async def test_what_to_do_must_be_one_thing(use):
    with pytest.raises(BadArguments, match="command and keys"):
        await use(command="a", keys=["b"])


@with_shell()
async def test_sessions_do_not_see_each_other(use):
    await use("one", command="echo secret > mine; sleep 50 & X=secret")
    seen = await use("two", command=f"echo $X; ls; ls {use.folder}; cat {use.folder}/one/workspace/mine; ps ax")
    assert "secret" not in seen and "mine: No such file" in seen and "sleep" not in seen


@with_shell(disk_mb=20, file_mb=8)
async def test_filling_the_disk_ends_the_sandbox_and_the_workspace_can_be_cleared(use):
    with pytest.raises(ToolError, match="outgrew 20 MB"):
        fill = "for i in $(seq 200); do dd if=/dev/zero of=f$i bs=1M count=4 status=none; sleep 0.02; done"
        await use(command=fill)
    size = sum(path.stat().st_size for path in (use.directory("one") / "workspace").iterdir())
    assert size < 400 << 20
    assert "File too large" in await use(command="echo more > more; true")
    assert "full" in await use(command="rm -f f*")
    await use(close=True)
    assert await use(command="echo more > more; cat more") == "more"


@with_shell(files=300)
async def test_too_many_files_end_the_sandbox(use):
    with pytest.raises(ToolError, match="more than 300 files"):
        await use(command="for i in $(seq 100000); do : > f$i; done")


@with_shell(disk_mb=20, file_mb=30)
async def test_files_without_a_name_count(use):
    with pytest.raises(ToolError, match="outgrew"):
        await use(command="exec 7> x; rm x; dd if=/dev/zero bs=1M count=25 >&7 status=none; sleep 5")


@with_shell(processes=40)
async def test_a_fork_bomb_leaves_the_host_and_other_sessions_usable(use):
    await use("two", command="true")
    await use("one", command="f() { f | f & f; }; f 2>/dev/null", wait=1)
    started = time.monotonic()
    assert await use("two", command="echo well") == "well"
    assert time.monotonic() - started < 5
    await use("one", close=True)
    for _ in range(50):
        with contextlib.suppress(ToolError):
            assert await use("one", command="echo back") == "back"
            break
        await asyncio.sleep(0.1)
    else:
        pytest.fail("the session has no shell after its fork bomb was ended")


@with_shell()
async def test_a_closed_sessions_processes_end(use):
    marker = f"{os.getpid()}.987654"
    await use(command=f"sleep {marker} & true")
    assert await _within(20, lambda: _running(marker))
    shutil.rmtree(use.directory("one"))
    assert await _within(20, lambda: not _running(marker))


async def _within(seconds: float, condition) -> bool:
    for _ in range(int(seconds / 0.05)):
        if condition():
            return True
        await asyncio.sleep(0.05)
    return condition()


def _running(marker: str) -> bool:
    return any(["sleep", marker] == (process.info["cmdline"] or []) for process in psutil.process_iter(["cmdline"]))


def test_weaker_isolation_is_refused_unless_accepted(monkeypatch):
    monkeypatch.setattr(isolation, "check_isolation", lambda groups: ["the network is reachable"])

    async def build(options):
        async with contextlib.AsyncExitStack() as resources:
            return shell.build_tool(options, resources)

    with pytest.raises(ToolHostError, match="the network is reachable.*accept_weaker_isolation"):
        asyncio.run(build({}))
    assert asyncio.run(build({"accept_weaker_isolation": True})).name == "shell"


@pytest.mark.parametrize(
    ("wanted", "options", "message"),
    [
        ("shel", "", "there is no tool shel; the optional tools are .*shell"),
        ("shell", '{"shell": {"memory": 1}}', "shell has no option memory; its options are"),
        ("shell", '{"shell": {"memory_mb": "1"}}', "memory_mb"),
        ("", '{"shell": {}}', "add it to --tools"),
        ("shell", "{", "not valid JSON"),
        ("shell", "[]", "object"),
    ],
)
def test_wrong_options_are_refused_by_name(wanted, options, message):
    with pytest.raises(ToolHostError, match=message):
        optional.build_optional_tools(wanted, options, contextlib.AsyncExitStack(), EgressPolicy([], 1))


HOST = """
import asyncio, contextlib, sys, time
from pathlib import Path
from tools_env.tools import shell
from tools_env.tools.base import Call

async def main():
    async with contextlib.AsyncExitStack() as resources:
        tool = shell.build_tool({"accept_weaker_isolation": True}, resources)
        command = "while :; do date +%s.%N > beat; sleep 0.05; done & echo up"
        call = Call(Path(sys.argv[1]), {}, time.monotonic() + 60, 1000)
        print((await tool.run(call, {"command": command})).text, flush=True)
        await asyncio.sleep(100)

asyncio.run(main())
"""


def test_a_killed_hosts_sandboxes_end_with_it(tmp_path):
    (tmp_path / "workspace").mkdir()
    host = subprocess.Popen([sys.executable, "-c", HOST, str(tmp_path)], stdout=subprocess.PIPE, text=True)
    try:
        if "up" not in host.stdout.readline():
            pytest.skip("no sandbox on this machine")
    finally:
        host.kill()
        host.wait()
    beat = tmp_path / "workspace" / "beat"
    end = time.monotonic() + 10
    while time.monotonic() < end:
        before = beat.read_text()
        time.sleep(0.4)
        if beat.read_text() == before:
            return
    pytest.fail("the sandbox outlived its host")


def test_a_host_serves_the_shell_over_grpc_when_asked(running):
    async def run():
        options = '{"shell": {"accept_weaker_isolation": true}}'
        try:
            async with running(tools="shell,file_parser", tool_options=options) as it:
                names = [tool.name for tool in await it.client.list_tools()]
                session = await it.client.open_session("e")
                reply = await session.call("shell", {"command": "echo from the sandbox > note; cat note"}, call_id="1")
                return names, reply.text
        except ToolHostError as error:
            pytest.skip(str(error))

    names, text = asyncio.run(run())
    assert {"shell", "file_parser", "file"} <= set(names) and text == "from the sandbox"
