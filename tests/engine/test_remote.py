"""Remote engines against a real HTTP server that checks the request and answers in each server's format."""

import asyncio

import pytest
from aiohttp import web

from stepdr_jax.endpoint import Endpoint, EndpointError
from stepdr_jax.engine.engine import SampleParams
from stepdr_jax.engine.remote import RemoteEngine

STOP = 7


class Folder:
    """A WeightsFolder that writes nothing."""

    def __init__(self):
        self.published, self.kept = [], []

    def publish(self, params, version):
        self.published.append((params, version))
        return f"/weights/{version}"

    def keep_only(self, path):
        self.kept.append(path)


def vllm(ids, stopped, logprobs=None):
    logprobs = [-0.5 - i for i in range(len(ids))] if logprobs is None else logprobs
    reason = "stop" if stopped else "length"
    return {"choices": [{"token_ids": ids, "logprobs": {"token_logprobs": logprobs}, "finish_reason": reason}]}


def sglang(ids, stopped, weights="default"):
    pairs = [[-0.5 - i, id_, None] for i, id_ in enumerate(ids)]
    reason = {"type": "stop", "matched": ids[-1]} if stopped else {"type": "length", "length": len(ids)}
    meta = {"output_token_logprobs": pairs, "finish_reason": reason, "weight_version": weights}
    return {"output_ids": ids, "meta_info": meta}


def served(dialect, replies, use, **settings):
    """Runs `use(engine)` against a server that gives one reply a request; returns (its value, requests)."""
    requests, replies = [], list(replies)

    async def answer(request):
        body = await request.json() if request.can_read_body else None
        requests.append((request.path, body, request.headers.get("X-Session-ID")))
        reply = replies.pop(0)
        return web.Response(status=reply) if isinstance(reply, int) else web.json_response(reply)

    async def run():
        app = web.Application()
        app.router.add_route("*", "/{path:.*}", answer)
        runner = web.AppRunner(app)
        await runner.setup()
        await web.TCPSite(runner, "127.0.0.1", 0).start()
        url = f"http://127.0.0.1:{runner.addresses[0][1]}"
        endpoint = Endpoint(url, retries=1, backoff=0.001, timeout=5.0)
        engine = RemoteEngine([endpoint], dialect, model="m", max_len=16, stop_ids=(STOP,), version=3, **settings)
        try:
            return await use(engine)
        finally:
            await endpoint.close()
            await runner.cleanup()

    return asyncio.run(run()), requests


@pytest.mark.parametrize("dialect, reply", [("vllm", vllm), ("sglang", sglang)])
def test_turns_send_all_ids_and_keep_what_was_sampled(dialect, reply):
    async def use(engine):
        first = await engine.generate("s", [1, 2], SampleParams(max_tokens=5, seed=11))
        second = await engine.generate("s", [4], SampleParams(max_tokens=3, seed=11))
        return first, second

    (first, second), requests = served(dialect, [reply([9, STOP], True), 503, reply([5, 6, 8], False)], use)
    assert (first.ids, first.finish, first.version) == ((9, STOP), "stop", 3)
    assert (second.ids, second.finish, second.logprobs) == ((5, 6, 8), "length", (-0.5, -1.5, -2.5))
    assert len(requests) == 3 and requests[1] == requests[2]  # the same again after a failure
    (path, body, route), (_, later, _) = requests[0], requests[2]
    assert route == "s"
    sampling = body if dialect == "vllm" else body["sampling_params"]
    assert path == ("/v1/completions" if dialect == "vllm" else "/generate")
    assert body["prompt" if dialect == "vllm" else "input_ids"] == [1, 2]
    assert later["prompt" if dialect == "vllm" else "input_ids"] == [1, 2, 9, STOP, 4]
    assert sampling["stop_token_ids"] == [STOP] and sampling["top_p"] == 1.0
    if dialect == "vllm":
        assert body["cache_salt"] == "version 3" and body["seed"] != later["seed"]


def test_the_end_of_the_context_is_full():
    async def use(engine):
        nothing = await engine.generate("s", list(range(16)), SampleParams(max_tokens=5, seed=1))
        last = await engine.generate("s", list(range(10, 24)), SampleParams(max_tokens=5, seed=1))
        return nothing, last

    (nothing, last), requests = served("vllm", [vllm([1, 2], False)], use)
    assert (nothing.ids, nothing.finish) == ((), "full")
    assert (last.ids, last.finish, requests[0][1]["max_tokens"]) == ((1, 2), "full", 2)


