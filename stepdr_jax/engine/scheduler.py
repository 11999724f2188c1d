"""One cache and what runs on it next: admit waiting sessions, prefill their new tokens, decode, hand results back.

`Shard.step` is a plain synchronous function that runs in the shard's own thread; requests reach it (`collect`), and
results leave it, on the event loop's thread between steps. So there is no lock, and tool calls proceed meanwhile.

What a sequence samples does not depend on when or beside whom it runs: chunks are cut from the session's own token
count, rows are independent, and a session that loses its slot gets its K/V back bit for bit from the host.
"""

import dataclasses
import time

import jax
import numpy as np

from stepdr_jax.engine import programs
from stepdr_jax.engine.slots import Request, Session, Slots
from stepdr_jax.models.qwen2 import Qwen2Config


@dataclasses.dataclass
class Counts:
    """What a shard has done; all totals since it was made."""

    sampled_tokens: int = 0
    prefilled_tokens: int = 0
    replayed_tokens: int = 0  # prefilled a second time, after a weight update or for want of host memory
    decode_calls: int = 0
    prefill_calls: int = 0
    evictions: int = 0
    busy_seconds: float = 0.0


class Shard:
    """A cache of `slots` sequences, its waiting sessions, and the programs on it.

    Args:
        config: model shape.
        slots, max_len: sequences held and tokens in each.
        rows, chunk: sequences and tokens of one prefill call.
        steps: tokens of one decode call; a finished sequence waits for at most so many.
        stop_ids: ids that end a generation.
        host_bytes: K/V of evicted sessions kept on the host; beyond it they are prefilled again.
        device: where the cache lives.
    """

    def __init__(
        self,
        config: Qwen2Config,
        *,
        slots: int,
        max_len: int,
        rows: int,
        chunk: int,
        steps: int,
        stop_ids: tuple[int, ...],
        host_bytes: int,
        device: jax.Device,
    ):
        self.config, self.max_len, self.device = config, max_len, device
        self.rows, self.chunk, self.steps = min(rows, slots), chunk, steps
        self.stop_ids = np.asarray(stop_ids, np.int32)
        self.stops = frozenset(stop_ids)
        self.slots = Slots(slots)
        self.new_cache()
        slot_bytes = sum(leaf.nbytes for leaf in jax.tree.leaves(self.cache)) // slots
        self.host_slots = host_bytes // slot_bytes
        self.inbox: list[tuple[Session, list[int], Request]] = []
        self.waiting: list[Session] = []  # sessions with a request and no slot, first come first served
        self.stored: set[Session] = set()  # sessions whose K/V is on the host
        self.counts = Counts()
        self.tick = 0

    def new_cache(self) -> None:
        """Starts with an empty cache."""
        cache = programs.init_cache(self.config, len(self.slots.owner), self.max_len)
        self.cache = jax.device_put(cache, self.device)  # placed explicitly, as programs return it: one compilation

    def submit(self, session: Session, new_ids: list[int], request: Request) -> None:
        """Hands in a request; it takes effect at the next `collect`, because a step may be running now."""
        self.inbox.append((session, new_ids, request))

    def collect(self) -> None:
        """Takes in what was submitted. Only between steps."""
        for session, new_ids, request in self.inbox:
            if session.closed:
                request.future.cancel()
            if request.future.cancelled():
                session.busy = False
                continue
            session.ids += new_ids
            session.request = request
            if session.slot is None:
                self.waiting.append(session)
        self.inbox.clear()

    def drop(self, session: Session) -> None:
        """Forgets a session and frees what it holds. Only between steps."""
        self.slots.release(session)
        self.stored.discard(session)
        if session in self.waiting:
            self.waiting.remove(session)
        if session.request is not None:
            session.request.future.cancel()
        session.stored, session.request = None, None

    def has_work(self) -> bool:
        return bool(self.inbox or self.waiting or self.slots.with_request())

    def forget(self) -> None:
        """Invalidates every cached K/V, because the weights changed."""
        for session in [*self.slots.owner, *self.stored, *self.waiting]:
            if session is not None:
                session.written, session.stored = 0, None
        self.stored.clear()

    def step(self, weights: dict) -> list[Session]:
        """Admits, prefills all that is pending, decodes once. Returns sessions whose request ended."""
        began = time.monotonic()
        self.tick += 1
        self._admit()
        running = self.slots.with_request()
        while pending := [session for session in running if session.unwritten > 0]:
            self._prefill(weights, pending[: self.rows])
        ended = self._decode(weights, running) if running else []
        self.counts.busy_seconds += time.monotonic() - began
        return ended

    def _admit(self) -> None:
        parked = self.slots.parked()
        while self.waiting:
            session = self.waiting[0]
            if not self.slots.take(session):
                if not parked:
                    return
                self._evict(parked.pop(0))
                self.slots.take(session)
            self.waiting.pop(0)
            if session.stored is not None:
                self.cache = programs.write_slot(self.cache, np.int32(session.slot), session.stored)
                session.stored = None
                self.stored.discard(session)

    def _evict(self, session: Session) -> None:
        self.counts.evictions += 1
        if len(self.stored) < self.host_slots:
            session.stored = jax.device_get(programs.read_slot(self.cache, np.int32(session.slot)))
            self.stored.add(session)
        else:
            session.written = 0
        self.slots.release(session)

    def _prefill(self, weights: dict, sessions: list[Session]) -> None:
        """Writes one chunk of each session. Chunks start where the session's cache ends, whatever the others need."""
        R, C = self.rows, self.chunk
        # Unused rows point at distinct slots too: two rows never write one slot, and theirs write nothing.
        used = {session.slot for session in sessions}
        spare = iter(slot for slot in range(len(self.slots.owner)) if slot not in used)
        slots_R = np.asarray([s.slot for s in sessions] + [next(spare) for _ in range(R - len(sessions))], np.int32)
        tokens_RC = np.zeros((R, C), np.int32)
        start_R, count_R = np.zeros(R, np.int32), np.zeros(R, np.int32)
        for row, session in enumerate(sessions):
            count = min(session.unwritten, C)
            tokens_RC[row, :count] = session.ids[session.written : session.written + count]
            start_R[row], count_R[row] = session.written, count
            session.written += count
            self.counts.replayed_tokens += max(min(session.written, session.furthest) - int(start_R[row]), 0)
            session.furthest = max(session.furthest, session.written)
            self.counts.prefilled_tokens += count
        self.cache = programs.prefill(weights, self.cache, slots_R, tokens_RC, start_R, count_R, config=self.config)
        self.counts.prefill_calls += 1

    def _decode(self, weights: dict, sessions: list[Session]) -> list[Session]:
        B = len(self.slots.owner)
        state = dict(
            token=np.zeros(B, np.int32),
            position=np.zeros(B, np.int32),
            remaining=np.zeros(B, np.int32),
            seed=np.zeros(B, np.uint32),
            temperature=np.ones(B, np.float32),
        )
        for session in sessions:
            request = session.request
            state["token"][session.slot] = session.ids[-1]
            state["position"][session.slot] = len(session.ids) - 1
            state["remaining"][session.slot] = request.limit - len(request.ids)
            state["seed"][session.slot] = request.seed & 0xFFFFFFFF
            state["temperature"][session.slot] = request.temperature
        self.cache, ids_Bs, logprobs_Bs = programs.decode(
            weights, self.cache, state, self.stop_ids, config=self.config, steps=self.steps
        )
        ids_Bs, logprobs_Bs = np.asarray(ids_Bs), np.asarray(logprobs_Bs)
        self.counts.decode_calls += 1
        ended = []
        for session in sessions:
            request = session.request
            count = int(np.sum(ids_Bs[session.slot] >= 0))
            ids = ids_Bs[session.slot, :count].tolist()
            request.ids += ids
            request.logprobs += logprobs_Bs[session.slot, :count].tolist()
            session.ids += ids
            session.written = session.furthest = len(session.ids) - 1
            session.used = self.tick
            self.counts.sampled_tokens += count
            if ids[-1] in self.stops or len(request.ids) >= request.limit:
                ended.append(session)
        return ended
