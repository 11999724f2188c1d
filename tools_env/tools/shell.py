"""`shell`: bash in persistent terminals, in a sandbox whose only writable folder is the session's workspace.

A call returns when its command ends or the wait is over; the command then continues, and `keys` are typed into it: an
editor, a monitor, a prompt. Memory, process, time and disk limits apply to all terminals of a session together.
"""

import asyncio
import contextlib
import dataclasses
import hashlib
import logging
import shutil
import time
from pathlib import Path
from typing import Any

from tools_env.errors import BadArguments, ToolError, ToolHostError
from tools_env.sandbox import disk, isolation
from tools_env.sandbox.cgroups import ControlGroup, ControlGroups
from tools_env.sandbox.terminal import HISTORY, Terminals
from tools_env.tools.base import CallContext, Tool, ToolOutput

logger = logging.getLogger(__name__)

_CONTROL = "shell"  # folder of a session, beside its workspace: commands and the sandbox's own files
_WATCH_SECONDS = 0.2
_SETTLE_SECONDS = 0.15

SCHEMA = {
    "type": "object",
    "properties": {
        "command": {"type": "string", "minLength": 1, "description": "run by bash; cd and variables persist"},
        "keys": {
            "type": "array",
            "items": {"type": "string"},
            "maxItems": 100,
            "description": "typed into the program that runs: text, or Enter, Escape, Tab, Up, C-c ...",
        },
        "terminal": {"type": "string", "enum": ["main", "second", "third"], "description": "default main"},
        "wait": {"type": "integer", "minimum": 1, "maximum": 600, "description": "seconds for the command to end"},
        "scrollback": {"type": "integer", "minimum": 0, "maximum": HISTORY, "description": "lines above the screen"},
        "close": {"type": "boolean", "description": "end this terminal and what runs in it"},
    },
}


@dataclasses.dataclass(frozen=True)
class ShellOptions:
    """Options of the tool. `accept_weaker_isolation` serves it although the kernel does not support full isolation."""

    limits: isolation.SandboxLimits = isolation.SandboxLimits()
    wait: int = 20  # seconds, unless a call names another number
    accept_weaker_isolation: bool = False


@dataclasses.dataclass
class _Pane:
    name: str  # in tmux
    prompts: int = 1  # prompts shown when the last command has ended
    disk_full: bool = False


@dataclasses.dataclass
class _SessionShell:
    """The terminals of one session."""

    directory: Path
    group: ControlGroup
    panes: dict[str, _Pane] = dataclasses.field(default_factory=dict)
    commands: int = 0
    killed: str = ""  # why all terminals were ended, until the model is told
    allowed: tuple[int, int] = (0, 0)  # maximum bytes and entries of the workspace

    @property
    def workspace(self) -> Path:
        return self.directory / "workspace"


