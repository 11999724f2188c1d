"""HTTP server of the offline web: one server on loopback that answers for every host by its Host header.

Pages are rendered from documents.jsonl on request. A passage is one paragraph, so that the text extracted from a page
equals that of the documents file; citation ids depend on that. Other behavior of hosts is in sites.json: delays,
failures, redirects, and pages with a wrong charset or an unreasonable size.
"""

import asyncio
import html
import json
import os
import re
import threading
from pathlib import Path
from urllib.parse import unquote, urlsplit

from aiohttp import web

from tools_env.errors import ToolHostError
from tools_env.search import store, text

_PADDING = "<!-- " + "picture " * 128 + "-->\n"
# Sites that do not mark their main text, as many real ones: the parser must find it. Short Chinese pages always mark
# it, because main text extraction counts characters and takes them for too short.
_UNMARKED = {"travelnotes.test": 'div class="content"', "quickfacts.test": 'div id="page"'}


class OfflineWebServer:
    """Serves an offline web from its own thread, so it works with or without an event loop."""

    def __init__(self, offline_web_dir: str | os.PathLike):
        """Reads the pages. Raises ToolHostError when the offline web is missing or damaged."""
        self._site = _Site(offline_web_dir)
        self._thread: threading.Thread | None = None
        self._loop: asyncio.AbstractEventLoop | None = None
        self._stopping: asyncio.Event | None = None

    def start(self) -> int:
        """Starts serving on a free port of 127.0.0.1 and returns it."""
        if self._thread is not None:
            raise RuntimeError("the offline web is already running")
        ready: list[int | BaseException] = []
        started = threading.Event()

        async def serve():
            runner = web.AppRunner(self._site.app(), access_log=None, handle_signals=False, shutdown_timeout=0.5)
            try:
                await runner.setup()
                await web.TCPSite(runner, "127.0.0.1", 0).start()
                self._loop, self._stopping = asyncio.get_running_loop(), asyncio.Event()
                ready.append(runner.addresses[0][1])
            except BaseException as error:
                ready.append(error)
                await runner.cleanup()
                return
            finally:
                started.set()
            await self._stopping.wait()
            await runner.cleanup()

        self._thread = threading.Thread(target=lambda: asyncio.run(serve()), name="offline-web", daemon=True)
        self._thread.start()
        started.wait()
        if isinstance(ready[0], BaseException):
            self._thread.join()
            self._thread = None
            raise ToolHostError(f"cannot serve the offline web on 127.0.0.1: {ready[0]}") from ready[0]
        return ready[0]

    def stop(self) -> None:
        """Stops the server within a second after the requests in flight; does nothing when it is not running."""
        if self._thread is None:
            return
        self._loop.call_soon_threadsafe(self._stopping.set)
        self._thread.join()
        self._thread = None

    def __enter__(self) -> int:
        return self.start()

    def __exit__(self, *exc) -> None:
        self.stop()


def make_offline_web_app(offline_web_dir: str | os.PathLike) -> web.Application:
    """Returns the aiohttp application, for the caller's own event loop."""
    return _Site(offline_web_dir).app()


class _Site:
    def __init__(self, offline_web_dir: str | os.PathLike):
        self._hosts = read_hosts(offline_web_dir)
        documents, index = Path(offline_web_dir) / "documents.jsonl", Path(offline_web_dir) / "index"
        # A directory made by the index command has an index and no documents.
        in_index = not documents.is_file() and (index / "documents.sqlite").is_file()
        self._pages = store.Pages(index) if in_index else _read_pages(documents)

    def app(self) -> web.Application:
        app = web.Application()
        app.router.add_get("/{path:.*}", self._answer)
        return app

    async def _answer(self, request: web.Request) -> web.Response:
        name, path = request.host.rpartition(":")[0] or request.host, request.rel_url.path
        host = self._hosts.get(name)
        if host is None:
            return _error(404, f"There is no host {name} here.")
        if host.get("behaviour") == "slow":
            await asyncio.sleep(host["delay_seconds"])
        if host.get("behaviour") == "unavailable":
            return _error(host["status"], "The site is down for maintenance.")
        if target := host.get("redirects", {}).get(path):
            return web.Response(status=301, headers={"Location": target})
        row = self._pages.get((name, path)) or self._pages.get((name, path.rstrip("/")))
        if row is None:
            return _error(404, "This page does not exist.")
        odd = host.get("pages", {}).get(path, {})
        charset = odd.get("charset", "utf-8")
        content = render_page(row, charset=charset, padding_bytes=odd.get("padding_bytes", 0))
        return web.Response(
            body=content.encode(charset, "xmlcharrefreplace"),
            headers={"Content-Type": f"text/html; charset={odd.get('declared_charset', charset)}"},
        )


