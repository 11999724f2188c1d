"""PPO among several processes: each samples its share of an iteration's episodes, and all then have all of them.

A process runs its own sampler on its own devices and its own connections to the tool service. Finished episodes travel in
the form of the recordings, so what the others learn from is what a resumed run would read; every decision about them
(masked shares, what is sampled again) is made on the whole, in every process alike. Nothing is pickled.
"""

import asyncio
import contextlib
import dataclasses
import socket
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

import jax

from stepdr_jax.agent.tools import Host, Tools
from stepdr_jax.errors import UserError
from stepdr_jax.records import Task
from stepdr_jax.rl import recordings
from stepdr_jax.rl.rollouts import Episode
from stepdr_jax.runtime import distributed

_LENGTH = 8  # bytes of the length before the rows


async def collect(
    run, devices: asyncio.Lock, tasks: Sequence[Task], seeds: Sequence[int], *, before: Sequence[Episode] = ()
) -> list[Episode]:
    """`run(tasks, seeds, before=...)`, which is `rollouts.collect`, shared out: every process gets all episodes, in order.

    Every process must call it with the same arguments. An error in one ends that one, and with it the run. `devices` is
    held while episodes travel.
    """
    if jax.process_count() == 1:
        return await run(tasks, seeds, before=before)
    mine = range(jax.process_index(), len(tasks), jax.process_count())
    own = await run(
        *([of[place] for place in mine] for of in (tasks, seeds)), before=[before[p] for p in mine if before]
    )
    own = [dataclasses.replace(episode, index=place) for place, episode in zip(mine, own, strict=True)]
    # In a thread: the event loop goes on answering the tool host's pings.
    async with devices:
        gathered = await asyncio.to_thread(distributed.gather_bytes, encode(own))
    known = {task.id: task for task in tasks}
    found = [episode for data in gathered for episode in decode(data, known)]
    return sorted(found, key=lambda episode: episode.index)


def of_lead(read: Callable[[], list[Episode] | None], tasks: Mapping[str, Task]) -> list[Episode] | None:
    """What the lead reads from its disk, in every process."""
    found = read() if distributed.is_lead() else None
    if jax.process_count() == 1:
        return found
    lead = distributed.gather_bytes(encode(found or []))[0]
    return decode(lead, tasks) or None


def encode(episodes: Sequence[Episode]) -> bytes:
    """Episodes as a recording's two files, one after the other; no bytes for no episodes."""
    if not episodes:
        return b""
    with tempfile.TemporaryDirectory() as folder:
        recordings.save(Path(folder), 0, episodes, "")
        rows, logs = (path.read_bytes() for path in recordings.paths(Path(folder), 0))
    return len(rows).to_bytes(_LENGTH, "little") + rows + logs


def decode(data: bytes, tasks: Mapping[str, Task]) -> list[Episode]:
    """The episodes of `encode`. Raises UserError for tasks that are not among `tasks`."""
    if not data:
        return []
    end = _LENGTH + int.from_bytes(data[:_LENGTH], "little")
    with tempfile.TemporaryDirectory() as folder:
        for path, part in zip(recordings.paths(Path(folder), 0), (data[_LENGTH:end], data[end:]), strict=True):
            path.write_bytes(part)
        return recordings.load(Path(folder), 0, tasks)


@contextlib.contextmanager
def tools_of(
    config, start_host: Callable[[], contextlib.AbstractContextManager[Host | None]]
) -> Iterator[Callable[[], Tools]]:
    """How a process connects to the tools: to the host at config.tools.address, else to the one that the lead starts.

    Raises UserError when processes on other machines would have to reach a host that listens on loopback.
    """
    if jax.process_count() == 1 or config.tools.address:
        with start_host() as host:
            yield lambda: Tools.of(config, host)
        return
    machines = set(distributed.gather_bytes(socket.gethostname().encode()))
    if len(machines) > 1:
        raise UserError(
            f"tools.address: the processes are on {len(machines)} machines, which cannot share a tool host on loopback; "
            "start python -m launch.serve_tools where all reach it and give its --config.tools.address=host:port"
        )
    with start_host() if distributed.is_lead() else contextlib.nullcontext() as host:
        address = distributed.gather_bytes(b"" if host is None else host.address.encode())[0].decode()
        yield lambda: Tools(address, call_timeout=config.tools.call_timeout, host=host)
