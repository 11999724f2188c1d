"""Host-side bookkeeping of the sampler: sessions, the requests in them, and which session owns which cache slot.

Nothing here touches the device or decides what runs next; `scheduler` does.
"""

import asyncio
import dataclasses
from typing import Any

FREE = None


@dataclasses.dataclass
class Request:
    """One `generate` call in progress."""

    temperature: float
    seed: int
    limit: int  # tokens it may sample
    full: bool  # the limit is the end of the cache, not the caller's wish
    future: asyncio.Future
    ids: list[int] = dataclasses.field(default_factory=list)
    logprobs: list[float] = dataclasses.field(default_factory=list)


@dataclasses.dataclass(eq=False)
class Session:
    """One sequence. `ids` are all known tokens; the K/V of the first `written` of them exist, in a slot or on the host.

    A session that waits for an observation stays in its slot (parked). When its slot is needed it is moved to the host
    (`stored`) or, with no room there, forgotten: then written = 0 and all ids are prefilled again.
    """

    name: str
    ids: list[int] = dataclasses.field(default_factory=list)
    written: int = 0
    furthest: int = 0  # the largest `written` has been; prefill below it is repeated work
    slot: int | None = None
    stored: Any = None
    request: Request | None = None
    busy: bool = False  # a request was made and has not ended; set before the request itself arrives
    closed: bool = False
    used: int = 0  # scheduler tick of the last use

    @property
    def unwritten(self) -> int:
        """Tokens that prefill must write before decoding can start: all known ones but the last."""
        return len(self.ids) - 1 - self.written


class Slots:
    """Which session owns which slot. The lowest free slot is taken first."""

    def __init__(self, count: int):
        self.owner: list[Session | None] = [FREE] * count

    def take(self, session: Session) -> bool:
        """Gives the session the lowest free slot; False when there is none."""
        for slot, owner in enumerate(self.owner):
            if owner is FREE:
                self.owner[slot], session.slot = session, slot
                return True
        return False

    def release(self, session: Session) -> None:
        if session.slot is not None:
            self.owner[session.slot] = FREE
            session.slot = None

    def parked(self) -> list[Session]:
        """Sessions that own a slot and wait for their next request, least recently used first."""
        idle = [session for session in self.owner if session is not FREE and session.request is None]
        return sorted(idle, key=lambda session: session.used)

    def with_request(self) -> list[Session]:
        return [session for session in self.owner if session is not FREE and session.request is not None]
