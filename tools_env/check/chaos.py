"""Fault injection for the load generator: repeatedly kills parts of a tool host with SIGKILL.

`worker`: one of the host's processes, and with it its copy of the search index; the supervisor restarts it.
`redis`: the server of the retrieval cache; it is restarted on its port.
"""

import asyncio
import contextlib
import os
import random
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from pathlib import Path

from tools_env.errors import ToolHostError

KINDS = ("worker", "redis")


class RedisServer:
    """A temporary redis-server on a loopback port; a context manager. Stores nothing on disk."""

    def __init__(self):
        """Raises ToolHostError when redis-server is not installed."""
        self._program = shutil.which("redis-server")
        if not self._program:
            raise ToolHostError("redis-server is not installed (apt-get install redis-server)")
        self._folder = tempfile.mkdtemp(prefix="stepdr_redis_")
        with socket.create_server(("127.0.0.1", 0)) as free:
            self.port = free.getsockname()[1]
        self.url = f"redis://127.0.0.1:{self.port}/0"

    def __enter__(self) -> "RedisServer":
        self.start()
        return self

    def __exit__(self, *exc) -> None:
        self.kill()
        shutil.rmtree(self._folder, ignore_errors=True)

    def start(self) -> None:
        """Starts the server and returns when it answers. Raises ToolHostError after ten seconds."""
        command = [self._program, "--port", str(self.port), "--bind", "127.0.0.1", "--save", "", "--appendonly", "no"]
        self._process = subprocess.Popen([*command, "--dir", self._folder], stdout=subprocess.DEVNULL)
        end = time.monotonic() + 10.0
        while time.monotonic() < end:
            with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", self.port), 0.2):
                return
            time.sleep(0.05)
        raise ToolHostError("redis-server did not start")

    def kill(self) -> None:
        self._process.kill()
        self._process.wait()


def worker_processes(pid: int) -> list[int]:
    """Returns the process ids of a supervisor's workers."""
    children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    return [int(child) for child in children if b"--worker" in Path(f"/proc/{child}/cmdline").read_bytes()]


async def kill_parts(kinds: list[str], pid: int, redis: RedisServer | None, every: float, seconds: float) -> list[str]:
    """Kills one part every `every` seconds, for `seconds` in all; returns the kinds of what it killed."""
    killed, draw, end = [], random.Random(0), time.monotonic() + seconds
    while time.monotonic() + every < end:
        await asyncio.sleep(every)
        kind = kinds[len(killed) % len(kinds)]
        if kind == "redis":
            redis.kill()
            await asyncio.sleep(min(every / 2, 1.0))  # calls arrive while it is down
            await asyncio.to_thread(redis.start)
        else:
            with contextlib.suppress(ProcessLookupError):
                os.kill(draw.choice(worker_processes(pid)), signal.SIGKILL)
        killed.append(kind)
    return killed
