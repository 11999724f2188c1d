"""One Chromium process with its proxy: started on first use and restarted after it ends."""

import asyncio
import contextlib
import logging
import secrets
import socket
from pathlib import Path

from tools_env.browser import sandbox
from tools_env.errors import Unavailable
from tools_env.sandbox.cgroups import ControlGroups
from tools_env.web.egress import EgressPolicy
from tools_env.web.proxy import ForwardProxy

logger = logging.getLogger(__name__)

START_SECONDS = 20.0
# Playwright's own flags already disable most background work. These block what could bypass the proxy where the browser
# shares the host's network.
_FLAGS = (
    "--proxy-bypass-list=<-loopback>",  # the proxy also handles loopback addresses
    "--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1",  # resolve no names; 127.0.0.1 is the proxy
    "--disable-quic",
    "--force-webrtc-ip-handling-policy=disable_non_proxied_udp",
    "--webrtc-ip-handling-policy=disable_non_proxied_udp",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--no-pings",
    "--no-first-run",
    "--disable-extensions",
    "--disable-gpu",
    "--dns-prefetch-disable",
    "--js-flags=--max-old-space-size=512",  # MB of JavaScript objects of one page
)


class Chromium:
    """The browser of one host. Create it on the event loop it is used on; `close` ends it."""

    def __init__(
        self,
        egress: EgressPolicy,
        executable: str,
        isolation: sandbox.Isolation,
        *,
        memory_mb: int,
        processes: int = 1000,
    ):
        self._egress = egress
        self._executable = executable
        self._isolation = isolation
        self._memory = memory_mb << 20
        self._processes = processes
        self._groups = ControlGroups()
        if not self._groups.memory:
            logger.warning("browser: its memory is not limited as a whole (no writable memory control group)")
        self._changing = asyncio.Lock()  # held while a process is started or ended
        self._ready: asyncio.Task | None = None  # ends with Playwright's Browser
        self._running: contextlib.AsyncExitStack | None = None

    async def browser(self):
        """Returns Playwright's Browser of a running process. Raises Unavailable when it cannot be started."""
        ready = self._ready
        if (
            ready is None
            or ready.done()
            and (ready.cancelled() or ready.exception() or not ready.result().is_connected())
        ):
            ready = self._ready = asyncio.create_task(self._begin())
        return await asyncio.shield(ready)  # one call's timeout must not cancel the start for all

    async def restart(self) -> None:
        """Ends the process; the next call of `browser` starts another."""
        ready, self._ready = self._ready, None
        if ready is not None and not ready.done():
            ready.cancel()
            await asyncio.gather(ready, return_exceptions=True)
        async with self._changing:
            await self._stop()

    async def close(self) -> None:
        await self.restart()

    async def _begin(self):
        async with self._changing:
            await self._stop()
            try:
                async with asyncio.timeout(START_SECONDS):
                    return await self._start()
            except Exception as error:
                logger.exception("the browser does not start")
                raise Unavailable(f"the browser does not start ({type(error).__name__})") from None

    async def _start(self):
        from playwright.async_api import async_playwright

        secret = secrets.token_hex(16)
        async with contextlib.AsyncExitStack() as resources:
            group = self._groups.make("browser", self._memory, self._processes)
            resources.push_async_callback(group.remove_when_empty)
            program, folder = resources.enter_context(
                sandbox.sandboxed_program(self._executable, self._isolation, group)
            )
            proxy = ForwardProxy(self._egress, secret)
            resources.push_async_callback(proxy.close)
            playwright = await resources.enter_async_context(async_playwright())
            if self._isolation.namespaces:
                port, handover = sandbox.PORT, asyncio.create_task(_handed_over(folder, proxy))
                resources.callback(handover.cancel)
            else:
                port, handover = await proxy.start(), None
            browser = await playwright.chromium.launch(
                executable_path=program,
                chromium_sandbox=self._isolation.chromium,
                args=list(_FLAGS),
                proxy={"server": f"http://127.0.0.1:{port}", "username": "browser", "password": secret},
                env={"PATH": "/usr/local/bin:/usr/bin:/bin", "HOME": str(folder), "LANG": "C.UTF-8"},
                handle_sigint=False,
                handle_sigterm=False,
                handle_sighup=False,
                timeout=1000 * START_SECONDS,
            )
            resources.push_async_callback(_closed, browser)
            if handover is not None:
                await handover
            self._running = resources.pop_all()
            return browser

    async def _stop(self) -> None:
        running, self._running = self._running, None
        if running is not None:
            try:
                await running.aclose()
            except Exception:  # parts of a killed browser cannot be closed in order
                logger.exception("while the browser was closed")


async def _handed_over(folder: Path, proxy: ForwardProxy) -> None:
    """Receives the proxy's listening socket from inside the sandbox and serves it."""
    loop = asyncio.get_running_loop()
    with socket.socket(socket.AF_UNIX) as control:
        control.bind(str(folder / "handover"))
        control.listen(1)
        control.setblocking(False)
        inside, _ = await loop.sock_accept(control)
    with inside:
        while True:
            try:
                _, descriptors, _, _ = socket.recv_fds(inside, 16, 1)
                break
            except BlockingIOError:
                await asyncio.sleep(0.005)
        await proxy.start(socket.socket(fileno=descriptors[0]))
        await loop.sock_sendall(inside, b"1")


async def _closed(browser) -> None:
    with contextlib.suppress(Exception):
        async with asyncio.timeout(5.0):
            await browser.close()
