"""The load generator against worker processes of which one is killed in the middle: nothing lost, doubled or leaked."""

import asyncio
import os
import signal
from pathlib import Path

from tools_env import load
from tools_env.client import ToolsClient
from tools_env.process import ToolHost


def test_kill_of_a_worker_under_load_loses_and_doubles_nothing(world, tmp_path):
    with ToolHost(world, web_port=9, workers=2, log_path=tmp_path / "log") as host:
        workers = Path(f"/proc/{host.pid}/task/{host.pid}/children").read_text().split()

        async def main():
            client = ToolsClient(host.address, channels=4, call_timeout=20.0)
            running = asyncio.create_task(load.run(client, sessions=60, seconds=3.0, think=0.2, pid=host.pid))
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

    found = asyncio.run(load.run(Client(), sessions=1, seconds=0.05, think=0.001))
    assert found.lost > 0 and (found.duplicated, found.leaked) == (1, 1)
