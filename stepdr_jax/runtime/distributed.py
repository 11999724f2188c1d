"""One run on many hosts: one process for each, the same program in all of them; which of them writes, and who makes what.

Where the processes find each other (`config.distributed`):
    coordinator="auto"                  TPU VMs, GKE, Slurm: jax asks the cluster
    coordinator=HOST:PORT               process `process` of `processes`; port of the first of them
    JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES, JAX_PROCESS_ID     the same, from the environment
    otherwise                           this process is alone

On CPUs the collectives of such a run are gloo's. Its sums are taken in an order that depends on the number of devices,
not on how processes share them, so 8 devices give the same bits in one process as in two - when that one is started with
a coordinator too. Without one, XLA sums inside the process, in another order. XLA also cuts long sums by the number of
its threads, which it takes from the devices of a process; NPROC, where it is not set, is made the same for all.
"""

import contextlib
import itertools
import os
import signal
import socket
import sys
import threading
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

import jax
import numpy as np
from jax.experimental import multihost_utils
from orbax.checkpoint import multihost

from stepdr_jax.errors import UserError

T = TypeVar("T")
RESTART = 75  # EX_TEMPFAIL of <sysexits.h>: all is well or will be; run the same command again


THREADS = 16  # of XLA on CPUs, in each process; more where a process has more devices


class Preempted(SystemExit):
    """Training stopped because it was asked to (SIGTERM, a notice of preemption) and everything is saved."""

    def __init__(self):
        super().__init__(RESTART)


