"""Things that break as asked: tools whose replies get lost or that stay broken, and judges that fail.

Draws are hashes of names and seeds, so that the same episodes are struck in every run, whatever the order in which they
come.
"""

import hashlib

import grpc

from stepdr_jax.agent.tools import Tools
from stepdr_jax.judge import judges
from tools_env.client import ToolInfraError, ToolsClient, ToolSession

# What a model sees of tools that misbehave: a tenth of all calls, one way or another.
VISIBLE = {
    "seed": 5,
    "tools": {
        "*": [
            {"kind": "http_error", "rate": 0.025},
            {"kind": "empty", "rate": 0.025},
            {"kind": "truncate", "rate": 0.025},
            {"kind": "contradiction", "rate": 0.025},
        ]
    },
}


def struck(rate: float, *names: object) -> bool:
    """A draw that is true for `rate` of all names."""
    digest = hashlib.blake2b(repr(names).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") < rate * 2**64


class Lost(grpc.aio.AioRpcError):
    """A connection that broke before the reply came."""

    def __init__(self):
        super().__init__(grpc.StatusCode.UNAVAILABLE, grpc.aio.Metadata(), grpc.aio.Metadata(), "the reply was lost")


class FaultyClient(ToolsClient):
    """A client whose calls meet both planes of faults.

    Args:
        lost: share of calls that the host makes and whose reply does not arrive; the client sends them again.
        broken: share of episodes, by seed, whose calls fail for good, half of them after the first.
        visible: profile of faults that sessions ask the host for.
    """

    def __init__(
        self, address: str, *, lost: float = 0.0, broken: float = 0.0, visible: dict | None = None, **settings
    ):
        super().__init__(address, **settings)
        self.lost, self.broken, self.visible = lost, broken, visible
        self.replies_lost, self._sent = 0, set()

    async def open_session(self, episode_id, *, seed=0, **budgets):
        session = await super().open_session(episode_id, seed=seed, faults=self.visible, **budgets)
        return BrokenSession(session, calls=seed % 2) if struck(self.broken, "broken", seed) else session

    def _connected(self, address="", place=0):
        return _Wire(super()._connected(address, place), self)


class _Wire:
    """A stub that loses the first reply to some calls, after the host has made them."""

    def __init__(self, stub, client: FaultyClient):
        self._stub, self._client = stub, client

    def __getattr__(self, method: str):
        rpc = getattr(self._stub, method)
        if method != "CallTool":
            return rpc

        async def call(request, **settings):
            reply = await rpc(request, **settings)
            name = (request.session_id, request.call_id)
            if name not in self._client._sent:
                self._client._sent.add(name)
                if struck(self._client.lost, "lost", len(self._client._sent)):  # results must not depend on which
                    self._client.replies_lost += 1
                    raise Lost
            return reply

        return call


class BrokenSession:
    """A session whose calls find no host after the first `calls`."""

    def __init__(self, session: ToolSession, calls: int):
        self._session, self._left = session, calls

    async def call(self, *arguments, **settings):
        self._left -= 1
        if self._left < 0:
            raise ToolInfraError("UNAVAILABLE: injected", "UNAVAILABLE")
        return await self._session.call(*arguments, **settings)

    async def close(self):
        await self._session.close()


class FaultyTools(Tools):
    """`agent.tools.Tools` over a FaultyClient."""

    def __init__(self, address: str, *, call_timeout: float = 15.0, host=None, **faults):
        super().__init__(address, call_timeout=call_timeout, host=host)
        self._client = self.faulty = FaultyClient(address, call_timeout=call_timeout, **faults)


class FaultyJudge(judges.ProgrammaticJudge):
    """A judge that raises on some reports, and on others leaves single rubrics without a verdict.

    Args:
        fails: share of reports that it raises on.
        drops: share of rubrics, over all reports, that it gives no verdict.
        more: of `judges.ProgrammaticJudge`.
    """

    def __init__(self, *more, fails: float = 0.0, drops: float = 0.0, **settings):
        super().__init__(*more, **settings)
        self.fails, self.drops, self.dropped = fails, drops, 0

    async def judge(self, task, rubric_set, trajectory):
        if struck(self.fails, "report", trajectory.id, trajectory.answer):
            raise RuntimeError("injected: the judge is away")
        return await super().judge(task, rubric_set, trajectory)

    def decide(self, rubric, view):
        if struck(self.drops, "rubric", rubric.rid, view.answer):
            self.dropped += 1
            return judges.failed_judgment(rubric, "injected: no verdict")
        return super().decide(rubric, view)
