"""Facts about the retrieval cache, the same for SQLite and for a real Redis where redis-server is installed."""

import asyncio
import contextlib
import shutil
import socket
import subprocess
import time

import pytest

from tools_env.cache.retrieval import SESSION_MODE, RetrievalCache
from tools_env.cache.stores import RedisStore, SqliteStore
from tools_env.errors import ToolError, ToolHostError, Unavailable


@pytest.fixture(scope="module")
def redis_url(tmp_path_factory):
    program = shutil.which("redis-server")
    if program is None:
        pytest.skip("redis-server is not installed (apt-get install redis-server)")
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    folder = tmp_path_factory.mktemp("redis")
    command = [program, "--port", str(port), "--bind", "127.0.0.1", "--save", "", "--dir", str(folder)]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    end = time.monotonic() + 10
    while time.monotonic() < end:
        try:
            socket.create_connection(("127.0.0.1", port), 1).close()
            break
        except OSError:
            time.sleep(0.02)
    yield f"redis://127.0.0.1:{port}/0"
    process.kill()
    process.wait()


@pytest.fixture(params=["sqlite", "redis"])
def make_store(request, tmp_path):
    """Returns a function that connects once more to the same, empty store."""
    if request.param == "sqlite":
        return lambda: SqliteStore(tmp_path / "cache.sqlite", shared=True)
    url = request.getfixturevalue("redis_url")

    async def empty():
        store = RedisStore(url)
        await store._redis.flushall()
        await store.aclose()

    asyncio.run(empty())
    return lambda: RedisStore(url)


def counted(value="v", gate=None, error=None):
    async def compute():
        compute.count += 1
        if gate is not None:
            await gate.wait()
        if error is not None:
            raise error
        return {"value": value}

    compute.count = 0
    return compute


def test_value_outlives_the_cache_that_computed_it(make_store):
    async def main():
        compute = counted("奥地利")
        assert await RetrievalCache(store=make_store()).get("k", compute) == ({"value": "奥地利"}, False)
        assert await RetrievalCache(store=make_store()).get("k", compute) == ({"value": "奥地利"}, True)
        assert compute.count == 1

    asyncio.run(main())


def test_processes_that_miss_together_compute_once(make_store):
    async def main():
        gate = asyncio.Event()
        compute = counted(gate=gate)
        caches = [RetrievalCache(store=make_store()) for _ in range(5)]
        asked = [asyncio.create_task(cache.get("k", compute)) for cache in caches for _ in range(3)]
        while not compute.count:
            await asyncio.sleep(0)
        gate.set()
        assert {value["value"] for value, _ in await asyncio.gather(*asked)} == {"v"}
        assert compute.count == 1

    asyncio.run(main())


def test_failure_is_not_stored_and_frees_the_claim(make_store):
    async def main():
        first, second = RetrievalCache(store=make_store()), RetrievalCache(store=make_store())
        with pytest.raises(ToolError, match="HTTP 503"):
            await first.get("k", counted(error=ToolError("HTTP 503")))
        assert await asyncio.wait_for(second.get("k", counted()), 5) == ({"value": "v"}, False)

    asyncio.run(main())


def test_cancelled_computation_frees_the_claim(make_store):
    async def main():
        compute = counted(gate=asyncio.Event())
        first = asyncio.create_task(RetrievalCache(store=make_store()).get("k", compute))
        while not compute.count:
            await asyncio.sleep(0)
        first.cancel()
        await asyncio.gather(first, return_exceptions=True)
        assert (await asyncio.wait_for(RetrievalCache(store=make_store()).get("k", counted()), 5))[0] == {"value": "v"}

    asyncio.run(main())


def test_claim_of_a_process_that_died_ends_by_itself(make_store):
    async def main():
        store = make_store()
        assert await store.claim("k", 0.1) and await store.claim("k", 0.1) is None
        await asyncio.sleep(0.15)
        token = await store.claim("k", 10.0)
        await store.release("k", "of another")
        assert await store.claim("k", 10.0) is None
        await store.release("k", token)
        assert await store.claim("k", 10.0)

    asyncio.run(main())


def test_failure_is_told_again_for_a_moment_only():
    async def main():
        now = [0.0]
        cache = RetrievalCache(failure_seconds=2.0, clock=lambda: now[0])
        failing = counted(error=ToolError("HTTP 503"))
        for _ in range(3):
            with pytest.raises(ToolError, match="HTTP 503"):
                await cache.get("k", failing)
        assert failing.count == 1
        now[0] = 2.1
        assert (await cache.get("k", counted()))[0] == {"value": "v"}

    asyncio.run(main())


def test_fault_of_the_host_is_not_told_again():
    async def main():
        cache = RetrievalCache(failure_seconds=60.0)
        with pytest.raises(RuntimeError):
            await cache.get("k", counted(error=RuntimeError("bug")))
        assert (await cache.get("k", counted()))[0] == {"value": "v"}

    asyncio.run(main())


def test_session_mode_goes_before_the_hosts():
    async def main():
        cache, compute = RetrievalCache(), counted()
        await cache.get("k", compute)
        SESSION_MODE.set("live")
        assert (await cache.get("k", compute))[1] is False and compute.count == 2
        SESSION_MODE.set("replay_only")
        assert (await cache.get("k", compute))[1] is True
        with pytest.raises(ToolError, match="not in the replayed cache"):
            await cache.get("other", compute)

    asyncio.run(main())


def test_redis_that_is_gone_costs_speed_but_no_call():
    async def main():
        counts = []
        cache = RetrievalCache(store=RedisStore("redis://127.0.0.1:1/0"), count=counts.append)
        assert await cache.get("k", counted()) == ({"value": "v"}, False)
        assert "store_error" in counts
        strict = RetrievalCache(store=RedisStore("redis://127.0.0.1:1/0"), mode="replay_only")
        with pytest.raises(Unavailable, match="does not answer"):
            await strict.get("k", counted())

    asyncio.run(main())


def test_redis_killed_in_the_middle_loses_no_call_and_is_used_again_when_it_returns(tmp_path):
    program = shutil.which("redis-server")
    if program is None:
        pytest.skip("redis-server is not installed (apt-get install redis-server)")
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]

    def start():
        command = [program, "--port", str(port), "--bind", "127.0.0.1", "--save", "", "--dir", str(tmp_path)]
        return subprocess.Popen(command, stdout=subprocess.DEVNULL)

    async def main():
        process, now = start(), [0.0]
        try:
            while process.poll() is None:
                with contextlib.suppress(OSError):
                    socket.create_connection(("127.0.0.1", port), 1).close()
                    break
            cache = RetrievalCache(store=RedisStore(f"redis://127.0.0.1:{port}/0"), entries=1, clock=lambda: now[0])
            assert (await cache.get("before", counted()))[1] is False
            process.kill()
            process.wait()
            results = await asyncio.gather(*(cache.get(f"k{i}", counted(i)) for i in range(50)))
            assert [value["value"] for value, _ in results] == list(range(50))
            process = start()
            now[0] += 10.0
            while (await cache.get("after", counted()))[1] is False:
                await cache.get("other", counted())  # holds one value in memory, so "after" must come from Redis
                now[0] += 10.0
        finally:
            process.kill()
            process.wait()

    asyncio.run(asyncio.wait_for(main(), 30))


def test_address_that_is_no_redis_is_named():
    with pytest.raises(ToolHostError, match="write redis://host:port/0"):
        RedisStore("http://127.0.0.1")
