"""A scripted engine: the whole reinforcement-learning loop runs on it in milliseconds, without a model."""

from collections.abc import Callable, Sequence

from stepdr_jax.engine.engine import Generation, SampleParams


class FakeEngine:
    """Answers every request from a script.

    Args:
        script: called with (session, all ids of the session so far, SampleParams); returns the ids to "sample", or
            raises what `generate` shall raise.
        logprob: reported for every sampled id.
        stop_ids: a turn that ends with one has finish "stop", any other "length".
    """

    def __init__(
        self,
        script: Callable[[str, tuple[int, ...], SampleParams], Sequence[int]],
        *,
        logprob: float = -1.0,
        stop_ids: Sequence[int] = (),
        version: int = 0,
    ):
        self.script, self.logprob, self.stop_ids, self.version = script, logprob, frozenset(stop_ids), version
        self.sessions: dict[str, list[int]] = {}
        self.closed: list[str] = []

    async def generate(self, session: str, new_ids: Sequence[int], params: SampleParams) -> Generation:
        ids = self.sessions.setdefault(session, [])
        ids += new_ids
        sampled = tuple(self.script(session, tuple(ids), params))[: params.max_tokens]
        ids += sampled
        finish = "stop" if sampled and sampled[-1] in self.stop_ids else "length"
        return Generation(sampled, (self.logprob,) * len(sampled), finish, self.version)

    async def close(self, session: str) -> None:
        self.sessions.pop(session, None)
        self.closed.append(session)

    async def update_weights(self, params, version: int) -> None:
        self.version = version

    def stats(self) -> dict[str, float]:
        return {"sessions": len(self.sessions), "version": self.version}
