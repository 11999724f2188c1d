"""A server that speaks vLLM's and SGLang's HTTP and samples from a Hugging Face folder with the JAX engine.

python -m tests.engine.serve_checkpoint --port=8123 --model=FOLDER --log=FILE --dies_in=00000001

Its own weights are those of FOLDER until it is told to read others; one that is started again has FOLDER's again. Every
request is a new session that samples with the request's seed, so an engine that is asked for the same tokens gives
them.
"""

import argparse
import asyncio
import collections
import os
import signal

from aiohttp import web

from stepdr_jax.engine.engine import JaxEngine, SampleParams
from stepdr_jax.models import hf

MAX_LEN = 48


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--model", required=True)
    parser.add_argument("--log", required=True, help="file for the names of the versions that it samples with")
    parser.add_argument(
        "--dies_in", default="-", help="it kills itself at the third request to a version of this prefix"
    )
    options, requests, version = parser.parse_args(), 0, "default"
    model, params = hf.load(options.model)
    engines, loading, sampled = {}, asyncio.Lock(), collections.Counter()

    async def generate(ids, limit, temperature, seed, stop_ids):
        nonlocal requests
        requests += 1
        with open(options.log, "a") as log:
            log.write(version + "\n")
        sampled[version] += 1
        if version.startswith(options.dies_in) and sampled[version] == 3:
            os.kill(os.getpid(), signal.SIGKILL)
        async with loading:
            if not engines:
                sizes = dict(max_num_seqs=8, pools=4, max_len=MAX_LEN)  # as the engine that the test compares with
                engines["one"] = JaxEngine(params, model, stop_ids=stop_ids, **sizes)
        session, settings = str(requests), SampleParams(temperature=temperature, max_tokens=limit, seed=seed)
        generation = await engines["one"].generate(session, ids, settings)
        await engines["one"].close(session)
        return list(generation.ids), list(generation.logprobs), generation.finish

    async def read(path):
        nonlocal params
        loaded, params = hf.load(path)
        assert loaded == model
        if engines:
            await engines["one"].update_weights(params, 0)

    async def completions(request):
        body = await request.json()
        sampling = (body[name] for name in ("prompt", "max_tokens", "temperature", "seed", "stop_token_ids"))
        ids, logprobs, finish = await generate(*sampling)
        choice = {"token_ids": ids, "logprobs": {"token_logprobs": logprobs}, "finish_reason": finish}
        return web.json_response({"choices": [choice]})

    async def collective_rpc(request):
        body = await request.json()
        assert body["method"] == "reload_weights"
        await read(body["kwargs"]["weights_path"])
        return web.json_response({"results": [None]})

    async def update_weight_version(request):
        nonlocal version
        version = (await request.json())["new_version"]
        return web.json_response({"success": True, "new_version": version})

    async def weight_info(request):
        return web.json_response({"weight_version": version})

    async def sglang_generate(request):
        body = await request.json()
        s = body["sampling_params"]
        sampling = (s[name] for name in ("max_new_tokens", "temperature", "sampling_seed", "stop_token_ids"))
        stated = version
        ids, logprobs, finish = await generate(body["input_ids"], *sampling)
        pairs = [[logprob, id_, None] for logprob, id_ in zip(logprobs, ids, strict=True)]
        meta = {"output_token_logprobs": pairs, "finish_reason": {"type": finish}, "weight_version": stated}
        return web.json_response({"output_ids": ids, "meta_info": meta})

    async def update_weights_from_disk(request):
        nonlocal version
        body = await request.json()
        await read(body["model_path"])
        version = body["weight_version"]
        return web.json_response({"success": True, "message": "Succeeded to update model weights."})

    app = web.Application()
    app.router.add_post("/v1/completions", completions)
    app.router.add_post("/collective_rpc", collective_rpc)
    app.router.add_post("/update_weight_version", update_weight_version)
    app.router.add_get("/weight_info", weight_info)
    app.router.add_post("/generate", sglang_generate)
    app.router.add_post("/update_weights_from_disk", update_weights_from_disk)
    web.run_app(app, host="127.0.0.1", port=options.port, print=None)


if __name__ == "__main__":
    main()
