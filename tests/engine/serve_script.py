"""A server that speaks vLLM's completions and samples by a script, as a process that a test can kill. Imports no jax.

python -m tests.engine.serve_script --port=8123 --dies_at=9
"""

import argparse
import hashlib
import os
import signal

from aiohttp import web

MAX_LEN = 160


def sampled(ids, stop: int) -> list[int]:
    """Ids that are a function of all ids before them; a third of the turns ends with the stop id."""
    draw = hashlib.blake2b(repr(list(ids)).encode(), digest_size=8).digest()
    return [40 + byte % 200 for byte in draw[:5]] + [stop] * (draw[5] % 3 == 0)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--dies_at", type=int, default=0, help="number of the request at which it kills itself")
    options, requests = parser.parse_args(), 0

    async def completions(request):
        nonlocal requests
        requests += 1
        if requests == options.dies_at:
            os.kill(os.getpid(), signal.SIGKILL)
        body = await request.json()
        (stop,) = body["stop_token_ids"]
        ids = sampled(body["prompt"], stop)[: body["max_tokens"]]
        reason = "stop" if ids[-1] == stop else "length"
        logprobs = {"token_logprobs": [-1.0] * len(ids)}
        return web.json_response({"choices": [{"token_ids": ids, "logprobs": logprobs, "finish_reason": reason}]})

    app = web.Application()
    app.router.add_post("/v1/completions", completions)
    web.run_app(app, host="127.0.0.1", port=options.port, print=None)


if __name__ == "__main__":
    main()
