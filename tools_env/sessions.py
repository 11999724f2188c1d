"""Sessions: one episode's workspace, budget, lease, and the replies it already has.

A session lives on one host. Losing the host loses the session: calls then answer NOT_FOUND and the episode is masked.
"""

import dataclasses
import secrets
import shutil
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

from tools_env.errors import CallIdReused, UnknownSession
from tools_env.search.index import Passage
from tools_env.shared_work import SharedWork


@dataclasses.dataclass(frozen=True)
class Budget:
    """Limits of a session; None is no limit."""

    tool_calls: int | None = None
    output_tokens: int | None = None
    wall_seconds: float | None = None


class Session:
    """The state of one episode. `clock` gives seconds and never goes back."""

    def __init__(
        self,
        request_id: str,
        episode_id: str,
        directory: Path,
        budget: Budget,
        seed: int,
        clock: Callable[[], float],
    ):
        self.id = directory.name
        self.request_id = request_id
        self.episode_id = episode_id
        self.directory = directory
        self.budget = budget
        self.seed = seed
        self.known: dict[str, Passage] = {}  # passages shown so far, by citation id
        self.tool_calls = 0
        self.output_tokens = 0
        self._clock = clock
        self._opened = self.last_used = clock()
        self._replies: dict[str, tuple[str, Any]] = {}  # call id -> (what was asked, reply)
        self._running: dict[str, str] = {}  # call id -> what was asked
        self._work = SharedWork()
        (directory / "workspace").mkdir(parents=True)

    @property
    def busy(self) -> bool:
        return len(self._work) > 0

    def remaining(self) -> Budget:
        """Returns what is left of each limit, never below 0."""
        limit = self.budget
        wall = None if limit.wall_seconds is None else limit.wall_seconds - (self._clock() - self._opened)
        return Budget(
            None if limit.tool_calls is None else max(limit.tool_calls - self.tool_calls, 0),
            None if limit.output_tokens is None else max(limit.output_tokens - self.output_tokens, 0),
            None if wall is None else max(wall, 0.0),
        )

    def spent(self) -> str | None:
        """Returns which budget is gone, in words for the model, or None."""
        left = self.remaining()
        if left.tool_calls == 0:
            return f"No tool calls left (limit {self.budget.tool_calls})."
        if left.output_tokens == 0:
            return f"No tool output left (limit {self.budget.output_tokens} tokens)."
        if left.wall_seconds == 0:
            return f"No time left (limit {self.budget.wall_seconds:g} seconds)."
        return None

    async def once(self, call_id: str, asked: str, execute: Callable[[], Awaitable[Any]]) -> Any:
        """Runs `execute` for a new call id; a repeat gets the stored reply, a concurrent one waits for the first.

        A reply is stored; a failure of the host (an exception) is not, so that a retry runs again. When all callers
        have gone, the execution is cancelled. Raises CallIdReused when the id came before with something else asked.
        """
        self.last_used = self._clock()
        before = self._replies.get(call_id, (self._running.get(call_id),))[0]
        if before is not None and before != asked:
            raise CallIdReused(f"call id {call_id!r} was used for another call of this session")
        if call_id in self._replies:
            return self._replies[call_id][1]

        async def run():
            try:
                reply = await execute()
                self._replies[call_id] = (asked, reply)
                return reply
            finally:
                self.last_used = self._clock()
                self._running.pop(call_id, None)

        self._running[call_id] = asked
        return await self._work.run(call_id, run)


class Sessions:
    """All open sessions of a host."""

    def __init__(self, directory: Path, lease: float, clock: Callable[[], float] = time.monotonic):
        self._directory = directory
        self._lease = lease
        self._clock = clock
        self._open: dict[str, Session] = {}
        self._requests: dict[str, str] = {}  # request id -> session id

    def __len__(self) -> int:
        return len(self._open)

    def open(self, request_id: str, episode_id: str, budget: Budget, seed: int) -> Session:
        """Opens a session; a repeated request gets the session it opened."""
        known = self._open.get(self._requests.get(request_id, ""))
        if known is not None:
            return known
        name = f"session_{secrets.token_hex(8)}"
        session = Session(request_id, episode_id, self._directory / name, budget, seed, self._clock)
        self._open[name] = session
        if request_id:
            self._requests[request_id] = name
        return session

    def get(self, session_id: str) -> Session:
        """Raises UnknownSession."""
        try:
            return self._open[session_id]
        except KeyError:
            raise UnknownSession(
                f"session {session_id!r} is not open here: it was closed, its lease of {self._lease:g} s ended, "
                "or the host restarted"
            ) from None

    def close(self, session_id: str) -> Session | None:
        """Removes a session and its files; None when it is not open."""
        session = self._open.pop(session_id, None)
        if session is not None:
            self._requests.pop(session.request_id, None)
            shutil.rmtree(session.directory, ignore_errors=True)
        return session

    def reap(self) -> list[str]:
        """Removes idle sessions whose lease has ended; returns their ids."""
        now = self._clock()
        ended = [s.id for s in self._open.values() if not s.busy and now - s.last_used > self._lease]
        for session_id in ended:
            self.close(session_id)
        return ended
