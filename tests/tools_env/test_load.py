"""The load generator against worker processes of which one is killed in the middle: nothing lost, doubled or leaked."""

import asyncio
import collections
import json
import os
import shutil
import signal
import time
from pathlib import Path

import grpc
import pytest

from tools_env.check import chaos, load
from tools_env.client import ToolsClient
from tools_env.process import ToolHost
from tools_env.protocol import tools_pb2


def test_kill_of_a_worker_under_load_loses_and_doubles_nothing(offline_web, tmp_path):
    with ToolHost(offline_web, web_port=9, workers=2, log_path=tmp_path / "log") as host:
        workers = Path(f"/proc/{host.pid}/task/{host.pid}/children").read_text().split()

        async def main():
            client = ToolsClient(host.address, channels=4, call_timeout=20.0)
            running = asyncio.create_task(load.run_load(client, sessions=60, seconds=3.0, think=0.2, pid=host.pid))
            await asyncio.sleep(1.0)
            os.kill(int(workers[1]), signal.SIGKILL)
            found = await running
            await client.close()
            return found

        found = asyncio.run(main())
    assert (found.lost, found.duplicated, found.leaked) == (0, 0, 0)
    assert set(found.failed) <= {"ABORTED"}  # a call that was cut off in its tool; it is not run again
    assert found.calls > 200 and found.memory


def test_generator_sees_a_mark_that_is_lost_doubled_or_of_another_session():
    class Session:
        async def call(self, tool, arguments, *, call_id):
            from tools_env.client import ToolResult

            text = "<other/0><0-0/1><0-0/1>" if arguments.get("op") == "read" else "done"
            return ToolResult("ok", text, (), False, False, {})

        async def close(self):
            pass

    class Client:
        async def open_session(self, name):
            return Session()

    found = asyncio.run(load.run_load(Client(), sessions=1, seconds=0.05, think=0.001))
    assert found.lost > 0 and (found.duplicated, found.leaked) == (1, 1)


@pytest.mark.skipif(not shutil.which("redis-server"), reason="redis-server is not installed")
@pytest.mark.skipif(not shutil.which("bwrap") or not shutil.which("tmux"), reason="bubblewrap or tmux is not installed")
def test_kills_of_workers_and_redis_run_no_command_twice_and_keep_every_reply(offline_web, tmp_path):
    with chaos.RedisServer() as redis:
        options = json.dumps({"shell": {"accept_weaker_isolation": True}})
        settings = dict(workers=2, tools="shell", tool_options=options, redis_url=redis.url)
        with ToolHost(offline_web, web_port=9, log_path=tmp_path / "log", **settings) as host:

            async def main():
                client = ToolsClient(host.address, channels=4, call_timeout=20.0)
                killer = asyncio.create_task(chaos.kill_parts(["worker", "redis"], host.pid, redis, 1.5, 6.5))
                found = await load.run_load(client, sessions=6, seconds=6.0, think=0.1, pid=host.pid, shell=0.4)
                await client.close()
                return found, await killer

            found, killed = asyncio.run(main())
    assert {"worker", "redis"} <= set(killed)
    assert found.clean, load.format_report(found)
    assert set(found.failed) <= {"ABORTED", "UNAVAILABLE"}
    assert found.shell_calls > 10


def test_overload_is_refused_in_time_and_never_hangs(offline_web, tmp_path):
    """Sixty sessions without a pause, one slot and one place in the queue of each tool: refusals, then recovery."""
    with ToolHost(offline_web, web_port=9, concurrency=1, queue=1, log_path=tmp_path / "log") as host:

        async def main():
            client = ToolsClient(host.address, channels=4)
            session = await client.open_session(
                "slow", faults={"tools": {"todo": [{"kind": "latency", "rate": 1.0, "seconds": 0.2}]}}
            )
            stub = client._connected()

            async def one(i):
                request = tools_pb2.CallToolRequest(
                    session_id=session.id, call_id=str(i), tool="todo", arguments_json="{}"
                )
                try:
                    await stub.CallTool(request, timeout=5)
                    return "ok"
                except grpc.aio.AioRpcError as error:
                    return error.code().name

            began = time.monotonic()
            answers = collections.Counter(await asyncio.gather(*(one(i) for i in range(60))))
            took = time.monotonic() - began
            assert (await session.call("todo", {}, call_id="after")).outcome == "ok"
            await client.close()
            return answers, took

        answers, took = asyncio.run(main())
    assert set(answers) == {"ok", "RESOURCE_EXHAUSTED"} and answers["RESOURCE_EXHAUSTED"] >= 40
    assert took < 4.0
