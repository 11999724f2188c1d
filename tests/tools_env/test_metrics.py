"""Facts about what Prometheus reads."""

import asyncio
import re
import urllib.request


def value(text: str, series: str) -> float:
    found = re.search(rf"^{re.escape(series)} (\S+)$", text, re.MULTILINE)
    return float(found.group(1)) if found else 0.0


def test_metrics_count_calls_replays_tokens_and_cache_lookups(running):
    async def main():
        async with running(metrics_port=0) as it:
            session = await it.client.open_session("e", max_tool_calls=3)
            wanted = {"queries": ["capital of Austria"]}
            await session.call("batch_web_surfer", wanted, call_id="0")
            await session.call("batch_web_surfer", wanted, call_id="0")
            await session.call("batch_web_surfer", wanted, call_id="1")
            await session.call("no_such_tool", {}, call_id="2")
            await session.call("todo", {}, call_id="3")
            url = f"http://{it.host.metrics_address}/metrics"
            text = await asyncio.to_thread(lambda: urllib.request.urlopen(url).read().decode())
            assert value(text, 'stepdr_tool_calls_total{outcome="ok",tool="batch_web_surfer"}') == 2
            assert value(text, 'stepdr_tool_calls_total{outcome="bad_arguments",tool="unknown"}') == 1
            assert value(text, 'stepdr_tool_calls_total{outcome="budget_exhausted",tool="todo"}') == 1
            assert value(text, "stepdr_tool_replies_replayed_total") == 1
            assert value(text, 'stepdr_tool_call_seconds_count{tool="batch_web_surfer"}') == 2
            assert value(text, 'stepdr_tool_output_tokens_total{tool="batch_web_surfer"}') > 10
            assert value(text, 'stepdr_tool_cache_lookups_total{result="hit"}') == 1
            assert value(text, 'stepdr_tool_cache_lookups_total{result="miss"}') == 1
            assert value(text, "stepdr_tool_sessions") == 1
            assert value(text, 'stepdr_tool_calls_running{tool="batch_web_surfer"}') == 0

    asyncio.run(main())
