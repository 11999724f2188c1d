"""Facts about death and return: replies survive it, nothing with effects runs twice, other workers go on."""

import asyncio
import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import pytest

from tools_env.client import ToolInfraError, ToolsClient
from tools_env.errors import CallUnfinished, RetryLater, ToolHostError, Unavailable
from tools_env.process import ToolHost
from tools_env.protocol import tools_pb2
from tools_env.service.service import ToolService
from tools_env.service.sessions import Budget, Sessions, SessionSpec, owning_worker
from tools_env.tools.base import Tool, ToolOutput

ROOT = Path(__file__).resolve().parents[2]
APPEND = {"op": "append", "path": "a.md", "content": "x"}


def test_restarted_host_serves_finished_replies_again_and_keeps_budget_files_and_citations(running, tmp_path):
    async def main():
        budget = dict(max_tool_calls=6, calls_per_tool={"file": 3})
        async with running(state_dir=str(tmp_path)) as it:
            session = await it.client.open_session("e", **budget)
            found = await session.call("batch_web_surfer", {"queries": ["capital of Austria"]}, call_id="0")
            first = await session.call("file", APPEND, call_id="1")
        async with running(state_dir=str(tmp_path)) as it:
            session._client = it.client
            assert await session.call("file", APPEND, call_id="1") == first
            stat = await session.call("file", {"op": "stat", "path": "a.md"}, call_id="2")
            assert stat.text.startswith("a.md: 1 characters")
            assert stat.remaining == {"tool_calls": 3, "calls_per_tool.file": 1}
            opened = await session.call("batch_web_surfer", {"urls": [found.sources[0].id]}, call_id="3")
            assert "not a citation shown in this session" not in opened.text

    asyncio.run(main())


def test_call_that_was_cut_off_is_not_run_again_unless_it_changes_nothing(tmp_path):
    async def main():
        runs = []
        sessions = Sessions(tmp_path, lease=60.0, durable=True)
        session = sessions.open(SessionSpec("r", "e", Budget()))

        async def cut_off():
            session.begin("0")
            runs.append("0")
            raise RuntimeError("killed")

        with pytest.raises(RuntimeError):
            await session.once("0", "shell", cut_off)
        for again in (session, Sessions(tmp_path, lease=60.0, durable=True).get(session.id)):
            with pytest.raises(CallUnfinished, match="not run again"):
                await again.once("0", "shell", cut_off)
        assert runs == ["0"]

    asyncio.run(main())


def test_call_that_a_tool_refused_before_any_effect_runs_when_it_comes_again(tmp_path):
    """Also in the next process, which finds the beginning and its withdrawal in the journal."""

    async def main():
        refusals = [Unavailable("no browser"), RetryLater("full", 0.1)]

        async def run(call, arguments):
            if refusals:
                raise refusals.pop()
            return ToolOutput("done")

        tool = Tool("click", "d", {"type": "object", "properties": {}}, run)
        limits = dict(lease=60.0, max_chars=700, concurrency=1, queue=1)
        sessions = Sessions(tmp_path, lease=60.0, durable=True)
        session = sessions.open(SessionSpec("r", "e", Budget(tool_calls=2)))
        for host in (sessions, Sessions(tmp_path, lease=60.0, durable=True)):
            with pytest.raises((RetryLater, Unavailable)):
                await ToolService([tool], host, **limits).call(session.id, "0", "click", "{}", time.monotonic() + 5)
        last = Sessions(tmp_path, lease=60.0, durable=True)
        reply = await ToolService([tool], last, **limits).call(session.id, "0", "click", "{}", time.monotonic() + 5)
        assert b"done" in reply and last.get(session.id).remaining().tool_calls == 1

    asyncio.run(main())


def test_torn_last_line_of_a_journal_is_dropped_and_an_ended_lease_is_not_taken_up(tmp_path):
    sessions = Sessions(tmp_path, lease=60.0, durable=True)
    torn, old = (sessions.open(SessionSpec(name, "e", Budget(tool_calls=2))) for name in "ab")
    with open(torn.directory / "journal.jsonl", "a") as file:
        file.write('{"done": "0", "asked": "x", "to')
    os.utime(old.directory / "journal.jsonl", (1, 1))
    again = Sessions(tmp_path, lease=60.0, durable=True)
    assert again.get(torn.id).remaining().tool_calls == 2 and len(again) == 1
    assert not old.directory.exists()
    assert json.loads((torn.directory / "journal.jsonl").read_text())["open"]["request_id"] == "a"


def test_calls_of_one_tool_have_a_budget_of_their_own(running):
    async def main():
        async with running() as it:
            session = await it.client.open_session("e", calls_per_tool={"todo": 1})
            assert (await session.call("todo", {}, call_id="0")).remaining == {"calls_per_tool.todo": 0}
            over = await session.call("todo", {}, call_id="1")
            assert (over.outcome, over.text) == ("budget_exhausted", "No calls of todo left (limit 1).")
            assert (await session.call("file", {"op": "list"}, call_id="2")).outcome == "ok"

    asyncio.run(main())


