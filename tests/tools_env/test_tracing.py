"""Facts about spans, seen by a real OTLP collector on loopback."""

import asyncio
import contextlib
import subprocess
import sys

import grpc
import pytest

from tools_env.client import ToolInfraError, ToolsClient
from tools_env.errors import ToolHostError
from tools_env.process import ToolHost
from tools_env.service.tracing import SpanInterceptor

pytest.importorskip("opentelemetry.sdk", reason="the extra telemetry is not installed")
from opentelemetry.proto.collector.trace.v1 import trace_service_pb2, trace_service_pb2_grpc  # noqa: E402


class Collector(trace_service_pb2_grpc.TraceServiceServicer):
    def __init__(self):
        self.spans = []

    async def Export(self, request, context):
        for resource in request.resource_spans:
            worker = {a.key: a.value.string_value for a in resource.resource.attributes}["service.instance.id"]
            for scope in resource.scope_spans:
                self.spans += [(worker, span) for span in scope.spans]
        return trace_service_pb2.ExportTraceServiceResponse()

    def of(self, method: str) -> list[tuple[dict, object]]:
        return [(values(span) | {"worker": worker}, span) for worker, span in self.spans if span.name.endswith(method)]


def values(span) -> dict:
    return {a.key: getattr(a.value, a.value.WhichOneof("value")) for a in span.attributes}


@contextlib.asynccontextmanager
async def collecting():
    collector, server = Collector(), grpc.aio.server()
    trace_service_pb2_grpc.add_TraceServiceServicer_to_server(collector, server)
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    try:
        yield collector, f"http://127.0.0.1:{port}"
    finally:
        await server.stop(None)


def test_every_call_is_a_span_with_what_came_of_it(running):
    async def main():
        async with collecting() as (collector, endpoint):
            async with running(otlp_endpoint=endpoint) as it:
                session = await it.client.open_session("e7")
                search = {"queries": ["capital of Austria"]}
                await session.call("batch_web_surfer", search, call_id="0")
                await session.call("batch_web_surfer", search, call_id="1")
                await session.call("batch_web_surfer", search, call_id="1")
                await session.call("todo", {"items": 3}, call_id="2")
                with pytest.raises(ToolInfraError, match="INVALID_ARGUMENT"):
                    await session.call("todo", {}, call_id="2")
            calls = collector.of("/CallTool")
            assert [c["stepdr.outcome"] for c, _ in calls[:4]] == ["ok", "ok", "ok", "bad_arguments"]
            assert [c["stepdr.cache_hit"] for c, _ in calls[:4]] == [False, True, True, False]
            assert [c["stepdr.replayed"] for c, _ in calls[:4]] == [False, False, True, False]
            assert [c["rpc.grpc.status_code"] for c, _ in calls] == [0, 0, 0, 0, 3] and "stepdr.outcome" not in calls[
                4
            ][0]
            assert {c["stepdr.session"] for c, _ in calls} == {session.id}
            assert [c["gen_ai.tool.call.id"] for c, _ in calls] == ["0", "1", "1", "2", "2"]
            assert calls[0][0]["gen_ai.tool.name"] == "batch_web_surfer" and calls[0][0]["stepdr.queue_seconds"] == 0.0
            assert all(span.kind == span.SPAN_KIND_SERVER and not span.parent_span_id for _, span in calls)
            assert calls[4][1].status.code == 2 and calls[0][1].status.code == 0
            assert collector.of("/OpenSession")[0][0]["stepdr.episode"] == "e7"

    asyncio.run(main())


def test_a_callers_trace_goes_on_in_the_host_and_through_its_workers(offline_web, tmp_path):
    from opentelemetry.sdk.trace import TracerProvider

    async def main():
        async with collecting() as (collector, endpoint):
            host = ToolHost(offline_web, web_port=9, workers=2, otlp_endpoint=endpoint, log_path=tmp_path / "log")
            await asyncio.to_thread(host.start)
            try:
                client = ToolsClient(host.address, channels=8)
                tracer = TracerProvider().get_tracer("agent")
                with tracer.start_as_current_span("episode") as root:
                    for i in range(8):  # over eight connections, some of which end at the other worker
                        session = await client.open_session(str(i))
                        session._where["place"] += 1
                        await session.call("todo", {}, call_id="0")
                await client.close()
            finally:
                await asyncio.to_thread(host.stop)
            calls = collector.of("/CallTool")
            trace = root.get_span_context().trace_id.to_bytes(16, "big")
            assert {span.trace_id for _, span in calls} == {trace}
            passed = {span.span_id: c for c, span in calls if "stepdr.passed_to" in c}
            inner = [(c, span) for c, span in calls if span.parent_span_id in passed]
            assert len(calls) - len(passed) == 8 and len(inner) == len(passed)
            for c, span in inner:
                assert int(c["worker"]) == passed[span.parent_span_id]["stepdr.passed_to"]

    asyncio.run(main())


def test_a_collector_that_is_away_costs_no_call(running):
    async def main():
        async with asyncio.timeout(30):
            async with running(otlp_endpoint="http://127.0.0.1:9") as it:
                session = await it.client.open_session("e")
                assert (await session.call("todo", {}, call_id="0")).outcome == "ok"

    asyncio.run(main())


def test_without_opentelemetry_the_host_starts_and_says_what_the_setting_needs(monkeypatch):
    program = (
        "import sys; sys.modules['opentelemetry'] = None\n"
        "import tools_env.server, tools_env.client\n"
        "from tools_env.errors import ToolHostError\n"
        "from tools_env.service import tracing\n"
        "assert tracing.outgoing_trace_context() == [] and tracing.outgoing_trace_context({'traceparent': 'x'}) == [('traceparent', 'x')]\n"
        "try: tracing.SpanInterceptor('http://127.0.0.1:1')\n"
        "except ToolHostError as error: print(error)\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert "pip install .[telemetry]" in done.stdout, done.stderr
    with pytest.raises(ToolHostError, match="expected otlp_endpoint as http://host:port"):
        SpanInterceptor("127.0.0.1:4317")