def read_hosts(offline_web_dir: str | os.PathLike) -> dict[str, dict]:
    """Host name -> properties, such as its authority. Raises ToolHostError when the table is missing or damaged."""
    path = Path(offline_web_dir) / "sites.json"
    try:
        return dict(json.loads(path.read_text(encoding="utf-8"))["hosts"])
    except FileNotFoundError:
        raise ToolHostError(
            f"{path} does not exist; build the offline web first, or name its directory with --offline_web"
        ) from None
    except (ValueError, KeyError, TypeError) as error:
        raise ToolHostError(f"{path} has no table of hosts ({error!r}); build the offline web again") from None


def _read_pages(path: Path) -> dict[tuple[str, str], dict]:
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except FileNotFoundError:
        raise ToolHostError(f"{path} does not exist; build the offline web first") from None
    pages = {}
    for number, line in enumerate(lines, 1):
        try:
            row = json.loads(line)
            parts = urlsplit(row["url"])
            pages[parts.hostname, unquote(parts.path)] = row
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ToolHostError(
                f"{path} line {number} is not a document ({error!r}); build the offline web again"
            ) from None
    return pages


def _error(status: int, reason: str) -> web.Response:
    body = f"<!doctype html><title>{status}</title><p>{html.escape(reason)}</p>"
    return web.Response(status=status, text=body, content_type="text/html")


def render_page(row: dict, *, charset: str = "utf-8", padding_bytes: int = 0) -> str:
    """Returns a document as an HTML page: navigation, title, a paragraph or heading a line, related links, footer.

    Args:
        row: a row of documents.jsonl.
        charset: declared in the page's head.
        padding_bytes: size of comments that make the page too large to read.
    """
    host = urlsplit(row["url"]).hostname
    element = _UNMARKED.get(host, "main") if row["lang"] == "en" else "main"
    anchors = _Anchors(row["links"])
    title = html.escape(row["title"])
    blocks = []
    for line in row["text"].splitlines():
        if line.startswith("#"):
            if (heading := line.lstrip("#").strip()) != row["title"]:
                blocks.append(f"<h2>{html.escape(heading)}</h2>")
        elif passage := text.passage(line):
            blocks.append(f"<p>{anchors.linked(passage)}</p>")
    related = "".join(
        f'<li><a href="{html.escape(url)}">{html.escape(anchor)}</a></li>' for anchor, url in anchors.unused()
    )
    date = row.get("published_at")
    # The visible text has no date: every passage of the page is one of the document.
    meta = f'<meta name="date" content="{html.escape(date)}">' if date else ""
    body = "\n".join(blocks)
    return (
        f'<!doctype html>\n<html lang="{row["lang"]}"><head><meta '
        f'charset="{charset}"><title>{title}</title>{meta}</head>\n'
        f'<body><header><nav><a href="http://{host}/">{host}</a></nav></header>\n'
        f"<{element}><h1>{title}</h1>\n{body}\n</{element.split()[0]}>\n"
        f"{f'<nav class=related><ul>{related}</ul></nav>' if related else ''}\n"
        f'{_PADDING * (padding_bytes // len(_PADDING))}<footer><small><a href="http://{host}/about">{host}</a></small>'
        "</footer></body></html>\n"
    )


class _Anchors:
    """Places each link at the first occurrence of its anchor; the longest anchor wins."""

    def __init__(self, links: list[dict]):
        self._left: dict[str, str] = {}
        self._extra: list[tuple[str, str]] = []
        for link in links:
            if link["anchor"] in self._left:
                self._extra.append((link["anchor"], link["url"]))
            else:
                self._left[link["anchor"]] = link["url"]
        # \b does not separate Chinese words, so word boundaries are required only beside Latin letters.
        ordered = sorted(self._left, key=len, reverse=True)
        parts = (
            (r"(?<!\w)" if a[0].isascii() else "") + re.escape(a) + (r"(?!\w)" if a[-1].isascii() else "")
            for a in ordered
        )
        self._pattern = re.compile("|".join(parts)) if ordered else None

    def linked(self, passage: str) -> str:
        if self._pattern is None:
            return html.escape(passage, quote=False)
        out, end = [], 0
        for match in self._pattern.finditer(passage):
            url = self._left.pop(match.group(), None)
            if url is not None:
                out.append(html.escape(passage[end : match.start()], quote=False))
                out.append(f'<a href="{html.escape(url)}">{html.escape(match.group(), quote=False)}</a>')
                end = match.end()
        return "".join(out) + html.escape(passage[end:], quote=False)

    def unused(self) -> list[tuple[str, str]]:
        return [*self._left.items(), *self._extra]
