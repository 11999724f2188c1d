"""One session's page: actions, waiting until it is idle, and refusal of popups, dialogs and downloads."""

import asyncio
import contextlib
import dataclasses
import re
import time
from typing import Any

from tools_env.browser.screenshots import Screenshots
from tools_env.browser.snapshot import PageSnapshot, take_snapshot
from tools_env.errors import ToolError
from tools_env.web.proxy import REFUSAL_HEADER

ACTION_MS = 4000.0  # timeout for an element to become usable
_QUIET_SECONDS = 0.2  # without a request in flight: the page is idle
_SETTLE_SECONDS = 3.0  # at most
_MAX_NOTES = 5


@dataclasses.dataclass
class Tab:
    """The page of one session; `context` and `page` are None while it has none."""

    screenshots: Screenshots
    lock: asyncio.Lock = dataclasses.field(default_factory=asyncio.Lock)
    used: float = dataclasses.field(default_factory=time.monotonic)
    context: Any = None
    page: Any = None
    snapshot: PageSnapshot | None = None  # as last shown to the model
    lost: str = ""  # why the page is gone, until the model is told
    refused: str = ""  # why the proxy refused the last document
    notes: list[str] = dataclasses.field(default_factory=list)
    _pending: dict[Any, float] = dataclasses.field(default_factory=dict)  # requests in flight and their start times
    _quiet_since: float = 0.0

    def attach(self, context, page) -> None:
        """Takes a new page: refuses popups, dialogs and downloads with a note for the model, tracks requests."""
        self.context, self.page, self.snapshot, self.refused, self.lost = context, page, None, "", ""
        self.notes, self._pending = [], {}
        context.on("page", self._popup)
        page.on("dialog", self._dialog)
        page.on("download", lambda download: self._note(f"a download was refused: {download.url}"))
        page.on("request", lambda request: self._pending.update({request: time.monotonic()}))
        page.on("requestfinished", self._ended)
        page.on("requestfailed", self._ended)
        page.on("response", self._replied)

    def detach(self, why: str):
        """Returns the context, for the caller to close; the next call that needs a page reports `why`."""
        context = self.context
        self.context, self.page, self.snapshot, self.lost, self.notes = None, None, None, why, []
        return context

    async def stop(self) -> None:
        """Stops loading; returns only if the page's scripts still run."""
        session = await self.context.new_cdp_session(self.page)
        await session.send("Page.stopLoading")
        await self.page.evaluate("1")
        await session.detach()

    async def read(self) -> PageSnapshot:
        """Takes a snapshot once the page is idle, and another when the page navigated meanwhile."""
        for attempt in range(3):
            await self._rest()
            if self.snapshot is not None:
                await self.snapshot.dispose()
                self.snapshot = None
            try:
                self.snapshot = await take_snapshot(self.page)
                break
            except playwright_error() as error:
                if attempt == 2 or not re.search("destroyed|navigat|detached", str(error)):
                    raise
        return self.snapshot

    async def find(self, target: str):
        """Returns Playwright's ElementHandle of the element with this number or text. Raises ToolError."""
        found = (self.snapshot or await self.read()).find(target)
        handle = await found.handle.evaluate_handle("(found, i) => found.elements[i]", found.index)
        element = handle.as_element()
        if element is None:
            raise ToolError("the element is gone; look again")
        return element

    async def _rest(self) -> None:
        """Waits until no request has been in flight for a moment.

        Bounded, as some pages are never idle and some requests never end.
        """
        now = self._quiet_since = time.monotonic()
        end = now + _SETTLE_SECONDS
        while now < end:
            waiting = any(now - since < _SETTLE_SECONDS for since in self._pending.values())
            if not waiting and now - self._quiet_since > _QUIET_SECONDS:
                return
            await asyncio.sleep(0.02)
            now = time.monotonic()

    def _note(self, text: str) -> None:
        if len(self.notes) < _MAX_NOTES:
            self.notes.append(" ".join(text.split())[:300])

    async def _popup(self, other) -> None:
        with contextlib.suppress(playwright_error(), TimeoutError):
            if other.url in ("", "about:blank"):
                async with asyncio.timeout(1.0):
                    await other.wait_for_url(lambda url: url != "about:blank", wait_until="commit")
        self._note(f"a new window was refused: {other.url}")
        with contextlib.suppress(playwright_error()):
            await other.close()

    async def _dialog(self, box) -> None:
        with contextlib.suppress(playwright_error()):
            if box.type == "beforeunload":  # dismissing it would keep the page
                return await box.accept()
            self._note(f"a dialog was dismissed: {box.message}")
            await box.dismiss()

    def _ended(self, request) -> None:
        self._pending.pop(request, None)
        self._quiet_since = time.monotonic()

    def _replied(self, response) -> None:
        if response.request.is_navigation_request() and response.frame == self.page.main_frame:
            self.refused = response.headers.get(REFUSAL_HEADER, "").partition("details=")[2]


async def fill_field(element, text: str) -> None:
    """Fills a field with text, or selects the option with that text. Raises ToolError and Playwright's errors."""
    kind = await element.evaluate("e => e.tagName === 'SELECT' ? 'select' : (e.type || '').toLowerCase()")
    if kind == "file":
        raise ToolError("files cannot be uploaded")
    if kind in ("checkbox", "radio", "submit", "button"):
        raise ToolError(f"a {kind} is clicked, not typed into")
    if kind == "select":
        await element.select_option(label=text, timeout=ACTION_MS)
    else:
        await element.fill(text, timeout=ACTION_MS)


def playwright_error() -> type[Exception]:
    """Returns Playwright's base class of errors; the package is imported on first use."""
    from playwright.async_api import Error

    return Error
