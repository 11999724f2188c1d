"""Supervisor of several worker processes behind one port: starts them, restarts those that die, stops them together.

The kernel distributes connections over the workers (SO_REUSEPORT); routing.py forwards each call to its session. All
share a state directory, so a killed worker is restarted with its sessions and their stored replies.
"""

import asyncio
import contextlib
import dataclasses
import logging
import os
import shutil
import socket
import tempfile
import time
from collections.abc import Awaitable, Callable
from pathlib import Path

from prometheus_client import multiprocess

from tools_env.errors import ToolHostError
from tools_env.offline_web.server import OfflineWebServer
from tools_env.process import server_command, server_environment
from tools_env.service import metrics
from tools_env.service.settings import HostSettings

FIRST_PAUSE = 0.1  # seconds before a restart; doubles while the worker dies within YOUNG seconds
MAX_PAUSE = 10.0
YOUNG = 30.0  # seconds
STARTUP = 120.0  # seconds until a worker must answer

logger = logging.getLogger(__name__)


async def run_workers(settings: HostSettings, ready: Callable[[str], None], stopped: Awaitable) -> None:
    """Serves with `settings.workers` processes until `stopped`; `ready` is called with host:port when all answer.

    Raises ToolHostError when the port is taken or a worker does not start.
    """
    async with contextlib.AsyncExitStack() as resources:
        port = _reserve(settings.host, settings.port, resources)
        folder = Path(tempfile.mkdtemp(prefix="stepdr_workers_"))  # mkdtemp permits no other user
        resources.callback(shutil.rmtree, folder, ignore_errors=True)
        web_port = settings.web_port
        if web_port is None:
            web = OfflineWebServer(settings.offline_web)
            web_port = web.start()
            resources.callback(web.stop)
        shared = folder / "metrics"
        shared.mkdir()
        os.environ[metrics.SHARED_VARIABLE] = str(shared)
        resources.callback(os.environ.pop, metrics.SHARED_VARIABLE, None)
        if settings.metrics_port is not None:
            metrics_port, stop = metrics.serve_metrics(settings.host, settings.metrics_port, None)
            logger.info("metrics at http://%s:%d/metrics", settings.host, metrics_port)
            resources.callback(stop)
        common = dataclasses.replace(
            settings,
            port=port,
            web_port=web_port,
            metrics_port=None,
            socket_dir=str(folder),
            state_dir=settings.state_dir or str(folder / "state"),
        )
        workers = [_Worker(dataclasses.replace(common, worker=i), folder) for i in range(settings.workers)]
        # The first builds the search index if there is none; the others open it.
        tasks = [asyncio.create_task(workers[0].keep())]
        resources.push_async_callback(_end, workers, tasks)
        await _until_ready(workers[:1], tasks)
        tasks += [asyncio.create_task(worker.keep()) for worker in workers[1:]]
        await _until_ready(workers, tasks)
        ready(f"{settings.host}:{port}")
        await stopped


def _reserve(host: str, port: int, resources: contextlib.ExitStack) -> int:
    """Binds the port without listening, so that it stays reserved while workers restart. Returns the port."""
    try:
        family, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        with socket.socket(family, socket.SOCK_STREAM) as alone:  # fails where another program listens
            alone.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            alone.bind(address)
            address = alone.getsockname()
        held = resources.enter_context(socket.socket(family, socket.SOCK_STREAM))
        held.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        held.bind(address)
    except OSError as error:
        raise ToolHostError(
            f"cannot listen on {host}:{port} ({error.strerror}); stop the other program, name "
            "another port, or use port "
            "0 for any free one"
        ) from None
    return address[1]


async def _until_ready(workers: list["_Worker"], tasks: list[asyncio.Task]) -> None:
    ready = asyncio.gather(*(worker.ready.wait() for worker in workers))
    try:
        await asyncio.wait([ready, *tasks], timeout=STARTUP, return_when=asyncio.FIRST_COMPLETED)
        if not ready.done():
            raise ToolHostError("a worker did not start; its last line on standard error says why")
    finally:
        ready.cancel()


async def _end(workers: list["_Worker"], tasks: list[asyncio.Task]) -> None:
    await asyncio.gather(*(worker.stop() for worker in workers))
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)


class _Worker:
    """One process of the host. It ends with its supervisor, because its standard input is then closed."""

    def __init__(self, settings: HostSettings, folder: Path):
        self._settings = settings
        self._address_file = folder / f"{settings.worker}.address"
        self._process: asyncio.subprocess.Process | None = None
        self._stopping = False
        self.ready = asyncio.Event()

    async def keep(self) -> None:
        """Starts the process and restarts it when it dies; returns only if the first start fails."""
        pause = FIRST_PAUSE
        while not self._stopping:
            began = time.monotonic()
            self._address_file.unlink(missing_ok=True)
            self._process = await asyncio.create_subprocess_exec(
                *server_command(self._settings, self._address_file),
                stdin=asyncio.subprocess.PIPE,
                stdout=asyncio.subprocess.DEVNULL,
                env=server_environment(self._settings),
            )
            pid = self._process.pid
            logger.info("worker %d is process %d", self._settings.worker, pid)
            watcher = asyncio.create_task(self._watch())
            code = await self._process.wait()
            watcher.cancel()
            multiprocess.mark_process_dead(pid)
            if self._stopping or not self.ready.is_set():
                return
            pause = FIRST_PAUSE if time.monotonic() - began > YOUNG else min(2 * pause, MAX_PAUSE)
            logger.warning("worker %d ended with status %d; restart in %g s", self._settings.worker, code, pause)
            await asyncio.sleep(pause)

    async def _watch(self) -> None:
        while not self._address_file.exists():
            await asyncio.sleep(0.02)
        self.ready.set()

    async def stop(self) -> None:
        """Drains and ends the process."""
        self._stopping = True
        if self._process is None or self._process.returncode is not None:
            return
        with contextlib.suppress(ProcessLookupError):
            self._process.terminate()
        try:
            await asyncio.wait_for(self._process.wait(), self._settings.drain + 5.0)
        except TimeoutError:
            self._process.kill()
            await self._process.wait()
