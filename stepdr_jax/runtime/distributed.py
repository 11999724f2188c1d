"""Runs of several processes: joining them, the lead process, exchange between processes, global arrays, preemption.

How the processes find each other (`config.distributed`):
    coordinator="auto"                  TPU VMs, GKE, Slurm: jax asks the cluster
    coordinator=HOST:PORT               of process 0; this is process `process` of `processes`
    JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES, JAX_PROCESS_ID     the same, from the environment
    otherwise                           a run of one process

On CPUs such a run uses gloo for collectives. The order in which gloo adds depends on the number of devices, not on how
processes share them: eight devices give the same bits in one process as in two, if the single process is given a
coordinator as well. Without one, XLA adds inside the process in another order. XLA also splits long sums by its number
of threads, by default the number of the process's devices, so NPROC is set to the same value in all processes.
"""

import contextlib
import itertools
import os
import signal
import socket
import sys
import threading
from collections.abc import Callable, Iterator
from types import FrameType
from typing import Any, TypeVar

import jax
import numpy as np
import numpy.typing as npt
from jax.experimental import multihost_utils
from ml_collections import ConfigDict
from orbax.checkpoint import multihost

from stepdr_jax.errors import UserError

T = TypeVar("T")
RESTART = 75  # EX_TEMPFAIL of <sysexits.h>: run the same command again
THREADS = 16  # of XLA on CPUs, in each process; more where a process has more devices


class Preempted(SystemExit):
    """The run was preempted (SIGTERM, or a cluster's notice), and everything is saved."""

    def __init__(self) -> None:
        super().__init__(RESTART)


def initialize(config: ConfigDict) -> None:
    """Joins the processes that `config.distributed` or the environment names; does nothing when there are none.

    Raises:
        UserError: the settings contradict each other, or the other processes do not answer in time.
    """
    settings = config.distributed
    address = settings.coordinator or os.environ.get("JAX_COORDINATOR_ADDRESS", "")
    if not address:
        return
    count, number = settings.processes, settings.process
    if not settings.coordinator:
        count, number = _from_environment("JAX_NUM_PROCESSES", count), _from_environment("JAX_PROCESS_ID", number)
    if address != "auto" and not address.rpartition(":")[2].isdigit():
        raise UserError(f"distributed.coordinator: expected host:port or auto, got {address!r}")
    if number >= count:
        raise UserError(f"distributed.process: expected one of 0 to {count - 1}, got {number}")
    join: dict[str, Any] = {}
    if address != "auto":
        join = dict(coordinator_address=address, num_processes=count, process_id=number)
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    os.environ.setdefault("NPROC", str(THREADS))
    try:
        jax.distributed.initialize(
            **join,
            initialization_timeout=int(settings.join_seconds),
            heartbeat_timeout_seconds=int(settings.heartbeat_seconds),
        )
    except (RuntimeError, ValueError) as error:
        raise UserError(
            f"process {number} of {count} at {socket.gethostname()} did not reach the others through {address} "
            f"({str(error).splitlines()[0]}); start all processes, or leave --config.distributed.coordinator empty"
        ) from error


def _from_environment(name: str, default: int) -> int:
    text = os.environ.get(name, str(default))
    if not text.isdigit():
        raise UserError(f"environment variable {name}: expected a number, got {text!r}")
    return int(text)


# ---------------------------------------------------------------------------------------------------- lead process


def is_lead() -> bool:
    """Whether this process writes metrics, settings, done.json and messages, which exist once per run."""
    return jax.process_index() == 0


def print_once(line: str) -> None:
    """Prints a line on standard error, from the lead process only."""
    if is_lead():
        print(line, file=sys.stderr, flush=True)


def process_label() -> str:
    """Host and number of this process, for messages."""
    host = socket.gethostname()
    return host if jax.process_count() == 1 else f"{host} (process {jax.process_index()} of {jax.process_count()})"


def barrier(name: str) -> None:
    """Returns when every process has called it with the same `name`."""
    if jax.process_count() > 1:
        with jax.transfer_guard("allow"):
            multihost_utils.sync_global_devices(name)


def lead_first(name: str, work: Callable[[], T], then: Callable[[], T]) -> T:
    """Runs `work` in the lead process and, when it has returned, `then` in the others."""
    if is_lead():
        result = work()
        barrier(name)
        return result
    barrier(name)
    return then()


def gather(values: npt.ArrayLike) -> np.ndarray:
    """Small arrays of every process: [processes, n] from int32 or float32 [n]. Every process must call it."""
    values = np.atleast_1d(np.asarray(values))
    if jax.process_count() == 1:
        return values[None]
    with jax.transfer_guard("allow"):
        return np.asarray(multihost_utils.process_allgather(values))


def gather_bytes(data: bytes, *, timeout: float = 86400.0, chunk: int = 1 << 22) -> list[bytes]:
    """The bytes of every process, in process order. Every process must call it, within `timeout` seconds.

    The processes first wait at a barrier of the coordination service, which occupies no device. Device memory then
    holds at most `chunk` bytes of each process at a time.
    """
    if jax.process_count() == 1:
        return [data]
    multihost.get_barrier_sync_fn()(key=f"gather {next(_gathers)}", timeout_ms=int(timeout * 1000))
    lengths = gather(np.int32(len(data)))[:, 0]
    found = [bytearray() for _ in lengths]
    for start in range(0, int(lengths.max()), chunk):
        size = min(chunk, int(lengths.max()) - start)
        rows = gather(np.frombuffer(data[start : start + size].ljust(size, b"\0"), np.uint8))
        for held, row, length in zip(found, rows, lengths, strict=True):
            held += row.tobytes()[: max(int(length) - start, 0)]
    return [bytes(held) for held in found]


