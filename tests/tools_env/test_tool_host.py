"""Facts about the tool host as a process of its own."""

import asyncio
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from tools_env.client import ToolInfraError, ToolsClient
from tools_env.errors import ToolHostError
from tools_env.process import ToolHost
from tools_env.server import parse_flags

ROOT = Path(__file__).resolve().parents[2]


def ask(address, arguments, token=None):
    async def main():
        client = ToolsClient(address, token=token)
        try:
            session = await client.open_session("e")
            return await session.call("batch_web_surfer", arguments, call_id="0.0")
        finally:
            await client.close()

    return asyncio.run(main())


def test_host_serves_restarts_on_its_port_and_stops(offline_web, tmp_path):
    with ToolHost(offline_web, web_port=9, token="secret", topk=1, log_path=tmp_path / "log") as host:
        first = ask(host.address, {"queries": ["capital of Austria"]}, token="secret")
        assert len(first.sources) == 1 and first.text.splitlines()[1].startswith("The capital of Austria is Vienna.")
        with pytest.raises(ToolInfraError, match="UNAUTHENTICATED"):
            ask(host.address, {"queries": ["x"]})

        async def over_a_restart():
            client = ToolsClient(host.address, token="secret")
            session = await client.open_session("e")
            await session.call("todo", {}, call_id="0.0")
            os.kill(host.pid, signal.SIGKILL)
            host._process.wait()
            assert not host.alive()
            before, after = host.address, host.restart()
            assert before == after and host.alive()
            await client.wait_ready(10.0)
            with pytest.raises(ToolInfraError) as lost:
                await session.call("todo", {}, call_id="1.0")
            assert lost.value.status == "NOT_FOUND"
            fresh = await client.open_session("e")
            again = await fresh.call("batch_web_surfer", {"queries": ["capital of Austria"]}, call_id="0.0")
            await client.close()
            return again

        assert asyncio.run(over_a_restart()).text == first.text

        other = ToolHost(offline_web, web_port=9, port=int(host.address.rsplit(":")[1]), log_path=tmp_path / "other")
        with pytest.raises(ToolHostError, match="the port is in use"):
            other.start()
    assert not host.alive()
    host.stop()


def test_world_that_is_missing_is_named(tmp_path):
    with pytest.raises(ToolHostError, match="sites.json does not exist; build the offline web first"):
        ToolHost(tmp_path / "none", web_port=9, log_path=tmp_path / "log").start()


def test_setting_that_cannot_work_is_named(tmp_path):
    with pytest.raises(ToolHostError, match="expected concurrency above 0 .*, got 0"):
        ToolHost(tmp_path, concurrency=0)


def test_sigterm_drains_the_call_in_flight_and_ends_cleanly(offline_web, tmp_path):
    """A page whose reply is held back until after the signal still reaches the caller."""
    port_file = tmp_path / "port"
    listener = socket.create_server(("127.0.0.1", 0))
    command = [
        sys.executable,
        "-m",
        "launch.serve_tools",
        f"--offline_web={offline_web}",
        "--port=0",
        f"--port_file={port_file}",
    ]
    command += [f"--web_port={listener.getsockname()[1]}", "--config.tools.fetch_timeout=20"]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True)
    try:
        address = process.stdout.readline().strip()
        assert port_file.read_text().strip() == address

        async def main():
            client = ToolsClient(address)
            session = await client.open_session("e")
            opened = {"urls": ["http://atlas.test/held"]}
            call = asyncio.create_task(session.call("batch_web_surfer", opened, call_id="0.0"))
            connection, _ = await asyncio.to_thread(listener.accept)
            await asyncio.to_thread(connection.recv, 1000)
            process.send_signal(signal.SIGTERM)
            with pytest.raises(ToolInfraError):
                while True:  # until the signal has been handled, new calls are still taken
                    await client.list_tools()
            body = b"<main><p>Held text.</p></main>"
            connection.sendall(
                b"HTTP/1.1 200 OK\r\nContent-Type: text/html\r\nContent-Length: %d\r\n\r\n" % len(body) + body
            )
            connection.close()
            result = await call
            await client.close()
            return result

        assert "Held text." in asyncio.run(main()).text
        assert process.wait(10) == 0
    finally:
        process.kill()
        process.wait()
        process.stdout.close()
        listener.close()


def test_host_stops_when_the_process_that_started_it_ends(offline_web, tmp_path):
    code = (
        "import os, sys; from tools_env.process import ToolHost\n"
        f"host = ToolHost({str(offline_web)!r}, web_port=9, log_path={str(tmp_path / 'log')!r}); host.start()\n"
        "print(host.pid, flush=True); os._exit(0)"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    descriptor = None
    try:
        descriptor = os.pidfd_open(int(done.stdout))
    except ProcessLookupError:
        return
    import select

    try:
        assert select.select([descriptor], [], [], 10.0)[0]
    finally:
        os.close(descriptor)


def test_flags_carry_every_setting(monkeypatch):
    monkeypatch.setenv("STEPDR_TOOLS_TOKEN", "secret")
    settings, flags = parse_flags(
        ["--offline_web=w", "--topk=3", "--fetch_timeout=0.5", "--port_file=p", "--web_port=7"]
    )
    assert (settings.offline_web, settings.topk, settings.fetch_timeout, settings.web_port) == ("w", 3, 0.5, 7)
    assert (settings.token, settings.state_dir, settings.allow_internet) == ("secret", None, False)
    assert (flags.port_file, flags.mcp, flags.stop_with_stdin) == ("p", False, False)
