"""Host-side bookkeeping of the sampler: sessions, the requests in them, and which session owns which pages.

Nothing here touches the device or decides what runs next; `scheduler` does.
"""

import asyncio
import dataclasses
import heapq
from typing import Any


@dataclasses.dataclass
class Request:
    """One `generate` call in progress."""

    temperature: float
    seed: int
    limit: int  # tokens it may sample
    full: bool  # the limit is the longest sequence, not the caller's wish
    future: asyncio.Future
    ids: list[int] = dataclasses.field(default_factory=list)
    logprobs: list[float] = dataclasses.field(default_factory=list)
    version: int = 0  # of the weights that sampled the first id


@dataclasses.dataclass(eq=False)
class Session:
    """One sequence. `ids` are all known tokens; the K/V of the first `written` of them exist, in pages or on the host.

    A session that waits for an observation keeps its pages (parked). When they are needed it is moved to the host
    (`stored`) or, with no room there, forgotten: then written = 0 and all ids are prefilled again.
    """

    name: str
    ids: list[int] = dataclasses.field(default_factory=list)
    written: int = 0
    furthest: int = 0  # the largest `written` has been; prefill below it is repeated work
    pages: list[int] = dataclasses.field(default_factory=list)
    version: int = 0  # of the weights that wrote the oldest K/V
    stored: Any = None  # arrays of `programs.read_pages` for the first `stored_pages` pages
    stored_pages: int = 0
    request: Request | None = None
    busy: bool = False  # a request was made and has not ended; set before the request itself arrives
    closed: bool = False
    used: int = 0  # scheduler tick of the last use

    @property
    def active(self) -> Request:
        """The request of a session that has one."""
        assert self.request is not None
        return self.request

    @property
    def unwritten(self) -> int:
        """Tokens that prefill must write before decoding can start: all known ones but the last."""
        return len(self.ids) - 1 - self.written


class PageAllocator:
    """Which pages are free. The lowest is taken first, so equal histories give equal tables.

    `peak` is the largest number that were in use at once.
    """

    def __init__(self, num_pages: int, page_size: int):
        self.num_pages, self.page_size = num_pages, page_size
        self._free = list(range(num_pages))
        self.peak = 0

    @property
    def free(self) -> int:
        return len(self._free)

    def lacking(self, session: Session, tokens: int) -> int:
        """Pages that the session needs beyond its own to hold so many tokens."""
        return max(-(-tokens // self.page_size) - len(session.pages), 0)

    def grow(self, session: Session, tokens: int) -> bool:
        """Gives the session pages for so many tokens; False, and nothing, when there are not enough."""
        wanted = self.lacking(session, tokens)
        if wanted > len(self._free):
            return False
        session.pages += [heapq.heappop(self._free) for _ in range(wanted)]
        self.peak = max(self.peak, self.num_pages - self.free)
        return True

    def release(self, session: Session) -> None:
        for page in session.pages:
            heapq.heappush(self._free, page)
        session.pages = []