@pytest.mark.parametrize(
    "reply, message",
    [
        (vllm([9, STOP], False), "stop ids"),  # a stop that the server does not report
        (vllm([9, 5], True), "stop ids"),  # a stop id that the server cut off
        (vllm([9, STOP, 5], False), "stop ids"),
        (vllm([9, 5], False, [-1.0]), "2 ids and 1 log-prob"),
        (vllm([9, 5], False, [-1.0, None]), "not numbers"),
        (vllm([], False), "0 ids"),
        (
            vllm([9, 5], False) | {"choices": [vllm([9], False)["choices"][0] | {"finish_reason": "abort"}]},
            "expected ch",
        ),
        ({"choices": [{"text": "hello"}]}, "expected choices"),
        ({}, "expected choices"),
    ],
)
def test_replies_that_a_trainer_must_not_learn_from_are_errors(reply, message):
    async def use(engine):
        with pytest.raises(EndpointError, match=message):
            await engine.generate("s", [1, 2], SampleParams(max_tokens=5, seed=1))
        return engine.stats()

    stats, _ = served("vllm", [reply], use)
    assert stats["sampled_tokens"] == 0


def test_new_weights_are_read_from_where_they_were_published():
    folder = Folder()

    async def use(engine):
        await engine.update_weights({"w": 1}, 4)
        with pytest.raises(EndpointError, match="did not take the weights in /weights/5: bad shape"):
            await engine.update_weights({"w": 2}, 5)
        return engine.version

    replies = [{"success": True}, {"success": False, "message": "bad shape"}]
    version, requests = served("sglang", replies, use, folder=folder)
    assert version == 4 and folder.published == [({"w": 1}, 4), ({"w": 2}, 5)] and folder.kept == ["/weights/4"]
    body = {"model_path": "/weights/4", "flush_cache": True, "weight_version": "4"}
    assert requests[0][:2] == ("/update_weights_from_disk", body)


def test_a_server_that_came_back_with_its_first_weights_is_sent_the_current_ones_again():
    async def use(engine):
        await engine.update_weights({"w": 1}, 4)
        got = await engine.generate("s", [1, 2], SampleParams(max_tokens=5, seed=1))
        return got, engine.stats()["weights_sent_again"]

    replies = [{"success": True}, sglang([8, STOP], True), {"success": True}, sglang([9, STOP], True, "4")]
    (got, again), requests = served("sglang", replies, use, folder=Folder())
    assert (got.ids, got.version, again) == ((9, STOP), 4, 1)  # what the first weights sampled is not used
    assert [path.split("_")[0] for path, *_ in requests] == ["/update", "/generate", "/update", "/generate"]
    assert requests[0] == requests[2] and requests[1] == requests[3]


def test_a_server_that_keeps_other_weights_is_an_error():
    async def use(engine):
        await engine.update_weights({"w": 1}, 4)
        with pytest.raises(EndpointError, match="weights of version default, expected 4"):
            await engine.generate("s", [1, 2], SampleParams(max_tokens=5, seed=1))

    replies = [{"success": True}, sglang([8, STOP], True)] * 2
    served("sglang", replies, use, folder=Folder())


def info(version):
    return {"weight_version": version}


def test_vllm_reads_new_weights_and_its_version_is_asked_for_before_and_after_every_turn():
    async def use(engine):
        await engine.update_weights({"w": 1}, 4)
        return await engine.generate("s", [1, 2], SampleParams(max_tokens=5, seed=1))

    replies = [{"results": [None]}, {"success": True}, info("4"), vllm([9, STOP], True), info("4")]
    got, requests = served("vllm", replies, use, folder=Folder())
    assert (got.ids, got.version) == ((9, STOP), 4)
    assert [path for path, *_ in requests] == [
        *("/collective_rpc", "/update_weight_version", "/weight_info", "/v1/completions", "/weight_info")
    ]
    assert requests[0][1] == {"method": "reload_weights", "kwargs": {"weights_path": "/weights/4"}}
    assert requests[1][1] == {"new_version": "4"} and requests[3][1]["cache_salt"] == "version 4"


def test_what_a_vllm_server_sampled_around_a_restart_is_not_used():
    async def use(engine):
        await engine.update_weights({"w": 1}, 4)
        got = await engine.generate("s", [1, 2], SampleParams(max_tokens=5, seed=1))
        return got, engine.stats()["weights_sent_again"]

    load = [{"results": [None]}, {"success": True}]
    turn = [info("4"), vllm([8, STOP], True), info("default")]
    replies = [*load, *turn, *load, info("4"), vllm([9, STOP], True), info("4")]
    (got, again), _ = served("vllm", replies, use, folder=Folder())
    assert (got.ids, again) == ((9, STOP), 1)


def test_weights_that_are_published_already_are_sent_before_the_first_turn():
    async def use(engine):
        return await engine.generate("s", [1, 2], SampleParams(max_tokens=5, seed=1)), engine.stats()

    replies = [{"success": True}, sglang([9, STOP], True, "00000003-ab")]
    (got, stats), requests = served("sglang", replies, use, published="/weights/00000003-ab")
    assert (got.version, stats["weights_sent_again"]) == (3, 0)
    assert requests[0][1]["model_path"] == "/weights/00000003-ab"


def test_what_cannot_be_done_is_said():
    async def use(engine):
        with pytest.raises(ValueError, match="expected a folder"):
            await engine.update_weights({}, 1)

    served("vllm", [], use)
    with pytest.raises(ValueError, match="dialect among"):
        RemoteEngine([Endpoint("http://127.0.0.1:1")], "tgi", max_len=4, stop_ids=())
