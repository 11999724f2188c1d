"""Terminals that persist between calls: one tmux server outside the sandbox, each pane a sandboxed bash.

The sandbox never sees the server's socket. The server ends with this process, and each sandbox ends with the server.
"""

import asyncio
import dataclasses
import re
import tempfile
from pathlib import Path

from tools_env.errors import ToolError

COLUMNS, ROWS = 160, 50
HISTORY = 5_000  # lines of scrollback
_KEY = re.compile(
    r"(Enter|Escape|Tab|BTab|BSpace|Space|Up|Down|Left|Right|Home|End|PageUp|PageDown|DC|IC|F\d\d?|[CM]-.)$"
)
_CONFIG = f"""
set -g history-limit {HISTORY}
set -g status off
set -g remain-on-exit on
set -g allow-rename off
set -g automatic-rename off
set -g default-terminal screen
set -g escape-time 0
set -g set-clipboard off
set -g update-environment ""
set -g default-size {COLUMNS}x{ROWS}
set -g exit-empty off
"""


@dataclasses.dataclass(frozen=True)
class PaneState:
    """A pane as it is now. `prompts` counts the prompts its shell has shown, `status` is its last exit status."""

    prompts: int
    status: int
    pid: int
    dead: bool


class Terminals:
    """The tmux server of this process. Names are `[A-Za-z0-9_]+`; each is one pane."""

    def __init__(self):
        self._folder = tempfile.TemporaryDirectory(prefix="stepdr_tmux_")  # short: a socket's path is limited
        self._socket = str(Path(self._folder.name, "socket"))
        self._config = Path(self._folder.name, "tmux.conf")
        self._config.write_text(_CONFIG)
        self._server: asyncio.subprocess.Process | None = None
        self._starting = asyncio.Lock()

    async def open(self, name: str, argv: list[str]) -> None:
        """Starts a pane that runs `argv`."""
        async with self._starting:
            if self._server is None or self._server.returncode is not None:
                await self._start()
        await self._tmux("new-session", "-d", "-s", name, "-x", str(COLUMNS), "-y", str(ROWS), *argv)

    async def _start(self) -> None:
        # setpriv: the server dies with this process. -D: it stays a child.
        self._server = await asyncio.create_subprocess_exec(
            *("setpriv", "--pdeathsig", "KILL", "tmux", "-D", "-u", "-S", self._socket, "-f", str(self._config)),
            stdin=asyncio.subprocess.DEVNULL,
            stdout=asyncio.subprocess.DEVNULL,
            stderr=asyncio.subprocess.DEVNULL,
            env={"PATH": "/usr/local/bin:/usr/bin:/bin", "LANG": "C.UTF-8", "TERM": "screen"},
        )
        for _ in range(100):
            if Path(self._socket).exists() and (await self._ask("list-sessions"))[0] == 0:
                return
            await asyncio.sleep(0.02)
        raise RuntimeError("tmux did not start")

    async def state(self, name: str) -> PaneState | None:
        """Returns the state of a pane, or None when there is none of this name."""
        if self._server is None or self._server.returncode is not None:
            return None
        form = "#{pane_dead} #{pane_pid} #{pane_title}"
        code, text = await self._ask("display-message", "-p", "-t", f"={name}:", form)
        if code != 0 or not text.strip():
            return None
        dead, pid, title = (text.rstrip("\n") + "  ").split(" ", 2)
        counted = re.match(r"(\d{1,9}):(\d{1,3})", title)
        prompts, status = (int(counted.group(1)), int(counted.group(2))) if counted else (0, 0)
        return PaneState(prompts, status, int(pid), dead == "1")

    async def send(self, name: str, keys: list[str]) -> None:
        """Sends keys: names such as Enter, Escape, C-c and Up are pressed, other strings are typed literally."""
        for key in keys:
            if _KEY.match(key):
                await self._tmux("send-keys", "-t", f"={name}:", key)
            elif key:
                # Through a buffer, because tmux reads a trailing ; among its arguments as the next command.
                await self._tmux("load-buffer", "-b", name, "-", stdin=key.encode(errors="replace"))
                await self._tmux("paste-buffer", "-d", "-b", name, "-t", f"={name}:")

    async def screen(self, name: str, history: int = 0) -> str:
        """Returns the pane's screen after `history` lines of scrollback, with wrapped lines joined."""
        return (await self._tmux("capture-pane", "-p", "-J", "-t", f"={name}:", "-S", str(-history))).rstrip()

    async def close(self, name: str) -> None:
        await self._ask("kill-session", "-t", f"={name}")

    async def stop(self) -> None:
        """Ends the server and with it all panes."""
        if self._server is not None and self._server.returncode is None:
            self._server.kill()
            await self._server.wait()
        self._folder.cleanup()

    async def _tmux(self, *arguments: str, stdin: bytes | None = None) -> str:
        code, text = await self._ask(*arguments, stdin=stdin)
        if code != 0:
            raise ToolError(f"the terminal is gone ({text.strip()[:80]}); start another")
        return text

    async def _ask(self, *arguments: str, stdin: bytes | None = None) -> tuple[int, str]:
        process = await asyncio.create_subprocess_exec(
            *("tmux", "-u", "-S", self._socket, *arguments),
            stdin=asyncio.subprocess.DEVNULL if stdin is None else asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.STDOUT,
        )
        try:
            out, _ = await process.communicate(stdin)
        except asyncio.CancelledError:
            process.kill()
            raise
        return process.returncode or 0, out.decode(errors="replace")