def test_session_ids_cannot_be_guessed_from_others(tmp_path):
    sessions = Sessions(tmp_path, lease=60.0, durable=False)
    secrets = [sessions.open(SessionSpec(str(i), "e", Budget())).id.rsplit("_", 1)[1] for i in range(200)]
    bits = [int(secret, 16) for secret in secrets]
    assert all(len(secret) == 16 for secret in secrets) and len(set(bits)) == 200
    ones = [sum(b >> place & 1 for b in bits) for place in range(64)]
    assert all(60 < n < 140 for n in ones)  # every bit is drawn: 100, give or take 5.7 deviations
    assert len({b - a for a, b in zip(bits, bits[1:], strict=False)}) == 199


def test_session_ids_name_their_worker_and_nothing_else_does():
    assert [owning_worker(f"session_{i}_ab", 3) for i in range(4)] == [0, 1, 2, 0]
    assert {
        owning_worker(name, 3) for name in ("", "x", "session_1", "session_-1_a", "session_9999999_a", "a_b_c")
    } == {None}


def test_state_folder_of_a_running_host_is_refused(running, tmp_path):
    async def main():
        async with running(state_dir=str(tmp_path)):
            with pytest.raises(ToolHostError, match="in use by another tool host"):
                async with running(state_dir=str(tmp_path)):
                    pass

    asyncio.run(main())


def children(pid: int) -> dict[int, int]:
    """Worker number -> process id, from the supervisor's children."""
    found = {}
    for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split():
        command = Path(f"/proc/{child}/cmdline").read_text().split("\0")
        flags = dict(part.partition("=")[::2] for part in command)
        found[int(flags.get("--worker", 0))] = int(child)
    return found


def test_killed_worker_returns_with_its_sessions_while_the_others_go_on(offline_web, tmp_path):
    with socket.create_server(("127.0.0.1", 0)) as free:
        metrics_port = free.getsockname()[1]
    port_file = tmp_path / "address"
    command = [sys.executable, "-m", "tools_env.server", f"--offline_web={offline_web}", "--workers=3", "--web_port=9"]
    command += [f"--metrics_port={metrics_port}", f"--port_file={port_file}", "--stop_with_stdin"]
    process = subprocess.Popen(command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    try:
        address = process.stdout.readline().strip()

        async def main():
            clients = [ToolsClient(address, channels=4, call_timeout=20.0)]
            sessions = [await clients[0].open_session(str(i)) for i in range(12)]
            places = {owning_worker(session.id, 3) for session in sessions}
            for attempt in range(30):  # a connection ends at any worker: open more until each has a session
                if places == {0, 1, 2}:
                    break
                clients.append(ToolsClient(address, channels=1, call_timeout=20.0))
                sessions.append(await clients[-1].open_session(f"more {attempt}"))
                places.add(owning_worker(sessions[-1].id, 3))
            assert places == {0, 1, 2}
            first = await asyncio.gather(*(s.call("file", APPEND, call_id="0") for s in sessions))
            # Each of the pool's connections ends at some worker; every session is reached over all of them.
            other = ToolsClient(address, channels=8, call_timeout=20.0)
            for session in sessions:
                session._client, session._where["place"] = other, session._where["place"] + 3
            os.kill(children(process.pid)[1], signal.SIGKILL)
            request = tools_pb2.OpenSessionRequest(episode_id="fresh")
            await other._call("OpenSession", request, 20.0)
            again = await asyncio.gather(*(s.call("file", APPEND, call_id="0") for s in sessions))
            assert again == first
            stats = await asyncio.gather(
                *(s.call("file", {"op": "stat", "path": "a.md"}, call_id="1") for s in sessions)
            )
            assert {stat.text.split(",")[0] for stat in stats} == {"a.md: 1 characters"}
            with pytest.raises(ToolInfraError, match="NOT_FOUND"):
                await other._call("CallTool", tools_pb2.CallToolRequest(session_id="x", call_id="0"), 5.0)
            for client in (*clients, other):
                await client.close()

        asyncio.run(main())
        text = urllib.request.urlopen(f"http://127.0.0.1:{metrics_port}/metrics").read().decode()
        total = re.search(r'^stepdr_tool_calls_total\{outcome="ok",tool="file"\} (\S+)$', text, re.MULTILINE)
        assert float(total.group(1)) == 24.0
        taken = ToolHost(offline_web, web_port=9, port=int(address.rsplit(":")[1]), log_path=tmp_path / "log")
        with pytest.raises(ToolHostError, match="cannot listen on"):
            taken.start()
        kept = list(children(process.pid).values())
        process.send_signal(signal.SIGTERM)
        assert process.wait(15) == 0
        assert not [pid for pid in kept if Path(f"/proc/{pid}").exists()]
    finally:
        process.kill()
        process.wait()
        process.stdout.close()
        process.stdin.close()
