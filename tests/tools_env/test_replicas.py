"""Facts about replicas behind one address: a session stays where it was opened, and what one fetched the other has."""

import asyncio
import contextlib
import itertools
import shutil
import socket

import pytest

from tools_env.check import chaos
from tools_env.client import ToolsClient
from tools_env.process import ToolHost


@contextlib.asynccontextmanager
async def balancer(targets: list[str]):
    """One address; each new connection goes to the next target, as behind a Service."""
    turn, counts = itertools.cycle(targets), dict.fromkeys(targets, 0)

    async def pass_on(reader, writer):
        with contextlib.suppress(OSError):
            while data := await reader.read(1 << 16):
                writer.write(data)
                await writer.drain()
        writer.close()

    async def take(reader, writer):
        target = next(turn)
        counts[target] += 1
        host, port = target.split(":")
        there_reader, there_writer = await asyncio.open_connection(host, int(port))
        await asyncio.gather(pass_on(reader, there_writer), pass_on(there_reader, writer))

    server = await asyncio.start_server(take, "127.0.0.1", 0)
    try:
        yield f"127.0.0.1:{server.sockets[0].getsockname()[1]}", counts
    finally:
        server.close()


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as free:
        return free.getsockname()[1]


@pytest.mark.skipif(not shutil.which("redis-server"), reason="redis-server is not installed")
def test_two_hosts_behind_one_address_keep_sessions_and_share_a_cache(offline_web, tmp_path):
    async def main(addresses):
        async with balancer(addresses) as (address, counts):
            client = ToolsClient(address, channels=4)
            sessions = [await client.open_session(str(i)) for i in range(8)]
            assert min(counts.values()) > 0
            by_host = {a: [s for s in sessions if s._where["address"] == a] for a in addresses}
            assert all(by_host.values())
            for i in range(3):  # over whichever connection: each call finds its session and its files
                append = {"op": "append", "path": "a", "content": "x"}
                done = await asyncio.gather(*(s.call("file", append, call_id=str(i)) for s in sessions))
                assert {reply.outcome for reply in done} == {"ok"}
            stats = [await s.call("file", {"op": "stat", "path": "a"}, call_id="s") for s in sessions]
            assert {stat.text.split(",")[0] for stat in stats} == {"a: 3 characters"}
            found = [
                await by_host[a][0].call("batch_web_surfer", {"queries": ["capital of Hungary"]}, call_id="q")
                for a in addresses
            ]
            assert [reply.cache_hit for reply in found] == [False, True] and found[0].text == found[1].text
            for session in sessions:
                await session.close()
            await client.close()

    with chaos.RedisServer() as redis, contextlib.ExitStack() as hosts:
        addresses = []
        for i in range(2):
            port = free_port()
            settings = dict(port=port, advertise=f"127.0.0.1:{port}", redis_url=redis.url)
            host = ToolHost(offline_web, web_port=9, log_path=tmp_path / f"log{i}", **settings)
            addresses.append(hosts.enter_context(host).address)
        asyncio.run(main(addresses))
