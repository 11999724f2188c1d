"""The sampler that episodes talk to: sessions that are extended, generated from and closed, by any number of coroutines.

    generation = await engine.generate("episode 7", new_ids, SampleParams(max_tokens=96, seed=11))

A session keeps its K/V between turns, so a turn prefills only what is new. Sampled ids are a function of the weights, the
session's ids and (seed, token index) alone: not of the order or the company in which requests arrive.
"""

import asyncio
import concurrent.futures
import dataclasses
import math
from collections.abc import Sequence
from typing import Protocol

import jax
import numpy as np
from jax.sharding import Mesh

from stepdr_jax.engine import programs, weights
from stepdr_jax.engine.pages import Request, Session
from stepdr_jax.engine.scheduler import Shard
from stepdr_jax.models.qwen2 import Qwen2Config
from stepdr_jax.ops import paged_attention

UPDATE_MODES = ("drain", "keep", "recompute")


@dataclasses.dataclass(frozen=True)
class SampleParams:
    """How one turn is sampled.

    The key of a token is fold_in(fold_in(PRNGKey(0), seed), index of the token in the session). Temperature 0 takes the
    most probable token. There is no top-p: log-probabilities must be those the trainer computes.
    """

    max_tokens: int
    seed: int
    temperature: float = 1.0


@dataclasses.dataclass(frozen=True)
class Generation:
    """One turn. `finish`: "stop" a stop id was sampled (it is the last of `ids`), "length" max_tokens, "full" max_len.

    `logprobs` are natural logs, float32, of log_softmax(logits / temperature); `version` is that of the weights that
    sampled the first id (the later ones, too, unless weights were updated in the middle of the turn).
    """

    ids: tuple[int, ...]
    logprobs: tuple[float, ...]
    finish: str
    version: int


class Engine(Protocol):
    """Anything that can sample turns for sessions; `JaxEngine` and `fake.FakeEngine` are two."""

    async def generate(self, session: str, new_ids: Sequence[int], params: SampleParams) -> Generation: ...

    async def close(self, session: str) -> None: ...

    async def update_weights(self, params: dict, version: int) -> None: ...

    def stats(self) -> dict[str, float]: ...


class EngineError(Exception):
    """The engine cannot serve: its weights give no finite probabilities, or it was used against its contract."""


