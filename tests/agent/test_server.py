"""The OpenAI interface over HTTP: our own endpoint policy as its client, and raw requests."""

import asyncio
import json

import pytest
from aiohttp import ClientSession
from aiohttp.test_utils import TestServer

from stepdr_jax.agent import server
from stepdr_jax.agent.policy import EndpointPolicy
from stepdr_jax.agent.react import run_episode
from stepdr_jax.engine.fake import FakeEngine
from stepdr_jax.records import Finish, Message, Trajectory
from stepdr_jax.tokens import chat
from stepdr_jax.tokens.tokenizer import Tokenizer
from tests.agent.scripted import ANSWER, AUSTRIA, ENGINE_LIMITS, TASK, TableTools, search

TOK = Tokenizer.train([TASK.query, ANSWER, AUSTRIA.text, search("capital of Austria")] * 4, 400)
TOOL = {"type": "function", "function": {"name": "batch_web_surfer", "description": "d", "parameters": {}}}


def served(turns, use, **settings):
    """Runs `use(url, engine)` against a server whose engine samples `turns` one after the other."""
    turns = iter(turns)

    def script(session, ids, params):
        text = next(turns)
        return chat.assistant_ids(TOK, text) if isinstance(text, str) else text

    async def run():
        engine = FakeEngine(script, stop_ids=(TOK.im_end,))
        app = server.make_app(engine, TOK, model="m", max_len=2000, **settings)
        async with TestServer(app) as running:
            return await use(str(running.make_url("")).rstrip("/"), engine)

    return asyncio.run(run())


def posted(body, turns=("hello",), path="/v1/chat/completions", **settings):
    async def use(url, engine):
        async with ClientSession() as http:
            async with http.post(url + path, json=body) as reply:
                text = await reply.text()
                assert not engine.sessions, "a session was left open"
                return reply.status, json.loads(text) if "json" in reply.content_type else text

    return served(turns, use, **settings)


def test_a_whole_episode_through_our_own_client():
    async def use(url, engine):
        policy = EndpointPolicy(url, "m", "key")
        try:
            return (await run_episode(TASK, policy, TableTools(), ENGINE_LIMITS, prompt="compact", seed=3)).trajectory
        finally:
            await policy.close()

    trajectory = served([search("a"), ANSWER], use, token="key")
    assert trajectory.finish == Finish.ANSWERED and trajectory.stats["sampled_tokens"] > 0


def test_a_conversation_has_the_ids_that_training_gives_it():
    texts = [("system", "s"), ("user", "q"), ("assistant", search("a")), ("tool", "found"), ("user", "go on")]
    messages = [Message(role=role, content=text) for role, text in texts]
    whole = [*messages, Message(role="assistant", content=ANSWER)]
    trajectory = Trajectory(
        id="t", task_id="t", capability="deep_search", policy="p", messages=whole, finish="answered", kept=True
    )
    trained = list(chat.trajectory_tokens(TOK, trajectory).tokens)
    asked = server.conversation_ids(TOK, messages)
    assert trained == [*asked, *chat.assistant_ids(TOK, ANSWER)]


def test_tools_are_described_and_called():
    body = {"messages": [{"role": "user", "content": "q"}], "tools": [TOOL], "max_tokens": 300}
    status, reply = posted(body, ["<think>I look.</think>\n" + search("a")])
    choice = reply["choices"][0]
    assert status == 200 and choice["finish_reason"] == "tool_calls"
    call = choice["message"]["tool_calls"][0]["function"]
    assert call["name"] == "batch_web_surfer" and json.loads(call["arguments"])
    assert choice["message"]["content"] == "<think>I look.</think>"
    described = server.conversation_ids(TOK, [Message(role="user", content="q")], [TOOL["function"]])
    assert reply["usage"]["prompt_tokens"] == len(described)
    assert "batch_web_surfer" in TOK.decode(described)


def test_completions_take_and_give_ids():
    ids = TOK.encode("one two")
    body = {"prompt": ids, "max_tokens": 3, "logprobs": 1, "return_token_ids": True}
    status, reply = posted(body, [TOK.encode("three four five six")], "/v1/completions")
    choice = reply["choices"][0]
    assert status == 200 and choice["token_ids"] == TOK.encode("three four five six")[:3]
    assert choice["logprobs"]["token_logprobs"] == [-1.0] * 3 and choice["finish_reason"] == "length"
    assert reply["usage"] == {"prompt_tokens": len(ids), "completion_tokens": 3, "total_tokens": len(ids) + 3}


def test_ids_of_padded_rows_that_the_model_sampled_may_come_back():
    body = {"prompt": [*TOK.encode("one"), TOK.vocab_size], "max_tokens": 3}
    script = [TOK.encode("two")]
    assert posted(body, script, "/v1/completions")[0] == 400
    assert posted(body, script, "/v1/completions", vocab_size=TOK.vocab_size + 1)[0] == 200


def test_a_stream_is_one_event_and_its_end():
    status, text = posted({"messages": [{"role": "user", "content": "q"}], "stream": True})
    events = [line[6:] for line in text.splitlines() if line.startswith("data: ")]
    assert status == 200 and events[-1] == "[DONE]"
    assert json.loads(events[0])["choices"][0]["delta"]["content"] == "hello"


@pytest.mark.parametrize(
    "change, message",
    [
        ({"top_p": 0.9}, "top_p: expected 1"),
        ({"stop": ["\n"]}, "stop: this server does not"),
        ({"n": 2}, "n: expected 1"),
        ({"max_tokens": -1}, "max_tokens"),
        ({"temperature": "hot"}, "temperature"),
        ({"model": "other"}, "this server has 'm'"),
        ({"messages": []}, "messages: expected a list"),
        ({"messages": [{"role": "robot", "content": "x"}]}, r"messages[0]"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "reads nothing else"),
        ({"messages": [{"role": "assistant", "content": "x"}]}, "before the first turn"),
        ({"messages": [{"role": "user", "content": "word " * 3000}]}, "context 2000"),
        ({"tools": [{"type": "function"}]}, "tools: expected"),
    ],
)
def test_what_cannot_be_served_is_a_400_that_names_the_field(change, message):
    status, reply = posted({"messages": [{"role": "user", "content": "q"}]} | change)
    assert status == 400 and message in reply["error"]["message"]


def test_a_token_is_asked_for():
    status, reply = posted({"messages": [{"role": "user", "content": "q"}]}, token="secret")
    assert status == 401 and "Bearer" in reply["error"]["message"]
