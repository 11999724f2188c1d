"""`browser`: Chromium. One process serves a host; each session has its own browser context with one page.

A context shares no cookies, storage or cache with others. It is opened by a session's first call, and closed with the
session, after a time without use, or when others need its place. `EgressPolicy` decides where it may connect.
"""

import asyncio
import contextlib
import dataclasses
import logging
import re
import shutil
import time
from pathlib import Path
from typing import Any

from tools_env.browser import sandbox
from tools_env.browser.chromium import Chromium
from tools_env.browser.screenshots import Screenshots
from tools_env.browser.tab import ACTION_MS, Tab, fill_field, playwright_error
from tools_env.errors import BadArguments, ToolError, ToolHostError
from tools_env.search.citations import canonical_url
from tools_env.tools.base import CallContext, Tool, ToolOutput
from tools_env.web.egress import EgressPolicy

logger = logging.getLogger(__name__)

VIEWPORT = {"width": 1280, "height": 800}  # pixels
_MARK = "browser"  # folder of a session, beside its workspace; exists while the session is open
_WATCH_SECONDS = 0.5
_GRACE_SECONDS = 20.0  # a page used within this time is not closed for another session
_MARGIN = 2.0  # seconds reserved for the work after an action
_CLOSE_SECONDS = 15.0
_NO_SCHEME = re.compile(r"[\w-]+(\.[\w-]+)+(:\d+)?([/?#]|$)")

SCHEMA = {
    "type": "object",
    "properties": {
        "action": {"type": "string", "enum": ["open", "click", "type", "scroll", "back", "look"]},
        "url": {"type": "string", "minLength": 1, "maxLength": 4000, "description": "open: address or citation id"},
        "target": {
            "type": "string",
            "minLength": 1,
            "maxLength": 300,
            "description": "click, type: number of an element, or the text it shows",
        },
        "text": {"type": "string", "maxLength": 20000, "description": "type: replaces what is there"},
        "submit": {"type": "boolean", "description": "type: press Enter after it"},
        "direction": {"type": "string", "enum": ["down", "up"], "description": "scroll: default down"},
    },
    "required": ["action"],
}
_NEEDED = {"open": ("url",), "click": ("target",), "type": ("target", "text")}


@dataclasses.dataclass(frozen=True)
class BrowserOptions:
    """Options of the tool."""

    executable: str = ""  # default: the first of chromium, chromium-browser, google-chrome on PATH
    timeout: int = 20  # seconds of one action, within the call's deadline
    contexts: int = 16  # open pages; the least recently used one is closed for others, or they wait
    idle: int = 300  # seconds after which an unused page is closed
    screenshots: int = 50  # screenshots of a session
    # Bits of 64. On 40 articles (browser_bench) a typed word or a ticked box changes at most 4, a scroll at least 20.
    threshold: int = 4
    memory_mb: int = 4096  # of the whole browser, where control groups are writable
    accept_weaker_isolation: bool = False


