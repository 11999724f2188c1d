"""Facts about the running service: sessions, budgets, idempotency, deadlines, backpressure, authentication."""

import asyncio
import json
import re

import grpc
import pytest
from google.rpc import error_details_pb2, status_pb2
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc

from tools_env.client import ToolInfraError, ToolsClient
from tools_env.protocol import tools_pb2
from tools_env.service.host import SERVICE


def search(*queries):
    return {"queries": list(queries)}


def test_search_text_shows_title_host_date_and_citation(running):
    async def main():
        async with running() as it:
            session = await it.client.open_session("e")
            result = await session.call("batch_web_surfer", search("capital of Austria"), call_id="0.0")
            first, second = result.sources
            assert result.outcome == "ok" and not result.truncated
            assert result.text == (
                "1. Austria | atlas.test | 2025-03-01\n"
                f"The capital of Austria is Vienna. \\cite{{{first.id}}}\n"
                "2. Austria in numbers | quickfacts.test | 2025-03-01\n"
                f"The capital of Austria is Salzburg. \\cite{{{second.id}}}"
            )
            assert (first.authority, second.authority) == (2, 0)

    asyncio.run(main())


def test_equal_calls_give_equal_text_and_the_second_comes_from_the_cache(running):
    async def main():
        async with running() as it:
            arguments = {"queries": ["capital of Hungary", "no such thing"], "urls": ["http://atlas.test/en/austria"]}
            results = []
            for episode in "ab":
                session = await it.client.open_session(episode)
                results.append(await session.call("batch_web_surfer", arguments, call_id="0.0"))
            assert results[0].text == results[1].text
            assert [r.cache_hit for r in results] == [False, True]
            assert "query: no such thing\nNo results." in results[0].text

    asyncio.run(main())


def test_repeated_call_id_replays_the_reply_and_spends_nothing(running):
    async def main():
        async with running() as it:
            session = await it.client.open_session("e", max_tool_calls=5)
            append = {"op": "append", "path": "a.md", "content": "x"}
            first = await session.call("file", append, call_id="0.0")
            again = await session.call("file", append, call_id="0.0")
            stat = await session.call("file", {"op": "stat", "path": "a.md"}, call_id="1.0")
            assert first == again and first.remaining["tool_calls"] == 4
            assert stat.text.startswith("a.md: 1 characters") and stat.remaining["tool_calls"] == 3

    asyncio.run(main())


def test_concurrent_duplicates_run_once(running):
    async def main():
        async with running() as it:
            it.site.gate = asyncio.Event()
            session = await it.client.open_session("e", max_tool_calls=5)
            opened = {"urls": ["http://slow.test/good"]}
            calls = [asyncio.create_task(session.call("batch_web_surfer", opened, call_id="0.0")) for _ in range(8)]
            while not it.site.requests:
                await asyncio.sleep(0)
            it.site.gate.set()
            results = await asyncio.gather(*calls)
            assert len(set(r.text for r in results)) == 1 and results[0].outcome == "ok"
            assert it.site.requests == ["slow.test/good"]
            assert results[0].remaining["tool_calls"] == 4

    asyncio.run(main())


def test_one_fetch_serves_concurrent_sessions(running):
    async def main():
        async with running() as it:
            it.site.gate = asyncio.Event()
            sessions = [await it.client.open_session(str(i)) for i in range(6)]
            opened = {"urls": ["http://slow.test/good"]}
            calls = [asyncio.create_task(s.call("batch_web_surfer", opened, call_id="0.0")) for s in sessions]
            while not it.site.requests:
                await asyncio.sleep(0)
            it.site.gate.set()
            assert {r.outcome for r in await asyncio.gather(*calls)} == {"ok"}
            assert len(it.site.requests) == 1

    asyncio.run(main())


def test_call_id_with_other_arguments_is_refused(running):
    async def main():
        async with running() as it:
            session = await it.client.open_session("e")
            await session.call("todo", {}, call_id="0.0")
            with pytest.raises(ToolInfraError, match="used for another call"):
                await session.call("todo", {"items": ["x"]}, call_id="0.0")

    asyncio.run(main())


def test_tool_call_budget_is_told_and_then_enforced(running):
    async def main():
        async with running() as it:
            session = await it.client.open_session("e", max_tool_calls=2)
            left = []
            for i in range(2):
                left.append((await session.call("todo", {}, call_id=f"{i}.0")).remaining["tool_calls"])
            over = await session.call("todo", {"items": ["x"]}, call_id="2.0")
            assert left == [1, 0]
            assert over.outcome == "budget_exhausted" and over.text == "No tool calls left (limit 2)."

    asyncio.run(main())


