"""Sessions: one episode's workspace, budget, lease and stored replies.

A session lives in one process. A host with a state directory writes a journal for each session, from which a restarted
process restores it. Without one, the session is lost with its process: calls then answer NOT_FOUND and the episode is
masked.
"""

import base64
import collections
import dataclasses
import hashlib
import logging
import secrets
import shutil
import time
from collections.abc import Awaitable, Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from tools_env.cache.shared_work import SharedWork
from tools_env.errors import CallIdReused, CallUnfinished, UnknownSession
from tools_env.search.backend import Passage
from tools_env.service.journal import SessionJournal

logger = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class Budget:
    """Limits of a session; None means no limit."""

    tool_calls: int | None = None
    output_tokens: int | None = None
    wall_seconds: float | None = None
    calls_per_tool: Mapping[str, int] = dataclasses.field(
        default_factory=dict
    )  # other tools have no limit of their own


NO_LIMIT = Budget()


@dataclasses.dataclass(frozen=True)
class SessionSpec:
    """The parameters of OpenSession."""

    request_id: str
    episode_id: str
    budget: Budget
    seed: int = 0
    faults_json: str = ""
    cache_mode: str = ""


class Session:
    """The state of one episode. `clock` returns monotonic seconds."""

    def __init__(
        self,
        spec: SessionSpec,
        directory: Path,
        clock: Callable[[], float],
        journal: SessionJournal | None,
        age: float = 0.0,
    ):
        """`age`: seconds since the session was opened, for a restored one."""
        self.id = directory.name
        self.spec = spec
        self.directory = directory
        self.budget = spec.budget
        self.known: dict[str, Passage] = {}  # passages shown so far, by citation id
        self.calls = collections.Counter()  # counted calls by tool
        self.output_tokens = 0
        self.attachments: dict[str, Any] = {}  # values that the service derives from the spec
        self._clock = clock
        self._journal = journal
        self.last_used = clock()
        self._opened = self.last_used - age
        self._replies: dict[str, tuple[str, bytes]] = {}  # call id -> (digest of the request, reply)
        self._begun: dict[str, str] = {}  # call id -> digest: calls with side effects and without a reply
        self._running: dict[str, str] = {}  # call id -> digest
        self._work = SharedWork()
        (directory / "workspace").mkdir(parents=True, exist_ok=True)

    @property
    def busy(self) -> bool:
        return len(self._work) > 0

    @property
    def tool_calls(self) -> int:
        return self.calls.total()

    def remaining(self) -> Budget:
        """Returns what is left of each limit, never below 0."""
        limit = self.budget
        wall = None if limit.wall_seconds is None else limit.wall_seconds - (self._clock() - self._opened)
        return Budget(
            None if limit.tool_calls is None else max(limit.tool_calls - self.tool_calls, 0),
            None if limit.output_tokens is None else max(limit.output_tokens - self.output_tokens, 0),
            None if wall is None else max(wall, 0.0),
            {tool: max(calls - self.calls[tool], 0) for tool, calls in limit.calls_per_tool.items()},
        )

    def spent(self, tool: str) -> str | None:
        """Returns a message for the model when a budget for a call of `tool` is exhausted, else None."""
        if self.budget == NO_LIMIT:
            return None
        left = self.remaining()
        if left.tool_calls == 0:
            return f"No tool calls left (limit {self.budget.tool_calls})."
        if left.calls_per_tool.get(tool) == 0:
            return f"No calls of {tool} left (limit {self.budget.calls_per_tool[tool]})."
        if left.output_tokens == 0:
            return f"No tool output left (limit {self.budget.output_tokens} tokens)."
        if left.wall_seconds == 0:
            return f"No time left (limit {self.budget.wall_seconds:g} seconds)."
        return None

    def begin(self, call_id: str) -> None:
        """Records that a call with side effects starts; without a reply it will not run again."""
        self._begun[call_id] = self._running[call_id]
        self._write({"begun": call_id, "asked": self._running[call_id]})

    def withdraw(self, call_id: str) -> None:
        """Reverts `begin`: the call was refused before it had any effect, and a repeat may run."""
        if self._begun.pop(call_id, None) is not None:
            self._write({"withdrawn": call_id})

    def runs(self, call_id: str) -> bool:
        return call_id in self._running

    async def once(
        self, call_id: str, asked: str, execute: Callable[[], Awaitable[bytes]], *, alone: bool = False
    ) -> bytes:
        """Runs `execute` for a new call id; a repeat gets the stored reply, a concurrent one waits for the first.

        A reply is stored; a failure of the host (an exception) is not, so that a retry runs again, unless `begin` was
        called. When all callers have gone, the execution is cancelled. `alone`: `execute` never waits, so no other
        caller can join it and it needs no task.

        Raises CallIdReused when the id was used for another request, and CallUnfinished.
        """
        self.last_used = self._clock()
        digest = hashlib.sha256(asked.encode(errors="replace")).hexdigest()
        known = self._replies.get(call_id)
        before = known[0] if known else self._running.get(call_id, self._begun.get(call_id))
        if before is not None and before != digest:
            raise CallIdReused(f"call id {call_id!r} was used for another call of this session")
        if known:
            return known[1]
        if call_id in self._begun and call_id not in self._running:
            raise CallUnfinished(
                f"call {call_id!r} began and was cut off; it may have had effects, so it is not run again"
            )

        async def run():
            try:
                reply = await execute()
                self._replies[call_id] = (digest, reply)
                self._begun.pop(call_id, None)
                return reply
            finally:
                self.last_used = self._clock()
                self._running.pop(call_id, None)

        self._running[call_id] = digest
        return await (run() if alone else self._work.run(call_id, run))

    def finish(self, call_id: str, tool: str, tokens: int, sources: Iterable[Passage], reply: bytes) -> None:
        """Records a finished call before its reply is sent: its cost, new passages and reply."""
        new = [source for source in sources if source.id not in self.known]
        self.known.update((source.id, source) for source in new)
        self.output_tokens += tokens
        if self._journal is not None:
            record = {"done": call_id, "asked": self._running[call_id], "tool": tool, "tokens": tokens}
            record["known"] = [dataclasses.asdict(source) for source in new]
            self._write(record | {"reply": base64.b64encode(reply).decode()})

    def _write(self, record: dict[str, Any]) -> None:
        if self._journal is not None:
            self._journal.append(record)

    def restore(self, records: Iterable[dict[str, Any]]) -> None:
        """Restores the state from the journal's records."""
        for record in records:
            if "begun" in record:
                self._begun[record["begun"]] = record["asked"]
                continue
            if "withdrawn" in record:
                self._begun.pop(record["withdrawn"], None)
                continue
            self._begun.pop(record["done"], None)
            self._replies[record["done"]] = (record["asked"], base64.b64decode(record["reply"]))
            self.calls[record["tool"]] += 1
            self.output_tokens += record["tokens"]
            self.known.update((row["id"], Passage(**row)) for row in record["known"])


