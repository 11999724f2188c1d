"""PPO in several processes: each samples its share of an iteration's episodes, then all processes exchange them.

A process has its own sampler, on its own devices, and its own connections to the tool service. Finished rollouts are
sent in the format of the recordings, so every process learns from what a resumed run would read. Decisions about them
(masked share, which are sampled again) are made on all rollouts, identically in every process. Nothing is pickled.
"""

import asyncio
import contextlib
import dataclasses
import socket
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Protocol

import jax
from ml_collections import ConfigDict

from stepdr_jax.agent.tools import Host, Tools
from stepdr_jax.errors import UserError
from stepdr_jax.records import Task
from stepdr_jax.rl import recordings
from stepdr_jax.rl.rollouts import Rollout
from stepdr_jax.runtime import distributed, stages

_LENGTH = 8  # bytes of the length before the rows


class Collect(Protocol):
    """`rollouts.collect_rollouts` with everything but these arguments bound."""

    async def __call__(
        self, tasks: Sequence[Task], seeds: Sequence[int], *, before: Sequence[Rollout]
    ) -> list[Rollout]: ...


async def collect_over_hosts(
    collect: Collect,
    collective_lock: asyncio.Lock,
    tasks: Sequence[Task],
    seeds: Sequence[int],
    *,
    before: Sequence[Rollout] = (),
) -> list[Rollout]:
    """Runs `collect` on this process's share of the tasks; every process returns all rollouts, in order.

    Every process must call it with the same arguments. An error in one process ends it, and with it the run.
    `collective_lock` is held while rollouts are exchanged.
    """
    if jax.process_count() == 1:
        return await collect(tasks, seeds, before=before)
    mine = range(jax.process_index(), len(tasks), jax.process_count())
    own = await collect(
        [tasks[i] for i in mine], [seeds[i] for i in mine], before=[before[i] for i in mine] if before else []
    )
    own = [dataclasses.replace(episode, index=index) for index, episode in zip(mine, own, strict=True)]
    # In a thread: the event loop must keep answering the tool host's pings.
    async with collective_lock:
        gathered = await asyncio.to_thread(distributed.gather_bytes, encode_rollouts(own))
    known = {task.id: task for task in tasks}
    found = [episode for data in gathered for episode in decode_rollouts(data, known)]
    return sorted(found, key=lambda episode: episode.index)


def read_on_lead(read: Callable[[], list[Rollout] | None], tasks: Mapping[str, Task]) -> list[Rollout] | None:
    """Returns in every process the rollouts that the lead process reads from its disk; `tasks` by id."""
    found = read() if distributed.is_lead() else None
    if jax.process_count() == 1:
        return found
    lead = distributed.gather_bytes(encode_rollouts(found or []))[0]
    return decode_rollouts(lead, tasks) or None


def encode_rollouts(episodes: Sequence[Rollout]) -> bytes:
    """The two files of a recording, concatenated; empty for no rollouts."""
    if not episodes:
        return b""
    with tempfile.TemporaryDirectory() as folder:
        recordings.save_rollouts(Path(folder), 0, episodes, "")
        rows, logs = (path.read_bytes() for path in recordings.recording_paths(Path(folder), 0))
    return len(rows).to_bytes(_LENGTH, "little") + rows + logs


def decode_rollouts(data: bytes, tasks: Mapping[str, Task]) -> list[Rollout]:
    """The inverse of `encode_rollouts`. Raises UserError for tasks that are not among `tasks`."""
    if not data:
        return []
    end = _LENGTH + int.from_bytes(data[:_LENGTH], "little")
    with tempfile.TemporaryDirectory() as folder:
        for path, part in zip(
            recordings.recording_paths(Path(folder), 0), (data[_LENGTH:end], data[end:]), strict=True
        ):
            path.write_bytes(part)
        return recordings.load_rollouts(Path(folder), 0, tasks) or []


@contextlib.contextmanager
def tools_for_process(
    config: ConfigDict, start_host: Callable[[], contextlib.AbstractContextManager[Host | None]]
) -> Iterator[Callable[[], Tools]]:
    """Yields what connects this process to the tools: at config.tools.address, else at the host that the lead starts.

    Raises UserError without an address when the processes are on several machines: our host listens on loopback.
    """
    if jax.process_count() == 1 or config.tools.address:
        with start_host() as host:
            yield lambda: Tools.from_config(config, host)
        return
    machines = set(distributed.gather_bytes(socket.gethostname().encode()))
    if len(machines) > 1:
        command = stages.command_line("launch.serve_tools", config, "--host=0.0.0.0")
        raise UserError(
            f"tools.address: the processes are on {len(machines)} machines, which cannot share a tool host on "
            f"loopback; start {command} where all can reach it and pass its --config.tools.address=host:port"
        )
    with start_host() if distributed.is_lead() else contextlib.nullcontext() as host:
        address = distributed.gather_bytes(b"" if host is None else host.address.encode())[0].decode()
        yield lambda: Tools(address, call_timeout=config.tools.call_timeout, host=host)