class BrowserTool:
    """The tool's state. Create it on the event loop it is used on; `close` ends every page and the browser."""

    def __init__(self, options: BrowserOptions, egress: EgressPolicy):
        """Raises ToolHostError when the browser cannot run here, or with weaker isolation than `options` accepts."""
        executable = sandbox.find_chromium(options.executable)
        isolation = sandbox.strongest_isolation(executable, shutil.which("bwrap") is not None)
        if isolation.weakness and not options.accept_weaker_isolation:
            raise ToolHostError(
                f"the browser tool's sandbox is weaker than required: {isolation.weakness}; fix that, leave browser "
                "out, or set its option accept_weaker_isolation"
            )
        if isolation.weakness:
            logger.warning("browser: %s", isolation.weakness)
        self._options = options
        self._egress = egress
        self._chromium = Chromium(egress, executable, isolation, memory_mb=options.memory_mb)
        self._tabs: dict[Path, Tab] = {}
        self._watcher: asyncio.Task | None = None
        self._closing: set[asyncio.Task] = set()
        self._opening = asyncio.Lock()

    async def run(self, call: CallContext, arguments: dict[str, Any]) -> ToolOutput:
        """Runs the tool."""
        action = arguments["action"]
        missing = [name for name in _NEEDED.get(action, ()) if name not in arguments]
        if missing:
            raise BadArguments(f"{action} needs {' and '.join(missing)}")
        tab = self.tab(call.directory)
        seconds = min(self._options.timeout, call.seconds_left() - _MARGIN)
        try:
            async with asyncio.timeout(max(seconds, 0.1)), tab.lock:
                tab.used = time.monotonic()
                failure = await self._act(call, tab, action, arguments)
                return await self._shown(call, tab, failure, photograph=action == "look")
        except TimeoutError:
            raise ToolError(await self._after_timeout(tab, action)) from None
        except playwright_error() as error:
            raise ToolError(self._after_error(tab, error)) from None
        finally:
            tab.used = time.monotonic()

    async def _act(self, call: CallContext, tab: Tab, action: str, arguments: dict[str, Any]) -> str:
        """Performs the action. Returns a failure that still leaves a page to show, or ""."""
        if action == "open":
            return await self._open(call, tab, arguments["url"])
        if tab.page is None or tab.page.is_closed():
            why, tab.lost = tab.lost or ("no page is open" if tab.context is None else "the browser stopped"), ""
            raise ToolError(f"{why}; open an address first")
        if action in ("click", "type"):
            element = await tab.find(arguments["target"])
            if action == "click":
                await element.click(timeout=ACTION_MS)
            else:
                await fill_field(element, arguments["text"])
                if arguments.get("submit"):
                    await element.press("Enter", timeout=ACTION_MS)
        elif action == "scroll":
            down = 1 if arguments.get("direction", "down") == "down" else -1
            await tab.page.mouse.move(VIEWPORT["width"] / 2, VIEWPORT["height"] / 2)
            await tab.page.mouse.wheel(0, down * 0.8 * VIEWPORT["height"])
        elif action == "back":
            if await tab.page.go_back(wait_until="domcontentloaded") is None and tab.page.url == "about:blank":
                raise ToolError("there is no earlier page")
        return ""

    async def _open(self, call: CallContext, tab: Tab, wanted: str) -> str:
        if wanted in call.known:
            wanted = call.known[wanted].url
        if _NO_SCHEME.match(wanted):
            wanted = f"http://{wanted}"
        try:
            address = str(self._egress.url(canonical_url(wanted)))
        except ValueError:
            raise ToolError("not an http address") from None
        if tab.page is None or tab.page.is_closed():
            await self._new_page(tab)
        tab.refused = ""
        try:
            reply = await self._go(tab, address)
        except playwright_error() as error:
            if "ERR_ABORTED" not in str(error) and "Download is starting" not in str(error):
                raise
            tab.notes = []
            raise ToolError("no page: a download or nothing; batch_web_surfer reads PDF and text") from None
        if tab.refused:
            raise ToolError(tab.refused)
        return f"HTTP {reply.status}" if reply is not None and reply.status >= 400 else ""

    async def _go(self, tab: Tab, address: str):
        """Returns the response of the address.

        Retries when the error page of an earlier failure interrupts the navigation.
        """
        for attempt in range(5):
            try:
                return await tab.page.goto(address, wait_until="domcontentloaded")
            except playwright_error() as error:
                if attempt == 4 or "interrupted by another navigation" not in str(error):
                    raise
            await asyncio.sleep(0.1)

    async def _shown(self, call: CallContext, tab: Tab, failure: str, *, photograph: bool) -> ToolOutput:
        """Waits until the page is idle and returns its content. `photograph`: always takes a screenshot."""
        found = await tab.read()
        if tab.refused:
            failure, tab.refused = tab.refused, ""
        head = [" | ".join(filter(None, [found.title, found.url])), *filter(None, [failure])]
        key = (found.url.partition("#")[0], found.digest, found.scroll)
        if tab.screenshots.redundant(key) and not photograph:
            head.append(f"the screen is as in {tab.screenshots.path}")
        else:
            png = await tab.page.screenshot(type="png", animations="disabled", caret="hide")
            try:
                new = await tab.screenshots.add(call.workspace, key, png)
                head.append(f"{'screenshot:' if new else 'the screen looks as in'} {tab.screenshots.path}")
            except ToolError as error:  # the text is still useful
                head.append(f"no screenshot: {error}")
        head += tab.notes
        tab.notes = []
        text = found.text()
        return ToolOutput("\n".join([*head, text]), blocks=["\n".join(head), text], failed=bool(failure))

    async def close(self) -> None:
        """Ends the browser."""
        if self._watcher is not None:
            self._watcher.cancel()
        self._tabs.clear()
        await self._chromium.close()
        await asyncio.gather(*self._closing, return_exceptions=True)

    def tab(self, directory: Path) -> Tab:
        """Returns the tab of the session in this folder."""
        tab = self._tabs.get(directory)
        if tab is None:
            (directory / _MARK).mkdir(exist_ok=True)
            screenshots = Screenshots(self._options.threshold, self._options.screenshots)
            tab = self._tabs[directory] = Tab(screenshots)
        if self._watcher is None or self._watcher.done():
            self._watcher = asyncio.create_task(self._watch())
        return tab

    async def _new_page(self, tab: Tab) -> None:
        """Opens a context as soon as there is room for one; waits until the call's deadline."""
        async with self._opening:
            while not self._room(tab):
                await asyncio.sleep(0.05)
            browser = await self._chromium.browser()
            self._drop(tab, "")
            context = await browser.new_context(
                viewport=VIEWPORT,
                accept_downloads=False,
                service_workers="block",
                permissions=[],
                locale="en-US",
                reduced_motion="reduce",
            )
            try:
                tab.attach(context, await context.new_page())
            finally:
                if tab.context is None:
                    self._close_later(context)

    def _room(self, tab: Tab) -> bool:
        """Returns whether one more page may be opened; if needed, closes the least recently used one."""
        taken = [other for other in self._tabs.values() if other.context is not None and other is not tab]
        if len(taken) < self._options.contexts:
            return True
        oldest = min(taken, key=lambda other: other.used)
        if oldest.lock.locked() or time.monotonic() - oldest.used < _GRACE_SECONDS:
            return False
        self._drop(oldest, "the page was closed to make room for others")
        return True

    def _drop(self, tab: Tab, why: str) -> None:
        """Drops a session's page; its context is closed in the background."""
        if (context := tab.detach(why)) is not None:
            self._close_later(context)

    def _close_later(self, context) -> None:
        task = asyncio.create_task(self._close_context(context))
        self._closing.add(task)
        task.add_done_callback(self._closing.discard)

    async def _close_context(self, context) -> None:
        """Closes a context; restarts the browser when that takes too long."""
        try:
            async with asyncio.timeout(_CLOSE_SECONDS):
                await context.close()
        except TimeoutError:
            logger.warning("a page could not be closed; the browser is restarted")
            await self._chromium.restart()
        except playwright_error():
            pass  # the browser is gone

    async def _after_timeout(self, tab: Tab, action: str) -> str:
        """Stops a page that took too long; closes it when it hangs. Returns the message for the model."""
        if tab.lock.locked():
            return f"{action}: another call of this session still uses the page"
        if tab.page is None:
            return f"{action} timed out: no page could be opened; try again later"
        with contextlib.suppress(TimeoutError, playwright_error()):
            async with asyncio.timeout(1.0):
                await tab.stop()
                return f"{action} timed out; look at what has loaded"
        self._drop(tab, "")
        return f"{action} timed out: the page hung and was closed; open an address"

    def _after_error(self, tab: Tab, error: Exception) -> str:
        """Returns the message of a Playwright error for the model; drops a page that is gone."""
        words = re.sub(r"\x1b\[[0-9;]*m", "", str(error))
        if tab.page is None or tab.page.is_closed() or "crashed" in words or not tab.context.browser.is_connected():
            gone = tab.context is not None and not tab.context.browser.is_connected()
            why = "the browser stopped" if gone else "the page crashed"
            self._drop(tab, "")
            return f"{why}; open the address again"
        if found := re.search(r"net::(ERR_\w+)", words):
            return _NET.get(found.group(1), f"cannot open the page ({found.group(1)})")
        if "Timeout" in words:
            blocker = (
                "something covers it" if "intercepts pointer events" in words else "it is hidden, moving or disabled"
            )
            return f"the element cannot be used: {blocker}; look again"
        if "not attached" in words or "disposed" in words or "destroyed" in words:
            return "the element is gone, because the page has changed; look again"
        return words.splitlines()[0].partition(": ")[2][:200] or "the browser could not do that"

    async def _watch(self) -> None:
        """Closes the pages of ended sessions and unused pages."""
        while True:
            await asyncio.sleep(_WATCH_SECONDS)
            for directory, tab in list(self._tabs.items()):
                try:
                    if not (directory / _MARK).exists():  # the session was closed
                        del self._tabs[directory]
                        self._drop(tab, "")
                    elif tab.context and not tab.lock.locked() and time.monotonic() - tab.used > self._options.idle:
                        self._drop(tab, f"the page was closed after {self._options.idle} s without use")
                except Exception:
                    logger.exception("watching the page of %s", directory)


