"""Calls that race for a budget, and what the health check says while a host comes and goes."""

import asyncio

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc

from tools_env.client import ToolInfraError
from tools_env.service.host import SERVICE

STATUS = health_pb2.HealthCheckResponse


def test_calls_that_race_for_the_last_of_a_budget_get_it_once(running):
    """A call is counted before it first waits, so that none slips past the limit while another one works."""

    async def main():
        async with asyncio.timeout(30.0), running() as it:
            it.site.gate = asyncio.Event()
            session = await it.client.open_session("e", max_tool_calls=3)
            page = [{"urls": [f"http://slow.test/{number}"]} for number in range(12)]
            calls = [
                asyncio.create_task(session.call("batch_web_surfer", arguments, call_id=str(number)))
                for number, arguments in enumerate(page)
            ]
            while len(it.site.requests) < 3:
                await asyncio.sleep(0.005)
            it.site.gate.set()
            results = await asyncio.gather(*calls)
            refused = [result for result in results if result.outcome == "budget_exhausted"]
            assert len(refused) == 9 and len(it.site.requests) == 3
            assert {result.remaining["tool_calls"] for result in refused} == {0}

    asyncio.run(main())


def test_health_is_serving_until_the_host_drains_and_then_not(running):
    async def main():
        async with asyncio.timeout(30.0), running(drain=5.0) as it, grpc.aio.insecure_channel(it.address) as channel:
            it.site.gate = asyncio.Event()
            stub = health_pb2_grpc.HealthStub(channel)
            seen = {name: [] for name in ("", SERVICE)}

            async def watch(name):
                async for reply in stub.Watch(health_pb2.HealthCheckRequest(service=name)):
                    seen[name].append(STATUS.ServingStatus.Name(reply.status))

            watching = [asyncio.create_task(watch(name)) for name in seen]
            while not all(seen.values()):
                await asyncio.sleep(0.005)
            session = await it.client.open_session("e")
            held = asyncio.create_task(
                session.call("batch_web_surfer", {"urls": ["http://slow.test/held"]}, call_id="0")
            )
            while not it.site.requests:
                await asyncio.sleep(0.005)
            stopping = asyncio.create_task(it.host.stop())
            while not all(states[-1] == "NOT_SERVING" for states in seen.values()):
                await asyncio.sleep(0.005)
            assert not held.done()  # it says so while calls in flight still run
            it.site.gate.set()
            assert (await held).outcome in ("ok", "tool_error")
            await stopping
            for task in watching:
                task.cancel()
            await asyncio.gather(*watching, return_exceptions=True)
            assert all(states == ["SERVING", "NOT_SERVING"] for states in seen.values())
            try:
                await it.client.wait_ready(0.2)
            except ToolInfraError as error:
                assert "not ready" in str(error)
            else:
                raise AssertionError("a host that is gone was called ready")

    asyncio.run(main())
