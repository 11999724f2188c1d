"""One pool of pages and what runs on it next: admit waiting sessions, prefill their new tokens, decode, hand results
back.

`Pool.step` is a plain synchronous function that runs in the pool's own thread; requests reach it (`collect`), and
results leave it, on the event loop's thread between steps. So there is no lock, and tool calls proceed meanwhile.

What a sequence samples does not depend on when or beside whom it runs: chunks are cut from the session's own token
count, rows are independent, and a session that loses its pages gets their content back bit for bit from the host. One
that is prefilled again, for want of host memory, gets it back up to rounding.
"""

import dataclasses
import time

import jax
import numpy as np

from stepdr_jax.engine import programs
from stepdr_jax.engine.pages import PageAllocator, Request, Session


@dataclasses.dataclass
class Counts:
    """What a pool has done; all totals since it was made."""

    sampled_tokens: int = 0
    prefilled_tokens: int = 0
    replayed_tokens: int = 0  # prefilled a second time, after a weight update or for want of host memory
    stale_tokens: int = 0  # sampled over K/V of older weights, after update_weights(mode="keep")
    decode_calls: int = 0
    prefill_calls: int = 0
    evictions: int = 0  # sessions that lost their pages while they waited for their next request
    preemptions: int = 0  # sessions that lost them in the middle of one
    busy_seconds: float = 0.0


