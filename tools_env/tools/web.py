"""`batch_web_surfer`: searches and opens pages in parallel. A failed item fails alone, with its reason as text."""

import asyncio
import dataclasses
import re
import time
from collections.abc import Mapping
from typing import Any
from urllib.parse import urlsplit

from tools_env.cache import retrieval as caching
from tools_env.errors import BadArguments, ToolError
from tools_env.search.backend import LANGUAGES, Filters, Passage, SearchBackend
from tools_env.search.citations import PATTERN, Citations
from tools_env.tools.base import CallContext, Tool, ToolOutput
from tools_env.web import page
from tools_env.web.fetch import Fetcher

MAX_ITEMS = 10
MAX_RESULTS = 10
REPLY_MARGIN = 0.05  # seconds reserved for formatting and sending before a call's deadline
_NO_SCHEME = re.compile(r"[\w-]+(\.[\w-]+)+(/|$)")
_TEXT = {"type": "string", "minLength": 1}
_TOPK = {"type": "integer", "minimum": 1, "maximum": MAX_RESULTS, "description": "passages per query"}
_FILTERED = {
    "type": "object",
    "properties": {
        "query": _TEXT,
        "site": {"type": "string", "description": "example.org"},
        "since": {"type": "string", "description": "2025-03-01"},
        "until": {"type": "string"},
        "language": {"type": "string", "enum": list(LANGUAGES)},
        "topk": {"type": "integer", "minimum": 1, "maximum": MAX_RESULTS},
    },
    "required": ["query"],
}
SCHEMA = {
    "type": "object",
    "properties": {
        "queries": {
            "type": "array",
            "items": {"anyOf": [_TEXT, _FILTERED]},
            "minItems": 1,
            "maxItems": MAX_ITEMS,
            "description": "what to search for, several at once; an object narrows one query",
        },
        "topk": _TOPK,
        "urls": {
            "type": "array",
            "items": _TEXT,
            "minItems": 1,
            "maxItems": MAX_ITEMS,
            "description": "pages to open: addresses, or citation ids already shown",
        },
    },
}


@dataclasses.dataclass
class _Item:
    text: str
    sources: list[Passage]
    failed: bool
    cache_hit: bool


@dataclasses.dataclass(frozen=True)
class WebSurfer:
    """The tool `batch_web_surfer`.

    Attributes:
      backend: answers queries.
      citations: assigns ids to opened passages.
      fetcher: opens pages.
      cache: shared by all sessions; holds search results and parsed pages.
      authority: host name to authority of its pages; other hosts have 0.
      topk: passages per query unless a call names a number.
    """

    backend: SearchBackend
    citations: Citations
    fetcher: Fetcher
    cache: caching.RetrievalCache
    authority: Mapping[str, int]
    topk: int

    def tool(self) -> Tool:
        return Tool(
            name="batch_web_surfer",
            description=(
                "Search the web (queries) or open pages (urls, or citation ids already shown), several at once."
            ),
            schema=SCHEMA,
            run=self.run,
        )

    async def run(self, call: CallContext, arguments: dict[str, Any]) -> ToolOutput:
        queries, urls = arguments.get("queries", []), arguments.get("urls", [])
        if not queries and not urls:
            raise BadArguments("queries or urls is missing")
        asked = [_asked(query, arguments.get("topk", self.topk)) for query in queries]
        items = await asyncio.gather(
            *(self._search(call, *one, headed=len(queries) + len(urls) > 1) for one in asked),
            *(self._open_page(call, url) for url in urls),
        )
        return ToolOutput(
            text="\n".join(item.text for item in items),
            blocks=[item.text for item in items],
            sources=list({source.id: source for item in items for source in item.sources}.values()),
            failed=all(item.failed for item in items),
            cache_hit=all(item.cache_hit for item in items),
        )

    async def _search(self, call: CallContext, query: str, k: int, filters: Filters, headed: bool) -> _Item:
        async def found() -> list[dict[str, Any]]:
            seconds = call.seconds_left() - REPLY_MARGIN
            return [vars(passage) for passage in await self.backend.search(query, k, filters, seconds)]

        narrowed = {name: value for name, value in vars(filters).items() if value}
        address = caching.cache_key("search", self.backend.fingerprint, [query, k, narrowed])
        told = "".join(f" {name}:{value}" for name, value in narrowed.items())
        head = [f"query: {query}{told}"] if headed else []
        try:
            rows, hit = await self.cache.get(address, found)
        except ToolError as error:
            return _Item("\n".join([*head, str(error)]), [], True, False)
        shown = [Passage(**row) for row in rows]
        lines = head
        for rank, passage in enumerate(shown, 1):
            lines.append(f"{rank}. {_head(passage.title, urlsplit(passage.url).hostname or '', passage.published_at)}")
            lines.append(_cited(passage))
        return _Item("\n".join(lines if shown else [*head, "No results."]), shown, False, hit)

    async def _open_page(self, call: CallContext, wanted: str) -> _Item:
        try:
            url = _address(call, wanted)
            async with asyncio.timeout(max(call.deadline - REPLY_MARGIN - time.monotonic(), 0.0)):
                address = caching.cache_key("open", page.VERSION + self.backend.fingerprint, url)
                content, hit = await self.cache.get(address, lambda: self._read(url))
        except ToolError as error:
            return _Item(f"{wanted}: {error}", [], True, False)
        except TimeoutError:
            return _Item(f"{wanted}: timed out", [], True, False)
        host = urlsplit(content["url"]).hostname or ""
        sources = [
            Passage(
                id=self.citations.id(content["url"], passage),
                url=content["url"],
                title=content["title"],
                text=passage,
                authority=self.authority.get(host, 0),
                published_at=content["published_at"],
            )
            for passage in content["passages"]
        ]
        lines = [_head(content["title"], content["url"], content["published_at"]), *map(_cited, sources)]
        return _Item("\n".join(lines if sources else [*lines, "No text."]), sources, False, hit)

    async def _read(self, url: str) -> dict[str, Any]:
        fetched = await self.fetcher.fetch(url)
        content = await asyncio.to_thread(page.extract_page, fetched)
        return {"url": fetched.url, **dataclasses.asdict(content)}


def _asked(query: str | dict[str, Any], topk: int) -> tuple[str, int, Filters]:
    if isinstance(query, str):
        return query, topk, Filters()
    narrowed = dict(query)
    return narrowed.pop("query"), narrowed.pop("topk", topk), Filters(**narrowed)


def _address(call: CallContext, wanted: str) -> str:
    wanted = wanted.strip()
    if PATTERN.fullmatch(wanted):
        if wanted not in call.known:
            raise ToolError("not a citation shown in this session")
        return call.known[wanted].url
    if _NO_SCHEME.match(wanted):
        return f"http://{wanted}"
    return wanted


def _head(title: str, place: str, published_at: str | None) -> str:
    return " | ".join(filter(None, [title, place, published_at]))


def _cited(passage: Passage) -> str:
    return f"{passage.text} \\cite{{{passage.id}}}"