def test_output_token_and_time_budgets_are_enforced(running):
    async def main():
        async with running() as it:
            session = await it.client.open_session("e", max_output_tokens=10)
            first = await session.call("batch_web_surfer", search("capital of Austria"), call_id="0.0")
            second = await session.call("batch_web_surfer", search("capital of Austria"), call_id="1.0")
            assert (first.outcome, first.remaining["output_tokens"]) == ("ok", 0)
            assert second.outcome == "budget_exhausted"
            late = await it.client.open_session("e", wall_seconds=0.0)
            assert (await late.call("todo", {}, call_id="0.0")).outcome == "budget_exhausted"

    asyncio.run(main())


@pytest.mark.parametrize(
    "tool, arguments_json, message",
    [
        ("nothing", "{}", "no tool nothing; the tools are batch_web_surfer, file, todo"),
        ("todo", "{", "arguments are not valid JSON"),
        ("todo", "[]", "arguments must be an object"),
        ("file", '{"op": "write", "path": "a", "content": "\\ud800"}', "half of a surrogate pair"),
        ("batch_web_surfer", "{}", "queries or urls is missing"),
        ("batch_web_surfer", '{"queries": "x"}', "queries must be an array, got str"),
        ("batch_web_surfer", '{"queries": ["x"], "topk": 0}', "topk must be at least 1"),
        ("batch_web_surfer", '{"query": ["x"]}', "unknown field query; the fields are queries, topk, urls"),
        ("file", '{"op": "erase"}', "op must be one of read, write"),
        ("todo", '{"items": [{"id": true}]}', r"items\[0\].id must be an integer"),
    ],
)
def test_wrong_arguments_are_an_outcome_that_says_what_fits(running, tool, arguments_json, message):
    async def main():
        async with running() as it:
            session = await it.client.open_session("e")
            request = tools_pb2.CallToolRequest(
                session_id=session.id, call_id="0.0", tool=tool, arguments_json=arguments_json
            )
            reply = await it.client._call("CallTool", request, 5.0)
            assert reply.outcome == tools_pb2.OUTCOME_BAD_ARGUMENTS
            assert re.search(message, reply.text)

    asyncio.run(main())


def test_deadline_ends_the_call_and_cancels_the_fetch(running):
    async def main():
        async with running(fetch_timeout=30.0) as it:
            session = await it.client.open_session("e", max_tool_calls=5)
            opened = {"urls": ["http://slow.test/good", "http://atlas.test/en/austria"]}
            result = await session.call("batch_web_surfer", opened, call_id="0.0", timeout=0.4)
            assert result.outcome == "ok" and "http://slow.test/good: timed out" in result.text
            while not it.site.cancelled:
                await asyncio.sleep(0)

    asyncio.run(main())


def test_cancelled_call_cancels_the_fetch_and_costs_no_budget(running):
    async def main():
        async with running(fetch_timeout=30.0) as it:
            session = await it.client.open_session("e", max_tool_calls=5)
            opened = {"urls": ["http://slow.test/good"]}
            call = asyncio.create_task(session.call("batch_web_surfer", opened, call_id="0.0"))
            while not it.site.requests:
                await asyncio.sleep(0)
            call.cancel()
            while not it.site.cancelled:
                await asyncio.sleep(0)
            it.site.gate = asyncio.Event()
            it.site.gate.set()
            again = await session.call("batch_web_surfer", opened, call_id="0.0")
            assert again.outcome == "ok" and again.remaining["tool_calls"] == 4

    asyncio.run(main())


def test_full_queue_answers_resource_exhausted_with_a_time_to_retry(running):
    async def main():
        async with running(concurrency=1, queue=1, fetch_timeout=30.0) as it:
            it.site.gate = asyncio.Event()
            session = await it.client.open_session("e")
            opened = {"urls": ["http://slow.test/good"]}
            waiting = [asyncio.create_task(session.call("batch_web_surfer", opened, call_id=str(i))) for i in range(2)]
            while not it.site.requests:
                await asyncio.sleep(0)
            request = tools_pb2.CallToolRequest(
                session_id=session.id, call_id="9", tool="batch_web_surfer", arguments_json=json.dumps(opened)
            )
            with pytest.raises(grpc.aio.AioRpcError) as refused:
                await it.client._connected().CallTool(request, timeout=5.0)
            assert refused.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
            told = dict(refused.value.trailing_metadata())
            assert int(told["grpc-retry-pushback-ms"]) > 0
            (detail,) = status_pb2.Status.FromString(told["grpc-status-details-bin"]).details
            info = error_details_pb2.RetryInfo()
            assert detail.Unpack(info) and info.retry_delay.ToMilliseconds() > 0
            retried = asyncio.create_task(session.call("batch_web_surfer", opened, call_id="9"))
            it.site.gate.set()
            assert {r.outcome for r in await asyncio.gather(*waiting, retried)} == {"ok"}

    asyncio.run(main())