def initialize(config) -> None:
    """Joins the processes that `config.distributed` or the environment names; does nothing when there are none.

    Raises:
        UserError: the settings contradict each other, or the others do not answer in time.
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
    where = {} if address == "auto" else dict(coordinator_address=address, num_processes=count, process_id=number)
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    os.environ.setdefault("NPROC", str(THREADS))
    try:
        jax.distributed.initialize(
            **where,
            initialization_timeout=int(settings.join_seconds),
            heartbeat_timeout_seconds=int(settings.heartbeat_seconds),
        )
    except (RuntimeError, ValueError) as error:
        raise UserError(
            f"process {number} of {count} at {socket.gethostname()} did not find the others through {address} "
            f"({str(error).splitlines()[0]}); start all of them, or leave --config.distributed.coordinator empty"
        ) from error


def _from_environment(name: str, otherwise: int) -> int:
    text = os.environ.get(name, str(otherwise))
    if not text.isdigit():
        raise UserError(f"environment variable {name}: expected a number, got {text!r}")
    return int(text)


# ---------------------------------------------------------------------------------------------- who writes and speaks


def is_lead() -> bool:
    """Whether this process is the one that writes what exists once: metrics, settings, done.json, lines for people."""
    return jax.process_index() == 0


def say(line: str) -> None:
    """Prints on standard error, once for all processes."""
    if is_lead():
        print(line, file=sys.stderr, flush=True)


def name() -> str:
    """This process, for messages."""
    host = socket.gethostname()
    return host if jax.process_count() == 1 else f"{host} (process {jax.process_index()} of {jax.process_count()})"


def barrier(what: str) -> None:
    """Returns when every process has called it; `what` must be the same in all."""
    if jax.process_count() > 1:
        with jax.transfer_guard("allow"):
            multihost_utils.sync_global_devices(what)


def lead_first(what: str, work: Callable[[], T], then: Callable[[], T]) -> T:
    """`work()` in the lead; when it has ended, `then()` in the others."""
    if is_lead():
        result = work()
        barrier(what)
        return result
    barrier(what)
    return then()


def gather(values) -> np.ndarray:
    """Small numbers of every process: [processes, n] of int32 or float32 [n]. Every process must call it."""
    values = np.atleast_1d(np.asarray(values))
    if jax.process_count() == 1:
        return values[None]
    with jax.transfer_guard("allow"):
        return np.asarray(multihost_utils.process_allgather(values))


def gather_bytes(data: bytes, *, patience: float = 86400.0, piece: int = 1 << 22) -> list[bytes]:
    """What every process gave, in their order. Every process must call it; they may come as late as `patience` seconds.

    They meet at a barrier of the coordination service first, so that no device waits. Of each process so many bytes (a
    `piece`) are then in device memory at a time.
    """
    if jax.process_count() == 1:
        return [data]
    multihost.get_barrier_sync_fn()(key=f"gather {next(_meetings)}", timeout_ms=int(patience * 1000))
    lengths = gather(np.int32(len(data)))[:, 0]
    found = [bytearray() for _ in lengths]
    for start in range(0, int(lengths.max()), piece):
        size = min(piece, int(lengths.max()) - start)
        rows = gather(np.frombuffer(data[start : start + size].ljust(size, b"\0"), np.uint8))
        for held, row, length in zip(found, rows, lengths, strict=True):
            held += row.tobytes()[: max(int(length) - start, 0)]
    return [bytes(held) for held in found]


_meetings = itertools.count()


# ------------------------------------------------------------------------------------------------------------- arrays


def own_rows(sharding: jax.sharding.Sharding, shape: tuple[int, ...]) -> slice:
    """The rows (first dimension) of an array of `shape` that the devices of this process hold parts of."""
    parts = [index[0].indices(shape[0]) for index in sharding.addressable_devices_indices_map(shape).values()]
    return slice(min(part[0] for part in parts), max(part[1] for part in parts))


def place_rows(local: np.ndarray, rows: slice, like: jax.ShapeDtypeStruct) -> jax.Array:
    """The global array of shape and sharding of `like`, of which this process made `rows`."""
    if like.sharding.is_fully_addressable:
        return jax.device_put(local, like.sharding)

    def part(index):
        first, last, _ = index[0].indices(like.shape[0])
        return local[(slice(first - rows.start, last - rows.start), *index[1:])]

    return _made(like.shape, like.sharding, part)


def place(tree: Any, shardings: Any) -> Any:
    """jax.device_put of host arrays that every process has whole."""

    def leaf(a, sharding):
        if sharding.is_fully_addressable:
            return jax.device_put(a, sharding)
        a = np.asarray(a)
        return _made(a.shape, sharding, lambda index: a[index])

    return jax.tree.map(leaf, tree, shardings)


def _made(shape, sharding, part) -> jax.Array:
    with jax.transfer_guard("allow"):  # as explicit as device_put, which takes no array of other processes
        return jax.make_array_from_callback(shape, sharding, part)


def host_pieces(array: jax.Array, size: int = 2**28) -> Iterator[np.ndarray]:
    """The bytes of a global array in order, in pieces of whole first-dimension slices; every process must read on.

    A piece is gathered on all devices, so that no array is ever whole on one; `size` is about its bytes.
    """
    if not isinstance(array, jax.Array) or array.is_fully_addressable or not array.ndim:
        yield np.asarray(jax.device_get(array))
        return
    everywhere = jax.sharding.NamedSharding(array.sharding.mesh, jax.sharding.PartitionSpec())
    rows = max(1, size // max(1, array.nbytes // array.shape[0]))
    cut = jax.jit(
        lambda a, start, n: jax.lax.dynamic_slice_in_dim(a, start, n), static_argnums=2, out_shardings=everywhere
    )
    for start in range(0, array.shape[0], rows):
        with jax.transfer_guard("allow"):
            piece = cut(array, np.int32(start), min(rows, array.shape[0] - start))
            yield np.asarray(piece.addressable_data(0))


def whole(array: jax.Array) -> np.ndarray:
    """All of a small array that may be spread over processes, in each of them. Every process must call it."""
    return np.concatenate([np.atleast_1d(piece) for piece in host_pieces(array)]).reshape(array.shape)


# ------------------------------------------------------------------------------------------------------------ endings


class Notice:
    """Whether this run has been told to end: SIGTERM, which is also how a cluster announces a preemption.

    Among several processes jax passes the notice on to all of them and names one step, the same for all, at which they
    save. A context manager; it must be entered in the main thread to hear the signal.
    """

    def __init__(self):
        self._calls, self._asked, self._previous = itertools.count(1), threading.Event(), None

    def __enter__(self) -> "Notice":
        alone = not jax.distributed.is_initialized()  # else jax listens
        if alone and threading.current_thread() is threading.main_thread():
            self._previous = signal.signal(signal.SIGTERM, lambda *_: self._asked.set())
        return self

    def __exit__(self, *_) -> None:
        if self._previous is not None:
            signal.signal(signal.SIGTERM, self._previous)

    def reached(self) -> bool:
        """Whether to save and end now. Every process must call it after every step."""
        if jax.distributed.is_initialized():
            return multihost_utils.reached_preemption_sync_point(next(self._calls))
        return self._asked.is_set()


@contextlib.contextmanager
def failing_together() -> Iterator[None]:
    """Turns the loss of another process into exit status RESTART, and every other error into an exit of this process.

    A process that waited for the others at exit, as jax does, would keep them from noticing that it has failed.
    """
    try:
        yield
    except Preempted:
        raise
    except jax.errors.JaxRuntimeError as error:
        if jax.process_count() == 1 or not _of_a_peer(error):
            raise
        line = str(error).splitlines()[0][:200]
        print(
            f"{name()}: another process of this run is gone ({line}); restart all of them", file=sys.stderr, flush=True
        )
        os._exit(RESTART)


def leave(status: int) -> None:
    """Ends this process at once when it failed among others."""
    if status not in (0, RESTART) and jax.distributed.is_initialized() and jax.process_count() > 1:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


def _of_a_peer(error: Exception) -> bool:
    signs = ("gloo", "connection", "unavailable", "peer", "coordination", "heartbeat", "barrier")
    return any(sign in str(error).lower() for sign in signs)
