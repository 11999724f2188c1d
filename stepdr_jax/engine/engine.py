"""The sampler that episodes talk to: sessions that are extended, generated from and closed, by any number of
coroutines.

    generation = await engine.generate("episode 7", new_ids, SampleParams(max_tokens=96, seed=11))

A session keeps its K/V between turns, so a turn prefills only what is new. Sampled ids are a function of the weights,
the session's ids and (seed, token index) alone: not of the order or the company in which requests arrive.
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
from stepdr_jax.engine.scheduler import Pool
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
        max_num_seqs: sequences decoded together; more sessions may be open.
        max_len: tokens of a sequence, prompt and observations included.
        page_size: tokens of a page of K/V; 0 for pages of max_len, which needs the most memory and the least work.
        num_pages: on the device, of all pools; 0 for enough to hold `max_num_seqs` sequences of max_len. When they run
            out the least recently used sessions without a request are moved out, then the least advanced with one.
        stop_ids: ids that end a generation.
        version: of the weights, recorded with every generation.
        pools: independent pools for max_num_seqs / pools sequences, each driven by its own thread; results do not
            depend on it. On CPU one per core: a pool that fits a core's share of the last-level cache is faster, too.
        prefill_batch, prefill_chunk: sequences and tokens of one prefill call.
        decode_steps: tokens of one decode call.
        prefill_calls: at most so many before each decode call; 0 for all that is pending.
        host_bytes: host memory for the K/V of sessions that lost their pages.
        attention: "auto" or one of `ops.paged_attention.BACKENDS`.
        weight_sync_bytes: most bytes of new weights in transit at once, on one device.
        mesh: axes data and tensor: a replica of the engine on each position of data (pools then counts per replica),
            its heads and vocabulary split over tensor. Default the first device.

    Raises ValueError for sizes that do not fit each other.
    """

    def __init__(
        self,
        params: dict,
        config: Qwen2Config,
        *,
        max_num_seqs: int,
        max_len: int,
        stop_ids: Sequence[int],
        version: int = 0,
        page_size: int = 0,
        num_pages: int = 0,
        pools: int = 1,
        prefill_batch: int = 4,
        prefill_chunk: int = 32,
        decode_steps: int = 8,
        prefill_calls: int = 0,
        host_bytes: int = 2 << 30,
        attention: str = "auto",
        weight_sync_bytes: int = weights.BUCKET_BYTES,
        mesh: Mesh | None = None,
    ):
        replicas = _replicas(mesh)
        count = pools * len(replicas)
        if max_num_seqs < 1 or pools < 1 or max_num_seqs % count:
            raise ValueError(
                f"expected max_num_seqs to be a positive multiple of pools, got {max_num_seqs} and {count}"
            )
        self.config, self.max_len, self.version = config, max_len, version
        layouts = [
            layout_of(
                config,
                max_num_seqs // count,
                max_len,
                page_size=page_size,
                num_pages=num_pages // count,
                attention=attention,
                devices=d,
            )
            for d in replicas
        ]
        self._layouts = list(zip(layouts, replicas, strict=True))
        self._weight_sync_bytes = weight_sync_bytes
        self._weights = self._place(params)  # of each replica; none between `sleep` and `update_weights`
        self._pools = [
            Pool(
                layout,
                max_num_seqs=max_num_seqs // count,
                max_len=max_len,
                prefill_batch=prefill_batch,
                prefill_chunk=prefill_chunk,
                decode_steps=decode_steps,
                prefill_calls=prefill_calls,
                stop_ids=tuple(stop_ids),
                host_bytes=host_bytes // count,
                device=devices[0],
            )
            for layout, devices in self._layouts
            for _ in range(pools)
        ]
        self._replica_of = {id(pool): number // pools for number, pool in enumerate(self._pools)}
        self._sessions: dict[str, tuple[Session, Pool]] = {}
        self._closing: list[tuple[Session, Pool]] = []  # closed, held by a step that runs now
        self._workers: dict[int, asyncio.Task] = {}
        # One thread a pool: its steps follow each other even if an event loop dies in the middle of one.
        self._threads = {
            id(pool): concurrent.futures.ThreadPoolExecutor(1, thread_name_prefix="engine") for pool in self._pools
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
        if self.sleeping:
            raise EngineError(
                "the sampler has no weights: it was sleeping, or did not get the last ones; update_weights first"
            )
        entry, pool = self._entry(session)
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
        pool.submit(entry, [int(id_) for id_ in new_ids], request)
        entry.busy = True
        self._wake(pool)
        return await future

    async def close(self, session: str) -> None:
        """Forgets a session and cancels its request; unknown names are fine. The name may be used again at once."""
        found = self._sessions.pop(session, None)
        if found is None:
            return
        entry, pool = found
        entry.closed = True
        if self._running(pool):
            self._closing.append(found)
        else:
            pool.drop(entry)

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
            self._weights, self.version = self._place(params), version  # what the next step of each pool begins with
            self._updates += 1
            for pool in self._pools:
                pool.outdated |= mode != "keep"
                pool.wake()
        finally:
            done, self._update = self._update, None
            done.set_result(None)

    async def sleep(self) -> None:
        """Gives the devices' memory back: waits for running requests to end, then forgets weights, K/V and pages.

        Sessions stay open, `update_weights` makes the engine whole again, and requests until then raise EngineError.
        """
        while self._update is not None:
            await asyncio.shield(self._update)
        await self._drained()
        self._weights = []
        for pool in self._pools:
            pool.sleep()

    @property
    def sleeping(self) -> bool:
        """Whether there are no weights to sample with."""
        return not self._weights

    async def _drained(self) -> None:
        while any(pool.has_work() for pool in self._pools):
            await asyncio.gather(*(worker for worker in self._workers.values() if not worker.done()))

    def stats(self) -> dict[str, float]:
        """Totals since the engine was made, and what is held now."""
        totals: dict[str, float] = {}
        for pool in self._pools:
            for name, value in dataclasses.asdict(pool.counts).items():
                totals[name] = totals.get(name, 0) + value
        return totals | {
            "sessions": len(self._sessions),
            "pages_in_use": sum(pool.allocator.num_pages - pool.allocator.free for pool in self._pools),
            "pages_peak": sum(pool.allocator.peak for pool in self._pools),
            "num_pages": sum(pool.allocator.num_pages for pool in self._pools),
            "version": self.version,
            "weight_updates": self._updates,
        }

    def _place(self, params: dict) -> list[dict]:
        targets = [(layout, devices[0]) for layout, devices in self._layouts]
        return jax.block_until_ready(weights.transfer(params, targets, limit=self._weight_sync_bytes))

    def _entry(self, name: str) -> tuple[Session, Pool]:
        if name not in self._sessions:
            load = dict.fromkeys(range(len(self._pools)), 0)
            for _, pool in self._sessions.values():
                load[self._pools.index(pool)] += 1
            lightest = min(load, key=lambda number: load[number])
            self._sessions[name] = (Session(name), self._pools[lightest])
        return self._sessions[name]

    def _running(self, pool: Pool) -> bool:
        worker = self._workers.get(id(pool))
        return worker is not None and not worker.done()

    def _wake(self, pool: Pool) -> None:
        """Starts the pool's loop if it is not running; it ends when there is nothing to do."""
        if not self._running(pool):
            self._workers[id(pool)] = asyncio.get_running_loop().create_task(self._drive(pool))

    async def _drive(self, pool: Pool) -> None:
        loop = asyncio.get_running_loop()
        await asyncio.sleep(0)  # requests that are made together start together
        while pool.has_work():
            while self._paused is not None:
                await asyncio.shield(self._paused)
            pool.collect()
            held = self._weights[self._replica_of[id(pool)]]
            try:
                ended = await loop.run_in_executor(self._threads[id(pool)], pool.step, held, self.version)
            except Exception as error:
                self._fail(pool, error)
            else:
                for session in ended:
                    self._finish(session, pool)
            self._sweep(pool)
            await asyncio.sleep(0)
        self._sweep(pool)

    def _finish(self, session: Session, pool: Pool) -> None:
        request, session.request, session.busy = session.active, None, False
        if request.future.done():  # the caller was cancelled
            return
        if not all(map(math.isfinite, request.logprobs)):
            request.future.set_exception(
                EngineError(f"weights of version {request.version} give non-finite probabilities")
            )
            return
        stopped = request.ids[-1] in pool.stops
        finish = "stop" if stopped else "full" if request.full else "length"
        request.future.set_result(Generation(tuple(request.ids), tuple(request.logprobs), finish, request.version))

    def _sweep(self, pool: Pool) -> None:
        """Drops closed sessions, and requests that nobody waits for any more."""
        for session, _ in [found for found in self._closing if found[1] is pool]:
            pool.drop(session)
        self._closing = [found for found in self._closing if found[1] is not pool]
        for session in [*pool.running, *pool.waiting]:
            if session.active.future.cancelled():
                session.request, session.busy = None, False
        pool.waiting = [session for session in pool.waiting if session.request is not None]
        pool.running = [session for session in pool.running if session.request is not None]

    def _fail(self, pool: Pool, error: Exception) -> None:
        """A program failed: the donated pages are gone, so every session here loses its K/V and its request."""
        pool.forget()
        pool.allocate()
        for session in [*pool.running, *pool.waiting]:
            request, session.request, session.busy = session.active, None, False
            if not request.future.done():
                request.future.set_exception(EngineError(f"{type(error).__name__}: {error}"))
        pool.waiting.clear()
        pool.running.clear()


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
    max_num_seqs: int,
    max_len: int,
    *,
    page_size: int = 0,
    num_pages: int = 0,
    attention: str = "auto",
    devices: Sequence[jax.Device],
) -> programs.Layout:
    """The layout of one pool on `devices`; see `JaxEngine` for what the sizes mean. Raises ValueError."""
    tensor = len(devices)
    page_size = page_size or max_len
    columns = -(-max_len // page_size)
    num_pages = num_pages or max_num_seqs * columns
    if num_pages < columns:
        raise ValueError(
            f"expected at least {columns} pages of {page_size} tokens for a sequence of {max_len}, got {num_pages}"
        )
    if columns == 1 and num_pages != max_num_seqs:
        raise ValueError(
            f"expected a page for each of {max_num_seqs} sequences where a page holds a sequence, got {num_pages}"
        )
    for name in ("num_kv_heads", "intermediate_size", "vocab_size", "hidden_size"):
        if getattr(config, name) % tensor:
            raise ValueError(f"expected tensor to divide {name} {getattr(config, name)}, got {tensor}")
    if attention == "auto":
        attention = paged_attention.choose(devices[0].platform, config.head_dim)
    # The kernel asks the mesh around it which chip it is compiled for.
    mesh = Mesh(np.array(devices), ("tensor",)) if tensor > 1 or attention == "ragged" else None
    return programs.Layout(config, page_size, num_pages, columns, attention, mesh)