def test_unknown_and_closed_sessions_are_infrastructure_errors(running):
    async def main():
        async with running() as it:
            session = await it.client.open_session("e")
            await session.close()
            await session.close()
            with pytest.raises(ToolInfraError) as error:
                await session.call("todo", {}, call_id="0.0")
            assert error.value.status == "NOT_FOUND"

    asyncio.run(main())


def test_long_session_id_does_not_make_the_error_too_long_to_send(running):
    async def main():
        async with running() as it:
            request = tools_pb2.CallToolRequest(session_id="x" * 100_000, call_id="0", tool="todo", arguments_json="{}")
            with pytest.raises(grpc.aio.AioRpcError) as refused:
                await it.client._connected().CallTool(request, timeout=5.0)
            assert refused.value.code() is grpc.StatusCode.NOT_FOUND and len(refused.value.details()) < 600

    asyncio.run(main())


def test_caller_without_a_deadline_still_has_one(running, monkeypatch):
    async def main():
        async with running(fetch_timeout=30.0) as it:
            monkeypatch.setattr("tools_env.service.service.DEFAULT_DEADLINE", 0.2)
            monkeypatch.setattr("tools_env.tools.web.REPLY_MARGIN", -60.0)  # a tool that forgets its deadline
            session = await it.client.open_session("e")
            arguments = json.dumps({"urls": ["http://slow.test/good"]})
            request = tools_pb2.CallToolRequest(
                session_id=session.id, call_id="0", tool="batch_web_surfer", arguments_json=arguments
            )
            with pytest.raises(grpc.aio.AioRpcError) as refused:
                await it.client._connected().CallTool(request)
            assert refused.value.code() is grpc.StatusCode.DEADLINE_EXCEEDED
            while not it.site.cancelled:
                await asyncio.sleep(0)

    asyncio.run(main())


def test_wrong_token_is_refused_and_health_needs_none(running):
    async def main():
        async with running(token="secret", client_token="secret") as it:
            assert [tool.name for tool in await it.client.list_tools()] == ["batch_web_surfer", "file", "todo"]
            for token in (None, "guess"):
                stranger = ToolsClient(it.address, token=token)
                await stranger.wait_ready(5.0)
                with pytest.raises(ToolInfraError) as error:
                    await stranger.open_session("e")
                assert error.value.status == "UNAUTHENTICATED"
                await stranger.close()

    asyncio.run(main())


def test_health_and_reflection_answer(running):
    async def main():
        async with running() as it:
            async with grpc.aio.insecure_channel(it.address) as channel:
                check = health_pb2_grpc.HealthStub(channel).Check
                reply = await check(health_pb2.HealthCheckRequest(service=SERVICE))
                assert reply.status == health_pb2.HealthCheckResponse.SERVING
                info = reflection_pb2_grpc.ServerReflectionStub(channel).ServerReflectionInfo
                stream = info(iter([reflection_pb2.ServerReflectionRequest(list_services="")]))
                names = [s.name async for reply in stream for s in reply.list_services_response.service]
                assert SERVICE in names

    asyncio.run(main())


def test_client_works_on_one_event_loop_after_another(running):
    async def main():
        async with running() as it:
            address = it.address

            def elsewhere():
                client = ToolsClient(address)

                async def once():
                    session = await client.open_session("e")
                    return (await session.call("todo", {}, call_id="0")).outcome

                return [asyncio.run(once()), asyncio.run(once())]

            assert await asyncio.to_thread(elsewhere) == ["ok", "ok"]

    asyncio.run(main())


def test_host_that_is_gone_is_an_infrastructure_error():
    async def main():
        client = ToolsClient("127.0.0.1:1", call_timeout=0.3)
        with pytest.raises(ToolInfraError) as error:
            await client.open_session("e")
        assert error.value.status in ("UNAVAILABLE", "DEADLINE_EXCEEDED")
        with pytest.raises(ToolInfraError, match="not ready"):
            await client.wait_ready(0.1)
        await client.close()

    asyncio.run(main())
