"""An OpenAI-compatible endpoint that plays a rubric judge, and misbehaves when asked, for tests that kill it.

    python -m tests.rl.judge_server --port=8123 --faults=0.05

Its verdict on a criterion is a hash of the criterion and the report: no opinion, but the same in every run and every
process. A share of all requests is answered wrongly at their first coming, one way after another: 500, 429, a page of
HTML, an empty reply, a reply without verdicts, one whose verdicts are no verdicts, a closed connection, and silence.
"""

import argparse
import asyncio
import hashlib
import json
import os
import re
import signal

from aiohttp import web

KINDS = ("500", "429", "html", "nothing", "words", "verdicts", "closed", "silence")
_CRITERIA = re.compile(r"\nCriteria:\n(\[.*\])\Z", re.DOTALL)
_REPORT = re.compile(r"begin (\w{16})\n(.*)\nend \1\n", re.DOTALL)


def verdicts(user: str) -> list[dict]:
    """What is answered to a request's user message."""
    report = _REPORT.search(user).group(2)
    rows = []
    for criterion in json.loads(_CRITERIA.search(user).group(1)):
        digest = hashlib.blake2b(f"{criterion['statement']}|{report}".encode(), digest_size=1).digest()[0]
        rows.append(
            {"id": criterion["id"], "reason": "drawn", "verdict": ("satisfied", "partial", "not_satisfied")[digest % 3]}
        )
    return rows


class Server:
    """`dies_at`: the number of the request at which the process kills itself with signal 9; 0 never."""

    def __init__(self, faults: float = 0.0, dies_at: int = 0):
        self.faults, self.dies_at = faults, dies_at
        self.requests, self.struck, self.seen = 0, 0, set()
        self.app = web.Application(client_max_size=16 << 20)
        self.app.router.add_post("/v1/chat/completions", self.complete)

    async def complete(self, request: web.Request) -> web.StreamResponse:
        body = await request.json()
        self.requests += 1
        if self.requests == self.dies_at:
            os.kill(os.getpid(), signal.SIGKILL)
        user = body["messages"][-1]["content"]
        digest = hashlib.blake2b(user.encode(), digest_size=8).digest()
        if digest not in self.seen and int.from_bytes(digest, "big") < self.faults * 2**64:
            self.seen.add(digest)
            self.struck += 1
            return await self._misbehave(KINDS[self.struck % len(KINDS)], request)
        return _reply(json.dumps(verdicts(user)))

    async def _misbehave(self, kind: str, request: web.Request) -> web.StreamResponse:
        match kind:
            case "500":
                return web.Response(status=500, text="out of memory")
            case "429":
                return web.Response(status=429, headers={"Retry-After": "0"})
            case "html":
                return web.Response(text="<html>a proxy says hello</html>", content_type="text/html")
            case "nothing":
                return _reply("")
            case "words":
                return _reply("All criteria are satisfied.")
            case "verdicts":
                return _reply(json.dumps([{"id": "0", "verdict": "excellent"}]))
            case "closed":
                request.transport.close()
        await asyncio.sleep(3600.0)


def _reply(text: str) -> web.Response:
    return web.json_response(
        {"choices": [{"message": {"role": "assistant", "content": text}, "finish_reason": "stop"}]}
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--faults", type=float, default=0.0)
    parser.add_argument("--dies_at", type=int, default=0)
    options = parser.parse_args()
    server = Server(options.faults, options.dies_at)
    web.run_app(server.app, host="127.0.0.1", port=options.port, print=None)


if __name__ == "__main__":
    main()