class Pool:
    """A pool of pages, the sessions that want to be in it, and the programs on it.

    Args:
        layout: of the pool; it holds at least one sequence of max_len.
        max_num_seqs: sequences decoded together.
        max_len: tokens of a sequence.
        prefill_batch, prefill_chunk: sequences and tokens of one prefill call.
        decode_steps: tokens of one decode call; a finished sequence waits for at most so many.
        prefill_calls: before each decode call at most so many, so that a long observation does not hold up the others;
            0 prefills all there is.
        stop_ids: ids that end a generation.
        host_bytes: K/V of evicted sessions kept on the host; beyond it they are prefilled again.
        device: where the pool lives when the layout has no mesh.
    """

    def __init__(
        self,
        layout: programs.Layout,
        *,
        max_num_seqs: int,
        max_len: int,
        prefill_batch: int,
        prefill_chunk: int,
        decode_steps: int,
        prefill_calls: int,
        stop_ids: tuple[int, ...],
        host_bytes: int,
        device: jax.Device,
    ):
        self.layout, self.max_num_seqs, self.max_len, self.device = layout, max_num_seqs, max_len, device
        self.prefill_batch, self.prefill_chunk = min(prefill_batch, max_num_seqs), prefill_chunk
        self.decode_steps, self.prefill_calls = decode_steps, prefill_calls
        self.stop_ids = np.asarray(stop_ids, np.int32)
        self.stops = frozenset(stop_ids)
        self.allocator = PageAllocator(layout.num_pages, layout.page_size)
        self.allocate()
        page_bytes = sum(leaf.nbytes for leaf in jax.tree.leaves(self.kv_pages)) // layout.num_pages
        self.host_pages = host_bytes // page_bytes
        self.inbox: list[tuple[Session, list[int], Request]] = []
        self.sessions: list[Session] = []  # all that hold pages, here or on the host
        self.waiting: list[Session] = []  # with a request that does not run yet, first come first served
        self.running: list[Session] = []  # with one that does, in the order of admission
        self.outdated = False  # the weights have changed since the last step
        self.counts = Counts()
        self.tick = 0

    def allocate(self) -> None:
        """Starts with empty pages."""
        self.kv_pages: list | None = programs.init_pool(self.layout, self.device)

    def sleep(self) -> None:
        """Gives the pages' memory back and forgets all K/V. Only while nothing runs."""
        self.forget()
        self.kv_pages = None

    def wake(self) -> None:
        """Has pages again after `sleep`; they are empty."""
        if self.kv_pages is None:
            self.allocate()

    def submit(self, session: Session, new_ids: list[int], request: Request) -> None:
        """Hands in a request; it takes effect at the next `collect`, because a step may be running now."""
        self.inbox.append((session, new_ids, request))

    def collect(self) -> None:
        """Takes in what was submitted. Only between steps."""
        if self.outdated:
            self.forget()
        for session, new_ids, request in self.inbox:
            if session.closed:
                request.future.cancel()
            if request.future.cancelled():
                session.busy = False
                continue
            session.ids += new_ids
            session.request = request
            self.waiting.append(session)
        self.inbox.clear()

    def drop(self, session: Session) -> None:
        """Forgets a session and frees what it holds. Only between steps."""
        self.allocator.release(session)
        if session.request is not None:
            session.request.future.cancel()
        session.stored, session.stored_pages, session.request = None, 0, None
        self.sessions, self.waiting, self.running = (
            [other for other in held if other is not session] for held in (self.sessions, self.waiting, self.running)
        )

    def has_work(self) -> bool:
        return bool(self.inbox or self.waiting or self.running)

    def forget(self) -> None:
        """Invalidates all K/V, because the weights changed; running requests go on after prefilling again."""
        self.outdated = False
        for session in {*self.sessions, *self.waiting}:
            session.written, session.stored, session.stored_pages = 0, None, 0

    def step(self, weights: dict, version: int) -> list[Session]:
        """Admits, prefills, decodes once. Returns sessions whose request ended."""
        began = time.monotonic()
        self.tick += 1
        self._admit()
        calls = 0
        while pending := [session for session in self.running if session.unwritten > 0]:
            if self.prefill_calls and calls == self.prefill_calls:
                break
            self._prefill(weights, pending[: self.prefill_batch], version)
            calls += 1
        ready = self._with_room([session for session in self.running if session.unwritten == 0])
        ended = self._decode(weights, ready, version) if ready else []
        self.counts.busy_seconds += time.monotonic() - began
        return ended

    # ------------------------------------------------------------------------------------------------------ pages

    def _admit(self) -> None:
        while self.waiting and len(self.running) < self.max_num_seqs:
            session = self.waiting[0]
            if not self._make_room(session, self._tokens_after(session)):
                return
            self.running.append(self.waiting.pop(0))
            if session not in self.sessions:
                self.sessions.append(session)
            if session.stored is not None:
                self._restore(session)

    def _tokens_after(self, session: Session) -> int:
        """Tokens of the session after the next decode call."""
        request = session.active
        return len(session.ids) + min(self.decode_steps, request.limit - len(request.ids))

    def _make_room(self, session: Session, tokens: int) -> bool:
        """Gives the session its pages, those of sessions that do not run if need be: parked before waiting ones."""
        idle = [s for s in self.sessions if s.pages and s is not session and s not in self.running]
        idle.sort(key=lambda s: (s.request is not None, s.used, s.name))
        if self.allocator.lacking(session, tokens) > self.allocator.free + sum(len(s.pages) for s in idle):
            return False
        while not self.allocator.grow(session, tokens):
            self._evict(idle.pop(0))
            self.counts.evictions += 1
        return True

    def _with_room(self, ready: list[Session]) -> list[Session]:
        """The sessions that have pages for the next decode call; the least advanced give way to the others."""
        for session in list(ready):
            while session in ready and not self._make_room(session, self._tokens_after(session)):
                # The others' pages, prefilling ones included: one sequence alone has room by construction.
                victim = min((s for s in self.running if s is not session), key=lambda s: len(s.active.ids))
                self._evict(victim)
                self.counts.preemptions += 1
                self.running.remove(victim)
                self.waiting.insert(0, victim)
                ready = [s for s in ready if s is not victim]
        return ready

    def _evict(self, session: Session) -> None:
        """Takes a session's pages away; their content goes to the host where there is room."""
        held = -(-session.written // self.layout.page_size)
        if held and sum(s.stored_pages for s in self.sessions) + held <= self.host_pages:
            whole = jax.device_get(programs.read_pages(self.kv_pages, self._row(session)))
            session.stored = jax.tree.map(lambda a: a[:held].copy(), whole)
            session.stored_pages = held
        else:
            session.written = 0
        self.allocator.release(session)

    def _restore(self, session: Session) -> None:
        missing = self.layout.columns - session.stored_pages

        def padded(a):
            return np.pad(a, ((0, missing), *((0, 0),) * (a.ndim - 1)))

        row_M = self._row(session)
        row_M[session.stored_pages :] = self.layout.num_pages
        self.kv_pages = programs.write_pages(self.kv_pages, row_M, jax.tree.map(padded, session.stored))
        session.stored, session.stored_pages = None, 0

    def _row(self, session: Session) -> np.ndarray:
        row_M = np.zeros(self.layout.columns, np.int32)
        row_M[: len(session.pages)] = session.pages
        return row_M

    # --------------------------------------------------------------------------------------------------- programs

    def _prefill(self, weights: dict, sessions: list[Session], version: int) -> None:
        """Writes one chunk of each session. Chunks start where the session's K/V end, whatever the others need."""
        R, C = self.prefill_batch, self.prefill_chunk
        table_RM = np.zeros((R, self.layout.columns), np.int32)
        tokens_RC = np.zeros((R, C), np.int32)
        start_R, count_R = np.zeros(R, np.int32), np.zeros(R, np.int32)
        for row, session in enumerate(sessions):
            count = min(session.unwritten, C)
            table_RM[row] = self._row(session)
            tokens_RC[row, :count] = session.ids[session.written : session.written + count]
            start_R[row], count_R[row] = session.written, count
            if not session.written:
                session.version = version
            session.written += count
            self.counts.replayed_tokens += max(min(session.written, session.furthest) - int(start_R[row]), 0)
            session.furthest = max(session.furthest, session.written)
            self.counts.prefilled_tokens += count
        self.kv_pages = programs.prefill(
            weights, self.kv_pages, table_RM, tokens_RC, start_R, count_R, layout=self.layout
        )
        self.counts.prefill_calls += 1

    def _decode(self, weights: dict, sessions: list[Session], version: int) -> list[Session]:
        B = self.max_num_seqs
        table_BM = np.zeros((B, self.layout.columns), np.int32)
        state = dict(
            token=np.zeros(B, np.int32),
            position=np.zeros(B, np.int32),
            remaining=np.zeros(B, np.int32),
            seed=np.zeros(B, np.uint32),
            temperature=np.ones(B, np.float32),
        )
        rows = {}
        for place, session in enumerate(sessions):
            row = session.pages[0] if self.layout.columns == 1 else place
            request, rows[session] = session.active, row
            table_BM[row] = self._row(session)
            state["token"][row] = session.ids[-1]
            state["position"][row] = len(session.ids) - 1
            state["remaining"][row] = request.limit - len(request.ids)
            state["seed"][row] = request.seed & 0xFFFFFFFF
            state["temperature"][row] = request.temperature
        self.kv_pages, ids_Bs, logprobs_Bs = programs.decode(
            weights, self.kv_pages, table_BM, state, self.stop_ids, layout=self.layout, decode_steps=self.decode_steps
        )
        ids_Bs, logprobs_Bs = np.asarray(ids_Bs), np.asarray(logprobs_Bs)
        self.counts.decode_calls += 1
        ended = []
        for session, row in rows.items():
            request = session.active
            count = int(np.sum(ids_Bs[row] >= 0))
            ids = ids_Bs[row, :count].tolist()
            if not request.ids:
                request.version = version
            if not session.written:  # a sequence of one token: nothing was prefilled
                session.version = version
            request.ids += ids
            request.logprobs += logprobs_Bs[row, :count].tolist()
            session.ids += ids
            session.written = session.furthest = len(session.ids) - 1
            session.used = self.tick
            self.counts.sampled_tokens += count
            self.counts.stale_tokens += count * (session.version != version)
            if ids[-1] in self.stops or len(request.ids) >= request.limit:
                ended.append(session)
        self.running = [session for session in self.running if session not in ended]
        return ended
