"""The compliance suite passes on our host, alone and as several workers, and fails where a server is wrong."""

import asyncio

import pytest

from tools_env.check import compliance
from tools_env.process import ToolHost
from tools_env.service.sessions import Session


def states(results):
    return {result.check: result.state for result in results}


def test_our_host_complies(running):
    async def main():
        async with running(token="secret", client_token="secret") as it:
            results = await compliance.check_server(it.address, "secret")
            assert [r for r in results if r.state != "passed"] == []

    asyncio.run(main())


def test_workers_behind_one_port_comply(offline_web, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("STEPDR_TOOLS_TOKEN", "secret")
    with ToolHost(offline_web, web_port=9, token="secret", workers=2, log_path=tmp_path / "log") as host:
        assert compliance.main([f"--address={host.address}"]) == 0
    assert "18 passed, 0 failed, 0 skipped" in capsys.readouterr().out


@pytest.mark.parametrize(
    "attribute, broken, failing",
    [
        ("once", lambda self, call_id, asked, execute: execute_anew(self, asked, execute), "repeated_call_is_replayed"),
        ("spent", lambda self, tool: None, "budgets_are_echoed_and_end"),
    ],
)
def test_server_without_a_guard_fails_its_check(running, monkeypatch, attribute, broken, failing):
    monkeypatch.setattr(Session, attribute, broken)

    async def main():
        async with running() as it:
            assert states(await compliance.check_server(it.address))[failing] == "failed"

    asyncio.run(main())


async def execute_anew(session, asked, execute):
    """What a server does that forgets its replies."""
    session.begin = lambda call_id: None
    session.finish = lambda *_: None
    return await execute()


def test_address_without_a_server_fails_every_check(monkeypatch):
    monkeypatch.setattr(compliance, "SECONDS", 0.2)
    assert "passed" not in states(asyncio.run(compliance.check_server("127.0.0.1:1"))).values()