_NET = {
    "ERR_TUNNEL_CONNECTION_FAILED": "cannot connect",
    "ERR_TOO_MANY_REDIRECTS": "too many redirects",
    "ERR_EMPTY_RESPONSE": "broken reply",
    "ERR_CONNECTION_RESET": "broken reply",
    "ERR_INVALID_RESPONSE": "broken reply",
    "ERR_UNSAFE_PORT": "cannot connect",
    "ERR_BLOCKED_BY_CLIENT": "not an http address",
}


def build_tool(options: dict[str, Any], resources: contextlib.AsyncExitStack, egress: EgressPolicy) -> Tool:
    """Returns the tool for a host. `options`: the fields of BrowserOptions. Raises ToolHostError."""
    fields = {field.name: type(field.default) for field in dataclasses.fields(BrowserOptions)}
    for name, value in options.items():
        if name not in fields:
            raise ToolHostError(f"browser has no option {name}; its options are {', '.join(sorted(fields))}")
        if type(value) is not fields[name] or (fields[name] is int and value < (name != "threshold")):
            raise ToolHostError(f"option {name} of browser must be {_SAID[fields[name]]}, got {value!r}")
    try:
        import imagehash  # noqa: F401
        import playwright  # noqa: F401
    except ImportError as error:
        raise ToolHostError(
            f"browser needs the package {error.name}; install the extra: pip install .[browser]"
        ) from None
    browser = BrowserTool(BrowserOptions(**options), egress)
    resources.push_async_callback(browser.close)
    return Tool(
        name="browser",
        description=(
            "Use a real browser: open a page, click, type, scroll, go back, look. Shows the "
            "page's text from where it is "
            "scrolled to, with [number kind name] for what can be used, and stores a screenshot "
            "when the screen changes."
        ),
        schema=SCHEMA,
        run=browser.run,
    )


_SAID = {str: "a text", int: "a positive number", bool: "true or false"}