class Sessions:
    """All open sessions of one process."""

    def __init__(
        self,
        directory: Path,
        lease: float,
        clock: Callable[[], float] = time.monotonic,
        *,
        durable: bool = False,
        worker: int = 0,
        workers: int = 1,
    ):
        """If `durable`, restores the sessions that an earlier process with this number left in `directory`."""
        self._directory = directory
        self._lease = lease
        self._clock = clock
        self._durable = durable
        self._worker = worker
        self._open: dict[str, Session] = {}
        self._requests: dict[str, str] = {}  # request id -> session id
        if durable and directory.is_dir():
            for folder in directory.iterdir():
                if owning_worker(folder.name, workers) == worker:
                    self._restore(folder)

    def __len__(self) -> int:
        return len(self._open)

    def _restore(self, folder: Path) -> None:
        journal = SessionJournal(folder)
        try:
            if journal.age(time.time()) > self._lease:
                raise ValueError("its lease has ended")
            first, *records = journal.read()
            spec = SessionSpec(**(first["open"] | {"budget": Budget(**first["open"]["budget"])}))
            session = Session(spec, folder, self._clock, journal, age=max(time.time() - first["at"], 0.0))
            session.restore(records)
        except (OSError, ValueError, KeyError, TypeError) as error:
            logger.info("session %s is not restored: %s", folder.name, error)
            shutil.rmtree(folder, ignore_errors=True)
            return
        self._add(session)

    def _add(self, session: Session) -> None:
        self._open[session.id] = session
        if session.spec.request_id:
            self._requests[session.spec.request_id] = session.id

    def open(self, spec: SessionSpec) -> Session:
        """Opens a session; a repeated request gets the session it opened."""
        known = self._open.get(self._requests.get(spec.request_id, ""))
        if known is not None:
            return known
        directory = self._directory / f"session_{self._worker}_{secrets.token_hex(8)}"
        journal = SessionJournal(directory) if self._durable else None
        session = Session(spec, directory, self._clock, journal)
        session._write({"open": dataclasses.asdict(spec), "at": time.time()})
        self._add(session)
        return session

    def get(self, session_id: str) -> Session:
        """Returns an open session. Raises UnknownSession."""
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
            self._requests.pop(session.spec.request_id, None)
            shutil.rmtree(session.directory, ignore_errors=True)
        return session

    def reap(self) -> list[str]:
        """Removes idle sessions whose lease has ended; returns their ids."""
        now = self._clock()
        ended = [s.id for s in self._open.values() if not s.busy and now - s.last_used > self._lease]
        for session_id in ended:
            self.close(session_id)
        return ended


def owning_worker(session_id: str, workers: int) -> int | None:
    """Returns the number of the worker process that has a session, or None for an invalid session id."""
    parts = session_id.split("_")
    if len(parts) != 3 or parts[0] != "session" or not parts[1].isdecimal() or len(parts[1]) > 6:
        return None
    return int(parts[1]) % workers
