"""Interface of search backends: from a query and filters to passages, best first."""

import dataclasses
import datetime
import functools
from typing import Protocol
from urllib.parse import urlsplit

from tools_env.errors import BadArguments

LANGUAGES = ("en", "zh")


@dataclasses.dataclass(frozen=True)
class Passage:
    """One passage of one page. `authority`: 0 unknown or unreliable, 1 ordinary, 2 authoritative."""

    id: str  # citation id
    url: str
    title: str
    text: str
    authority: int
    published_at: str | None  # ISO date


@dataclasses.dataclass(frozen=True)
class Filters:
    """Filters of a query. A page without a date never matches a date filter."""

    site: str = ""  # a host with its subdomains: wikipedia.org also matches en.wikipedia.org
    since: str = ""  # ISO date, inclusive
    until: str = ""
    language: str = ""  # one of LANGUAGES

    def __post_init__(self):
        """Raises BadArguments with a message for the model."""
        for name in ("since", "until"):
            try:
                if value := getattr(self, name):
                    datetime.date.fromisoformat(value)
            except ValueError:
                raise BadArguments(f"{name} must be a date as 2025-03-01, got {value[:40]}") from None
        if self.site and not host_of(self.site):
            raise BadArguments(f"site must be a host as example.org, got {self.site[:40]}")

    @property
    def host(self) -> str:
        return host_of(self.site)

    def accept(self, url: str, published_at: str | None, language: str) -> bool:
        """Returns whether a passage with these properties may be shown."""
        host = urlsplit(url).hostname or ""
        day = day_number(published_at)
        return (
            (not self.site or f".{host}".endswith(f".{self.host}"))
            and (not self.since or day >= day_number(self.since))
            and (not self.until or 0 < day <= day_number(self.until))
            and (not self.language or language == self.language)
        )


def host_of(site: str) -> str:
    """Returns the host of `example.org`, `www.example.org/` or a whole address, "" for none."""
    try:
        found = urlsplit(site if "//" in site else f"//{site}").hostname or ""
    except ValueError:
        return ""
    return "" if " " in found else found


@functools.lru_cache(maxsize=1 << 12)
def day_number(date: str | None) -> int:
    """Returns 20250301 for 2025-03-01, 20250000 for 2025, 0 for an invalid date; the numbers sort like the dates."""
    parts = (date or "")[:10].split("-")
    if not parts[0].isdecimal():
        return 0
    year, month, day = [int(part) if part.isdecimal() else 0 for part in (*parts, "0", "0")[:3]]
    return year * 10_000 + month * 100 + day


class SearchBackend(Protocol):
    """A search backend. Equal queries give equal results while `fingerprint` is unchanged."""

    fingerprint: str  # part of the cache key

    async def search(self, query: str, topk: int, filters: Filters, seconds: float) -> list[Passage]:
        """Returns at most `topk` passages, best first.

        Args:
          seconds: the time that the caller has left; the backend's own limit may be shorter.

        Raises:
          ToolError: the provider rejects this query; the model reads the reason.
          Unavailable: the provider does not answer as documented; the call may be repeated.
        """
        ...

    async def close(self) -> None: ...
