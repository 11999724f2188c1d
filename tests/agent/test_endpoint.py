"""The endpoint policy against a real local HTTP server that speaks the chat-completions protocol."""

import asyncio
import json

import pytest
from aiohttp import web

from stepdr_jax.agent.policy import EndpointPolicy
from stepdr_jax.agent.react import run_episode
from stepdr_jax.endpoint import EndpointError
from stepdr_jax.records import Finish, Message
from tests.agent.scripted import ANSWER, TableTools, search
from tests.agent.test_react import LIMITS, TASK

MESSAGES = [Message(role="system", content="s"), Message(role="user", content="q")]


def reply(content="", finish="stop", **message):
    return {
        "choices": [{"message": {"role": "assistant", "content": content} | message, "finish_reason": finish}],
        "usage": {"prompt_tokens": 20, "completion_tokens": 5},
    }


async def serving(script, use):
    """Serves one item of `script` per request: a reply, or (status, headers, text). Returns (use's value, requests)."""
    requests, script = [], list(script)

    async def complete(request):
        requests.append((await request.json(), request.headers.get("Authorization")))
        item = script.pop(0)
        if isinstance(item, tuple):
            return web.Response(status=item[0], headers=item[1], text=item[2])
        return web.json_response(item)

    app = web.Application()
    app.router.add_post("/v1/chat/completions", complete)
    runner = web.AppRunner(app)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0)
    await site.start()
    policy = EndpointPolicy(
        f"http://127.0.0.1:{runner.addresses[0][1]}", "m", "secret", retries=2, backoff=0.001, timeout=5.0
    )
    try:
        return await use(policy), requests
    finally:
        await policy.close()
        await runner.cleanup()


def act_once(*script):
    async def use(policy):
        session = policy.start(MESSAGES, episode_id="e", seed=3)
        return await session.act(50)

    return asyncio.run(serving(script, use))


def test_a_whole_episode():
    async def use(policy):
        return (await run_episode(TASK, policy, TableTools(), LIMITS, prompt="full", seed=3)).trajectory

    trajectory, requests = asyncio.run(serving([reply(search("a")), reply(ANSWER)], use))
    assert trajectory.finish == Finish.ANSWERED and trajectory.policy == "m"
    body, key = requests[1]
    assert key == "Bearer secret"
    assert body["model"] == "m" and body["seed"] == 3 and body["max_tokens"] == 50
    assert [m["role"] for m in body["messages"]] == ["system", "user", "assistant", "user"]
    assert body["messages"][3]["content"].startswith("<tool_response>\n1. Austria")
    assert trajectory.stats["sampled_tokens"] == 10 and trajectory.stats["observed_tokens"] == 15


def test_native_tool_calls_and_reasoning_become_the_one_text_format():
    call = {"function": {"name": "todo", "arguments": json.dumps({"items": []})}}
    turn, _ = act_once(reply(None, tool_calls=[call], reasoning_content="I plan."))
    assert (
        turn.text == '<think>I plan.</think>\n\n<tool_call>\n{"name": "todo", "arguments": {"items": []}}\n</tool_call>'
    )


def test_a_cut_reply_is_a_cut_turn():
    assert act_once(reply("<answer>half", "length"))[0].finish == "length"


def test_busy_and_broken_answers_are_retried():
    turn, requests = act_once((429, {"Retry-After": "0.01"}, ""), (503, {}, "down"), reply("ok"))
    assert turn.text == "ok" and len(requests) == 3


def test_retries_end_with_the_reason():
    with pytest.raises(EndpointError, match="failed 3 times.*HTTP 500: boom"):
        act_once(*[(500, {}, '{"error": {"message": "boom"}}')] * 3)


def test_a_refused_key_is_not_retried_and_names_the_fix():
    with pytest.raises(EndpointError, match="HTTP 401: bad key; set the API key"):
        act_once((401, {}, '{"error": {"message": "bad key"}}'))


@pytest.mark.parametrize("body", ["<html>hello</html>", "[]", '{"choices": []}'])
def test_an_answer_that_is_no_completion_is_named(body):
    with pytest.raises(EndpointError, match="expected"):
        act_once((200, {}, body))


def test_an_unreachable_endpoint_is_an_infrastructure_outcome():
    async def episode():
        policy = EndpointPolicy("http://127.0.0.1:9", "m", retries=0, timeout=2.0)
        try:
            return (await run_episode(TASK, policy, TableTools(), LIMITS)).trajectory
        finally:
            await policy.close()

    trajectory = asyncio.run(episode())
    assert trajectory.finish == Finish.INFRA_FAILED and "check that the endpoint is up" in trajectory.metadata["cause"]
