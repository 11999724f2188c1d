"""Facts about synthesis with a model behind an endpoint: the same pipeline, the model's own words, its reflections."""

import asyncio
import re
import threading

import pytest
from aiohttp import web

from configs.miniature import get_config
from stepdr_jax import records
from stepdr_jax.errors import UserError
from stepdr_jax.records import Trajectory
from stepdr_jax.synthesis import pipeline, reflection
from stepdr_jax.tokens import chat
from tests.synthesis import small_world
from tools_env.process import ToolHost

PASSAGE = re.compile(r"(.+) \\cite\{(web_[a-z]{8})\}")


def act(messages):
    """A model that searches, answers with the last passage shown, and with the first one when told that it is wrong."""
    question = messages[1]["content"]
    observed = [m["content"] for m in messages[2:] if "<tool_response>" in m["content"]]
    if not observed:
        topic = re.search(r"(?:the )?([a-z ]+ of [A-Z][A-Za-z]+|\S+的\S+?)(?:是什么)?[?.？。]", question).group(1)
        return chat.tool_call_text("batch_web_surfer", {"queries": [topic.removeprefix("the ")]})
    told = any(m["content"] in reflection.REFLECT.values() for m in messages)
    passages = PASSAGE.findall(observed[0])
    text, id_ = passages[0] if told else passages[-1]
    thought = "<think>According to your feedback I was wrong. The first passage fits.</think>\n" if told else ""
    return f"{thought}<answer>{text} \\cite{{{id_}}}</answer>"


@pytest.fixture
def endpoint():
    """The address of a chat-completions server on its own thread."""
    loop, ready, found = asyncio.new_event_loop(), threading.Event(), {}

    async def complete(request):
        body = await request.json()
        found["system"] = body["messages"][0]["content"]
        message = {"role": "assistant", "content": act(body["messages"])}
        usage = {"prompt_tokens": 900, "completion_tokens": 60}
        return web.json_response({"choices": [{"message": message, "finish_reason": "stop"}], "usage": usage})

    async def start():
        app = web.Application()
        app.router.add_post("/v1/chat/completions", complete)
        runner = web.AppRunner(app)
        await runner.setup()
        await web.TCPSite(runner, "127.0.0.1", 0).start()
        found["url"], found["runner"] = f"http://127.0.0.1:{runner.addresses[0][1]}/v1", runner
        ready.set()

    thread = threading.Thread(target=lambda: (loop.run_until_complete(start()), loop.run_forever()), daemon=True)
    thread.start()
    assert ready.wait(10)
    yield found
    asyncio.run_coroutine_threadsafe(found["runner"].cleanup(), loop).result(10)
    loop.call_soon_threadsafe(loop.stop)
    thread.join(10)


def test_a_model_teaches_and_its_corrections_look_spontaneous(endpoint, tmp_path):
    small_world.write(tmp_path / "world")
    config = get_config()
    with config.unlocked():
        config.run_dir = str(tmp_path)
        config.teacher.endpoint, config.teacher.model = endpoint["url"], "model"
        config.synthesis.tasks_per_entity, config.synthesis.heldout_tasks = 6, 1
        config.synthesis.kind_weights = {"fact": 1.0, "deep_search": 0.0, "verification": 0.0, "report": 0.0}
        config.synthesis.trajectory_copies = config.synthesis.document_copies = 0
    with ToolHost(tmp_path / "world", web_port=9, log_path=tmp_path / "host.log") as host:
        card = pipeline.synthesize_corpus(config, host.address)
        rows = records.read_records(tmp_path / "corpus" / "trajectories.jsonl", Trajectory)
        assert card["teacher"] == "model" and "<tools>" in endpoint["system"]
        corrected = [row for row in rows if row.kept and row.attempt]
        assert corrected and card["episodes"]["kept_after_reflection"] == len(corrected)
        for row in corrected:
            assert row.policy == "model" and not reflection.has_induction(row)
            assert "Is that right?" in row.messages[-1].content or "对吗？" in row.messages[-1].content
            assert "<tools>" not in row.messages[0].content  # the student's own prompt


def test_an_endpoint_without_a_model_is_one_line(tmp_path):
    small_world.write(tmp_path / "world")
    config = get_config()
    with config.unlocked():
        config.run_dir = str(tmp_path)
        config.teacher.endpoint, config.teacher.model = "http://127.0.0.1:9/v1", ""
    with ToolHost(tmp_path / "world", web_port=9, log_path=tmp_path / "host.log") as host:
        with pytest.raises(UserError, match="teacher.model"):
            pipeline.synthesize_corpus(config, host.address)
