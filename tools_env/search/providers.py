"""Live web search through a provider's HTTP interface: SearXNG, or Serper and compatible ones.

The provider's order is kept: snippets have no relevance score, so authority could lift a clearly less relevant one.
Authority is only shown with the source. Filters that a provider does not support are applied to its results.
"""

import datetime
from collections.abc import Mapping
from typing import Any
from urllib.parse import urlsplit

from tools_env.errors import Unavailable
from tools_env.offline_web.folder import detect_language
from tools_env.search import text
from tools_env.search.backend import Filters, Passage
from tools_env.search.citations import Citations
from tools_env.search.remote import Remote

_MAX_TEXT = 600  # characters of a snippet


class WebBackend:
    """One provider. `kind` is "searxng" (GET /search?format=json) or "serper" (POST /search with an X-API-KEY)."""

    def __init__(self, remote: Remote, kind: str, authority: Mapping[str, int], citations: Citations):
        self._remote, self._kind, self._authority, self._citations = remote, kind, authority, citations
        self.fingerprint = f"{kind} {remote.url}"

    async def search(self, query: str, topk: int, filters: Filters, seconds: float) -> list[Passage]:
        asked = f"{query} site:{filters.host}" if filters.site else query
        rows = await (self._searxng if self._kind == "searxng" else self._serper)(asked, filters, topk, seconds)
        found: dict[str, Passage] = {}
        for url, title, snippet, date in rows:
            snippet = text.passage(" ".join(snippet.split()))[:_MAX_TEXT]
            host = urlsplit(url).hostname
            if not snippet or not host or not url.startswith(("http://", "https://")):
                continue
            if not filters.accept(url, date, detect_language(f"{title} {snippet}")):
                continue
            passage = Passage(
                id=self._citations.id(url, snippet),
                url=url,
                title=" ".join(title.split())[:120],
                text=snippet,
                authority=self._authority.get(host, 0),
                published_at=date,
            )
            found.setdefault(snippet, passage)
        return list(found.values())[:topk]

    async def _searxng(self, asked: str, filters: Filters, topk: int, seconds: float) -> list[tuple]:
        params = {"q": asked, "format": "json", "safesearch": "1"}
        if filters.language:
            params["language"] = filters.language
        reply = await self._remote.get("/search", seconds, params=params)
        return _rows(reply, "results", "url", "content", "publishedDate")

    async def _serper(self, asked: str, filters: Filters, topk: int, seconds: float) -> list[tuple]:
        body: dict[str, Any] = {"q": asked, "num": max(10, topk)}
        if filters.language:
            body["hl"] = {"en": "en", "zh": "zh-cn"}[filters.language]
        if filters.since or filters.until:
            spans = [
                f"cd_{name}:{_american(day)}" for name, day in (("min", filters.since), ("max", filters.until)) if day
            ]
            body["tbs"] = ",".join(["cdr:1", *spans])
        reply = await self._remote.post("/search", seconds, json=body)
        return _rows(reply, "organic", "link", "snippet", "date")

    async def close(self) -> None:
        await self._remote.close()


def _rows(reply: dict[str, Any], results: str, url: str, snippet: str, date: str) -> list[tuple]:
    try:
        return [
            (str(row[url]), str(row.get("title") or ""), str(row.get(snippet) or ""), _iso(row.get(date)))
            for row in reply[results]
        ]
    except (KeyError, TypeError, AttributeError):
        raise Unavailable("the search provider gave another reply than documented") from None


def _iso(date: object) -> str | None:
    """Returns the ISO date of 2025-03-01T00:00:00 or of Mar 1, 2025; None for other forms, such as "3 days ago"."""
    value = str(date or "").strip()
    for form, length in (("%Y-%m-%d", 10), ("%b %d, %Y", 12), ("%d %b %Y", 11)):
        try:
            return datetime.datetime.strptime(value[:length], form).date().isoformat()
        except ValueError:
            continue
    return None


def _american(day: str) -> str:
    date = datetime.date.fromisoformat(day)
    return f"{date.month}/{date.day}/{date.year}"