class ShellTool:
    """All sandboxes of one host. Create it on the event loop it is used on; `close` ends every process it started."""

    def __init__(self, options: ShellOptions):
        """Raises ToolHostError when there is no sandbox, or a weaker one than `options` accepts."""
        if shutil.which("tmux") is None:
            raise ToolHostError("the shell tool needs tmux; install it (apt-get install tmux), or leave shell out")
        self._options = options
        self._groups = ControlGroups()
        weaker = isolation.check_isolation(self._groups)
        if weaker and not options.accept_weaker_isolation:
            raise ToolHostError(
                f"the shell tool's sandbox is weaker than required: {'; '.join(weaker)}; fix that, leave shell "
                "out, or set its option accept_weaker_isolation"
            )
        for words in weaker:
            logger.warning("shell: %s", words)
        self._terminals = Terminals()
        self._sessions: dict[Path, _SessionShell] = {}
        self._watcher: asyncio.Task | None = None

    async def run(self, call: CallContext, arguments: dict[str, Any]) -> ToolOutput:
        """Runs the tool."""
        given = [name for name in ("command", "keys", "close") if arguments.get(name)]
        if len(given) > 1:
            raise BadArguments(f"give one of command, keys and close, not {' and '.join(given)}")
        session = self._session(call)
        terminal = arguments.get("terminal", "main")
        if session.killed:
            why, session.killed = session.killed, ""
            raise ToolError(f"all terminals were ended: {why}")
        if arguments.get("close"):
            await self._end(session, terminal)
            return ToolOutput(f"closed terminal {terminal}")
        pane = await self._pane(session, terminal)
        state = await self._terminals.state(pane.name)
        busy = state is not None and state.prompts < pane.prompts
        if "command" in arguments:
            if busy:
                raise ToolError(f"a program runs in terminal {terminal}; use keys (C-c ends it) or another terminal")
            return await self._command(call, session, terminal, arguments)
        if arguments.get("keys"):
            await self._terminals.send(pane.name, arguments["keys"])
            await self._settle(pane, call)
        return await self._shown(session, terminal, arguments.get("scrollback", 0))

    async def close(self) -> None:
        """Ends all sandboxes."""
        if self._watcher is not None:
            self._watcher.cancel()
        await self._terminals.stop()
        for session in self._sessions.values():
            await session.group.remove_when_empty()
        self._sessions.clear()

    def _session(self, call: CallContext) -> _SessionShell:
        session = self._sessions.get(call.directory)
        if session is None:
            limits = self._options.limits
            isolation.write_control(call.directory / _CONTROL)
            name = hashlib.sha256(str(call.directory).encode()).hexdigest()[:16]
            group = self._groups.make(name, limits.memory_mb << 20, limits.processes)
            session = self._sessions[call.directory] = _SessionShell(call.directory, group)
        if self._watcher is None or self._watcher.done():
            self._watcher = asyncio.create_task(self._watch())
        return session

    async def _pane(self, session: _SessionShell, terminal: str) -> _Pane:
        pane = session.panes.get(terminal)
        if pane is not None:
            state = await self._terminals.state(pane.name)
            if state is not None and not state.dead:
                return pane
            await self._end(session, terminal)
        limits = self._options.limits
        size, entries = await asyncio.to_thread(disk.disk_usage, session.workspace, limits.files)
        may_write = size < limits.disk_mb << 20 and entries < limits.files
        if not session.panes:
            # A workspace above its limits may shrink but not grow.
            session.allowed = (max(limits.disk_mb << 20, size), max(limits.files, entries))
        name = f"{hashlib.sha256(str(session.directory).encode()).hexdigest()[:16]}_{terminal}"
        inner = ["bash", "--noprofile", "--rcfile", f"{isolation.COMMANDS}/bashrc", "-i"]
        control = session.directory / _CONTROL
        argv = isolation.sandbox_command(session.workspace, control, limits, session.group, inner, may_write=may_write)
        await self._terminals.open(name, argv)
        pane = session.panes[terminal] = _Pane(name, disk_full=not may_write)
        for _ in range(250):
            state = await self._terminals.state(name)
            if state is None or state.dead:
                break
            if state.prompts >= 1:
                return pane
            await asyncio.sleep(0.02)
        said = await self._terminals.screen(name) if state is not None else ""
        await self._end(session, terminal)
        raise ToolError(f"the shell did not start: {said.strip()[-200:] or 'no output'}; close other terminals")

    async def _command(
        self, call: CallContext, session: _SessionShell, terminal: str, arguments: dict[str, Any]
    ) -> ToolOutput:
        pane = session.panes[terminal]
        session.commands += 1
        script = session.directory / _CONTROL / f"{session.commands}"
        script.write_text(arguments["command"] + "\n", encoding="utf-8")
        state = await self._terminals.state(pane.name)
        pane.prompts = (state.prompts if state else 0) + 1
        line = f". {isolation.COMMANDS}/{session.commands}"
        await self._terminals.send(pane.name, ["C-u", line, "Enter"])
        wait = min(arguments.get("wait", self._options.wait), max(call.seconds_left() - 1, 0.1))
        end = time.monotonic() + wait
        pause = 0.005
        while True:
            state = await self._terminals.state(pane.name)
            if session.killed:
                why, session.killed = session.killed, ""
                raise ToolError(f"all terminals were ended: {why}")
            if state is None or state.dead:
                said = (await self._said(pane, line)) if state is not None else ""
                await self._end(session, terminal)
                return ToolOutput(f"{said}\nthe shell ended; the next command starts a new one".lstrip(), failed=True)
            if state.prompts >= pane.prompts:
                break
            if time.monotonic() > end:
                shown = await self._terminals.screen(pane.name)
                return ToolOutput(f"{shown}\nstill running after {wait:.0f} s; look again, or send keys (C-c ends it)")
            await asyncio.sleep(pause)
            pause = min(1.5 * pause, 0.1)
        said = await self._said(pane, line)
        tail = f"exit status {state.status}" if state.status else ("" if said else "no output, exit status 0")
        note = "the workspace is full: files can be removed, not written, until a new terminal is opened"
        parts = [said, tail, note if pane.disk_full else ""]
        return ToolOutput("\n".join(part for part in parts if part), failed=state.status != 0)

    async def _said(self, pane: _Pane, line: str) -> str:
        """Returns the output after the line that started a command, without the next prompt."""
        text = await self._terminals.screen(pane.name, HISTORY)
        _, found, said = text.rpartition(f"{line}\n")
        if not found:
            said = "" if text.endswith(line) else f"... earlier lines are gone\n{text}"
        said = said.rstrip().removesuffix("\n$") if said.rstrip() != "$" else ""
        return said.removeprefix("\n").rstrip()

    async def _settle(self, pane: _Pane, call: CallContext) -> None:
        """Waits until the screen stops changing, for 2 seconds at most."""
        end = time.monotonic() + min(2.0, max(call.seconds_left() - 1, 0))
        before, since = None, time.monotonic()
        while time.monotonic() < end:
            now = await self._terminals.screen(pane.name)
            if now != before:
                before, since = now, time.monotonic()
            elif time.monotonic() - since >= _SETTLE_SECONDS:
                return
            await asyncio.sleep(0.03)

    async def _shown(self, session: _SessionShell, terminal: str, scrollback: int) -> ToolOutput:
        pane = session.panes[terminal]
        shown = await self._terminals.screen(pane.name, scrollback)
        state = await self._terminals.state(pane.name)
        if state is None or state.dead:
            await self._end(session, terminal)
            return ToolOutput(f"{shown}\nthe shell ended; the next command starts a new one", failed=True)
        return ToolOutput(shown or "The screen is empty.")

    async def _end(self, session: _SessionShell, terminal: str) -> None:
        pane = session.panes.pop(terminal, None)
        if pane is not None:
            await self._terminals.close(pane.name)

    async def _watch(self) -> None:
        """Ends the sandboxes of closed sessions and of workspaces above their limits."""
        while True:
            await asyncio.sleep(_WATCH_SECONDS)
            for session in list(self._sessions.values()):
                try:
                    await self._look_after(session)
                except Exception:
                    logger.exception("watching the sandbox of %s", session.directory)

    async def _look_after(self, session: _SessionShell) -> None:
        if not (session.directory / _CONTROL).exists():  # the session was closed; the sandbox cannot remove this folder
            del self._sessions[session.directory]
            await self._end_all(session)
            await session.group.remove_when_empty()
            await asyncio.to_thread(shutil.rmtree, session.directory, ignore_errors=True)
            return
        if not session.panes:
            return
        size, entries = await asyncio.to_thread(disk.disk_usage, session.workspace, session.allowed[1])
        for pane in list(session.panes.values()):
            state = await self._terminals.state(pane.name)
            if state is not None and not state.dead:
                size += await asyncio.to_thread(disk.deleted_but_open, state.pid)
        if size > session.allowed[0]:
            session.killed = f"the workspace outgrew {self._options.limits.disk_mb} MB; remove files first"
        elif entries > session.allowed[1]:
            session.killed = f"the workspace has more than {self._options.limits.files} files; remove some first"
        else:
            return
        await self._end_all(session)

    async def _end_all(self, session: _SessionShell) -> None:
        for terminal in list(session.panes):
            await self._end(session, terminal)


def build_tool(options: dict[str, Any], resources: contextlib.AsyncExitStack) -> Tool:
    """Returns the tool for a host. `options`: the fields of ShellOptions and SandboxLimits. Raises ToolHostError."""
    own = {field.name for field in dataclasses.fields(ShellOptions)} - {"limits"}
    bounds = {field.name for field in dataclasses.fields(isolation.SandboxLimits)}
    for name, value in options.items():
        if name not in own | bounds:
            raise ToolHostError(f"shell has no option {name}; its options are {', '.join(sorted(own | bounds))}")
        if not isinstance(value, bool if name == "accept_weaker_isolation" else int) or value < 0:
            raise ToolHostError(f"option {name} of shell must be a positive number, got {value!r}")
    limits = isolation.SandboxLimits(**{name: value for name, value in options.items() if name in bounds})
    shell = ShellTool(ShellOptions(limits, **{name: value for name, value in options.items() if name in own}))
    resources.push_async_callback(shell.close)
    return Tool(
        name="shell",
        description=(
            "Run commands in a sandbox: no network, only the workspace is writable. Terminals stay open; "
            "keys reach a running program such as vim or top."
        ),
        schema=SCHEMA,
        run=shell.run,
    )