_gathers = itertools.count()


# ------------------------------------------------------------------------------------------------------------- arrays


def local_batch_slice(sharding: jax.sharding.Sharding, shape: tuple[int, ...]) -> slice:
    """The range of the first dimension of an array of `shape` that the devices of this process hold parts of."""
    indices = sharding.addressable_devices_indices_map(shape).values()
    parts = [index[0].indices(shape[0]) for index in indices if index is not None]
    return slice(min(part[0] for part in parts), max(part[1] for part in parts))


def make_global_batch(local: np.ndarray, sequences: slice, like: jax.ShapeDtypeStruct) -> jax.Array:
    """The global array of shape and sharding of `like`; `local` is this process's range `sequences` of it."""
    if like.sharding.is_fully_addressable:
        return jax.device_put(local, like.sharding)

    def shard(index: tuple[slice, ...] | None) -> np.ndarray:
        assert index is not None
        first, last, _ = index[0].indices(like.shape[0])
        return local[(slice(first - sequences.start, last - sequences.start), *index[1:])]

    return _array_from_shards(like.shape, like.sharding, shard)


def place_global(tree: Any, shardings: Any) -> Any:
    """jax.device_put of a tree of host arrays that every process holds in full."""

    def leaf(a: npt.ArrayLike, sharding: jax.sharding.Sharding) -> jax.Array:
        if sharding.is_fully_addressable:
            return jax.device_put(a, sharding)
        full = np.asarray(a)
        return _array_from_shards(full.shape, sharding, lambda index: full[index])

    return jax.tree.map(leaf, tree, shardings)


def _array_from_shards(
    shape: tuple[int, ...], sharding: jax.sharding.Sharding, shard: Callable[[tuple[slice, ...] | None], np.ndarray]
) -> jax.Array:
    with jax.transfer_guard("allow"):  # as explicit as device_put, which cannot place arrays across processes
        return jax.make_array_from_callback(shape, sharding, shard)


def host_chunks(array: jax.Array | np.ndarray, size: int = 2**28) -> Iterator[np.ndarray]:
    """A global array on the host, in order, in chunks of about `size` bytes along the first dimension.

    Every process must iterate to the end. A chunk is gathered on all devices; no device ever holds the full array.
    """
    if not isinstance(array, jax.Array) or array.is_fully_addressable or not array.ndim:
        yield np.asarray(jax.device_get(array))
        return
    assert isinstance(array.sharding, jax.sharding.NamedSharding)
    everywhere = jax.sharding.NamedSharding(array.sharding.mesh, jax.sharding.PartitionSpec())
    rows = max(1, size // max(1, array.nbytes // array.shape[0]))
    take = jax.jit(
        lambda a, start, n: jax.lax.dynamic_slice_in_dim(a, start, n), static_argnums=2, out_shardings=everywhere
    )
    for start in range(0, array.shape[0], rows):
        with jax.transfer_guard("allow"):
            chunk = take(array, np.int32(start), min(rows, array.shape[0] - start))
            yield np.asarray(chunk.addressable_data(0))


def fetch_global(array: jax.Array) -> np.ndarray:
    """A small array that may be sharded over processes, in full on the host of each. Every process must call it."""
    return np.concatenate([np.atleast_1d(chunk) for chunk in host_chunks(array)]).reshape(array.shape)


# ------------------------------------------------------------------------------------------ preemption and failures


class Preemption:
    """Whether this run has been preempted: by SIGTERM, which is also how a cluster announces a preemption.

    With several processes jax distributes the notice and chooses one step, the same for all, after which they save. A
    context manager; enter it in the main thread, the only one that can handle signals.
    """

    def __init__(self) -> None:
        self._calls, self._requested = itertools.count(1), threading.Event()
        self._previous: signal.Handlers | Callable[[int, FrameType | None], Any] | int | None = None

    def __enter__(self) -> "Preemption":
        single = not jax.distributed.is_initialized()  # else jax handles the signal
        if single and threading.current_thread() is threading.main_thread():
            self._previous = signal.signal(signal.SIGTERM, lambda *_: self._requested.set())
        return self

    def __exit__(self, *_: object) -> None:
        if self._previous is not None:
            signal.signal(signal.SIGTERM, self._previous)

    def reached(self) -> bool:
        """Whether to save and stop now. Every process must call it after every step."""
        if jax.distributed.is_initialized():
            return multihost_utils.reached_preemption_sync_point(next(self._calls))
        return self._requested.is_set()


@contextlib.contextmanager
def failing_together() -> Iterator[None]:
    """Turns the loss of another process into exit status RESTART."""
    try:
        yield
    except Preempted:
        raise
    except jax.errors.JaxRuntimeError as error:
        if jax.process_count() == 1 or not _is_peer_loss(error):
            raise
        line = str(error).splitlines()[0][:200]
        message = f"{process_label()}: another process of this run is gone ({line}); restart all processes"
        print(message, file=sys.stderr, flush=True)
        os._exit(RESTART)


def exit_if_failed(status: int) -> None:
    """Exits at once when this process of several failed; jax would wait for the others, which would then not notice."""
    if status not in (0, RESTART) and jax.distributed.is_initialized() and jax.process_count() > 1:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


def _is_peer_loss(error: Exception) -> bool:
    signs = ("gloo", "connection", "unavailable", "peer", "coordination", "heartbeat", "barrier")
    return any(sign in str(error).lower() for sign in signs)