class JaxEngine:
    """Continuous batching in JAX.

    Args:
        params: tree of `qwen2.param_shapes(config)`; copied.
        config: model shape.
        slots: sequences decoded together; more sessions may be open.
        max_len: tokens of a sequence, prompt and observations included.
        page: tokens of a page of K/V; 0 for pages of max_len, which needs the most memory and the least work.
        pages: on the device, of all shards; 0 for enough to hold `slots` sequences of max_len. When they run out the least
            recently used sessions without a request are moved out, then the least advanced with one.
        stop_ids: ids that end a generation.
        version: of the weights, recorded with every generation.
        shards: independent pools for slots / shards sequences, each driven by its own thread; results do not depend on
            it. On CPU one per core: a pool that fits a core's share of the last-level cache is faster, too.
        rows, chunk: sequences and tokens of one prefill call.
        steps: tokens of one decode call.
        prefill_calls: at most so many before each decode call; 0 for all that is pending.
        host_bytes: host memory for the K/V of sessions that lost their pages.
        attention: "auto" or one of `ops.paged_attention.BACKENDS`.
        transfer_bytes: most bytes of new weights on their way at once, on one device.
        mesh: axes data and tensor: a replica of the engine on each position of data (shards then counts per replica), its
            heads and vocabulary split over tensor. Default the first device.

    Raises ValueError for sizes that do not fit each other.
    """

    def __init__(
        self,
        params: dict,
        config: Qwen2Config,
        *,
        slots: int,
        max_len: int,
        stop_ids: Sequence[int],
        version: int = 0,
        page: int = 0,
        pages: int = 0,
        shards: int = 1,
        rows: int = 4,
        chunk: int = 32,
        steps: int = 8,
        prefill_calls: int = 0,
        host_bytes: int = 2 << 30,
        attention: str = "auto",
        transfer_bytes: int = weights.LIMIT,
        mesh: Mesh | None = None,
    ):
        replicas = _replicas(mesh)
        count = shards * len(replicas)
        if slots < 1 or shards < 1 or slots % count:
            raise ValueError(f"expected slots to be a positive multiple of shards, got {slots} and {count}")
        self.config, self.max_len, self.version = config, max_len, version
        layouts = [
            layout_of(config, slots // count, max_len, page=page, pages=pages // count, attention=attention, devices=d)
            for d in replicas
        ]
        self._layouts = list(zip(layouts, replicas, strict=True))
        self._transfer_bytes = transfer_bytes
        self._weights = self._place(params)  # of each replica; none between `release` and `update_weights`
        self._shards = [
            Shard(
                layout,
                slots=slots // count,
                max_len=max_len,
                rows=rows,
                chunk=chunk,
                steps=steps,
                prefill_calls=prefill_calls,
                stop_ids=tuple(stop_ids),
                host_bytes=host_bytes // count,
                device=devices[0],
            )
            for layout, devices in self._layouts
            for _ in range(shards)
        ]
        self._replica_of = {id(shard): number // shards for number, shard in enumerate(self._shards)}
        self._sessions: dict[str, tuple[Session, Shard]] = {}
        self._closing: list[tuple[Session, Shard]] = []  # closed, held by a step that runs now
        self._workers: dict[int, asyncio.Task] = {}
        # One thread a shard: its steps follow each other even if an event loop dies in the middle of one.
        self._threads = {
            id(shard): concurrent.futures.ThreadPoolExecutor(1, thread_name_prefix="engine") for shard in self._shards
        }
        self._update: asyncio.Future | None = None  # set while a weight update waits for running requests
        self._paused: asyncio.Future | None = None  # set while no step may begin
        self._updates = 0

    async def generate(self, session: str, new_ids: Sequence[int], params: SampleParams) -> Generation:
        """Appends `new_ids` to the session (made at its first use) and samples until a stop id, max_tokens or max_len.

        A session that has no room for new_ids and one more token stays as it is and answers with no ids, "full".
        Cancelling the call leaves the session to be closed by its owner. Raises ValueError for requests that make no
        sense (nothing to continue, a second request while one runs), EngineError when probabilities are not finite.
        """
        while self._update is not None:
            await asyncio.shield(self._update)
        if self.released:
            raise EngineError(
                "the sampler has no weights: it was released, or did not get the last ones; update_weights first"
            )
        entry, shard = self._entry(session)
        if entry.busy:
            raise ValueError(f"session {session!r} already has a request running")
        if params.max_tokens < 1 or params.temperature < 0:
            raise ValueError(f"expected max_tokens >= 1 and temperature >= 0, got {params}")
        if not entry.ids and not len(new_ids):
            raise ValueError(f"session {session!r} is empty: expected new_ids to start from")
        room = self.max_len - len(entry.ids) - len(new_ids)
        if room < 1:
            return Generation((), (), "full", self.version)
        limit = min(params.max_tokens, room)
        future = asyncio.get_running_loop().create_future()
        request = Request(params.temperature, params.seed, limit, limit < params.max_tokens, future)
        shard.submit(entry, [int(id_) for id_ in new_ids], request)
        entry.busy = True
        self._wake(shard)
        return await future

    async def close(self, session: str) -> None:
        """Forgets a session and cancels its request; unknown names are fine. The name may be used again at once."""
        found = self._sessions.pop(session, None)
        if found is None:
            return
        entry, shard = found
        entry.closed = True
        if self._running(shard):
            self._closing.append(found)
        else:
            shard.drop(entry)

    async def pause(self) -> None:
        """Ends the steps that run now and begins no other until `resume`; requests wait where they are."""
        if self._paused is None:
            self._paused = asyncio.get_running_loop().create_future()
        threads = [asyncio.get_running_loop().run_in_executor(thread, int) for thread in self._threads.values()]
        await asyncio.gather(*threads)  # a thread's earlier work, the step, comes first

    def resume(self) -> None:
        """Lets steps begin again."""
        if self._paused is not None:
            paused, self._paused = self._paused, None
            paused.set_result(None)

    async def update_weights(self, params: dict, version: int, mode: str = "drain") -> None:
        """Takes new weights. Open sessions stay open.

        Modes: "drain" waits for running requests to end, holds new ones back, and forgets all K/V: strictly on policy;
        sessions prefill their ids again at their next turn. "recompute" changes the weights between two steps and makes
        running requests prefill again before they go on. "keep" changes them between two steps and keeps the K/V of the
        old ones; what is sampled over it is counted as stale.
        """
        if mode not in UPDATE_MODES:
            raise ValueError(f"expected mode among {', '.join(UPDATE_MODES)}, got {mode!r}")
        while self._update is not None:
            await asyncio.shield(self._update)
        self._update = asyncio.get_running_loop().create_future()
        try:
            if mode == "drain":
                await self._drained()
                self._weights = []  # nobody needs the old ones any more: they are never there beside the new ones
            self._weights, self.version = self._place(params), version  # what the next step of each shard begins with
            self._updates += 1
            for shard in self._shards:
                shard.outdated |= mode != "keep"
                shard.reserve()
        finally:
            done, self._update = self._update, None
            done.set_result(None)

    async def release(self) -> None:
        """Gives the devices' memory back: waits for running requests to end, then forgets weights, K/V and pages.

        Sessions stay open, `update_weights` makes the engine whole again, and requests until then raise EngineError.
        """
        while self._update is not None:
            await asyncio.shield(self._update)
        await self._drained()
        self._weights = []
        for shard in self._shards:
            shard.release()

    @property
    def released(self) -> bool:
        """Whether there are no weights to sample with."""
        return not self._weights

    async def _drained(self) -> None:
        while any(shard.has_work() for shard in self._shards):
            await asyncio.gather(*(worker for worker in self._workers.values() if not worker.done()))

    def stats(self) -> dict[str, float]:
        """Totals since the engine was made, and what is held now."""
        totals: dict[str, float] = {}
        for shard in self._shards:
            for name, value in dataclasses.asdict(shard.counts).items():
                totals[name] = totals.get(name, 0) + value
        return totals | {
            "sessions": len(self._sessions),
            "pages_in_use": sum(shard.pages.count - shard.pages.free for shard in self._shards),
            "pages_peak": sum(shard.pages.peak for shard in self._shards),
            "pages": sum(shard.pages.count for shard in self._shards),
            "version": self.version,
            "weight_updates": self._updates,
        }

    def _place(self, params: dict) -> list[dict]:
        targets = [(layout, devices[0]) for layout, devices in self._layouts]
        return jax.block_until_ready(weights.transfer(params, targets, limit=self._transfer_bytes))

    def _entry(self, name: str) -> tuple[Session, Shard]:
        if name not in self._sessions:
            load = dict.fromkeys(range(len(self._shards)), 0)
            for _, shard in self._sessions.values():
                load[self._shards.index(shard)] += 1
            lightest = min(load, key=load.get)
            self._sessions[name] = (Session(name), self._shards[lightest])
        return self._sessions[name]

    def _running(self, shard: Shard) -> bool:
        worker = self._workers.get(id(shard))
        return worker is not None and not worker.done()

    def _wake(self, shard: Shard) -> None:
        """Starts the shard's loop if it is not running; it ends when there is nothing to do."""
        if not self._running(shard):
            self._workers[id(shard)] = asyncio.get_running_loop().create_task(self._drive(shard))

    async def _drive(self, shard: Shard) -> None:
        loop = asyncio.get_running_loop()
        await asyncio.sleep(0)  # requests that are made together start together
        while shard.has_work():
            while self._paused is not None:
                await asyncio.shield(self._paused)
            shard.collect()
            held = self._weights[self._replica_of[id(shard)]]
            try:
                ended = await loop.run_in_executor(self._threads[id(shard)], shard.step, held, self.version)
            except Exception as error:
                self._fail(shard, error)
            else:
                for session in ended:
                    self._finish(session, shard)
            self._sweep(shard)
            await asyncio.sleep(0)
        self._sweep(shard)

    def _finish(self, session: Session, shard: Shard) -> None:
        request, session.request, session.busy = session.request, None, False
        if request.future.done():  # the caller was cancelled
            return
        if not all(map(math.isfinite, request.logprobs)):
            request.future.set_exception(
                EngineError(f"weights of version {request.version} give non-finite probabilities")
            )
            return
        stopped = request.ids[-1] in shard.stops
        finish = "stop" if stopped else "full" if request.full else "length"
        request.future.set_result(Generation(tuple(request.ids), tuple(request.logprobs), finish, request.version))

    def _sweep(self, shard: Shard) -> None:
        """Drops closed sessions, and requests that nobody waits for any more."""
        for session, _ in [found for found in self._closing if found[1] is shard]:
            shard.drop(session)
        self._closing = [found for found in self._closing if found[1] is not shard]
        for session in [*shard.running, *shard.waiting]:
            if session.request.future.cancelled():
                session.request, session.busy = None, False
        shard.waiting = [session for session in shard.waiting if session.request is not None]
        shard.running = [session for session in shard.running if session.request is not None]

    def _fail(self, shard: Shard, error: Exception) -> None:
        """A program failed: the donated pages are gone, so every session here loses its K/V and its request."""
        shard.forget()
        shard.new_pool()
        for session in [*shard.running, *shard.waiting]:
            request, session.request, session.busy = session.request, None, False
            if not request.future.done():
                request.future.set_exception(EngineError(f"{type(error).__name__}: {error}"))
        shard.waiting.clear()
        shard.running.clear()


def _replicas(mesh: Mesh | None) -> list[list[jax.Device]]:
    """The devices of each replica: a row of `tensor` for every position of `data`."""
    if mesh is None:
        return [jax.local_devices()[:1]]
    others = {axis: size for axis, size in mesh.shape.items() if axis not in ("data", "tensor") and size > 1}
    if others:
        raise ValueError(f"expected a sampler's mesh of data and tensor alone, got {others} besides")
    axes = [mesh.axis_names.index(axis) for axis in ("data", "tensor")]
    grid = np.moveaxis(mesh.devices, axes, (0, 1)).reshape(mesh.shape["data"], mesh.shape["tensor"])
    return [list(row) for row in grid]


def layout_of(
    config: Qwen2Config,
    slots: int,
    max_len: int,
    *,
    page: int = 0,
    pages: int = 0,
    attention: str = "auto",
    devices: Sequence[jax.Device],
) -> programs.Layout:
    """The pool of one shard on `devices`; see `JaxEngine` for what the sizes mean. Raises ValueError."""
    tensor = len(devices)
    page = page or max_len
    columns = -(-max_len // page)
    pages = pages or slots * columns
    if pages < columns:
        raise ValueError(f"expected at least {columns} pages of {page} tokens for a sequence of {max_len}, got {pages}")
    if columns == 1 and pages != slots:
        raise ValueError(f"expected a page for each of {slots} slots where a page holds a sequence, got {pages}")
    for name in ("num_kv_heads", "intermediate_size", "vocab_size", "hidden_size"):
        if getattr(config, name) % tensor:
            raise ValueError(f"expected tensor to divide {name} {getattr(config, name)}, got {tensor}")
    if attention == "auto":
        attention = paged_attention.choose(devices[0].platform, config.head_dim)
    # The kernel asks the mesh around it which chip it is compiled for.
    mesh = Mesh(np.array(devices), ("tensor",)) if tensor > 1 or attention == "ragged" else None
    return programs.Layout(config, page, pages, columns, attention, mesh)
