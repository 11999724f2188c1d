"""A sampling server that is killed under running episodes."""

import asyncio

import numpy as np

from stepdr_jax.agent.budget import Limits
from stepdr_jax.agent.policy import EnginePolicy
from stepdr_jax.endpoint import Endpoint
from stepdr_jax.engine.fake import FakeEngine
from stepdr_jax.engine.remote import RemoteEngine
from stepdr_jax.records import Finish
from stepdr_jax.rl import rollouts
from tests.engine import serve_script
from tests.kept import Kept, free_port
from tests.rl import toy

LIMITS = Limits(
    max_turns=2, max_turn_tokens=6, max_episode_tokens=serve_script.MAX_LEN, max_tool_calls=2, wall_seconds=120.0
)


def collected(engine, tmp_path):
    parts = toy.inputs(toy.config(tmp_path))
    policy = EnginePolicy(engine, toy.TOKENIZER)
    return rollouts.collect_rollouts(
        parts.tasks,
        range(8),
        policy,
        toy.ToyTools().client,
        parts.judge,
        parts.rubric_sets,
        LIMITS,
        attempts=1,
        run_episode=toy.run_episode,
    )


def test_episodes_go_on_with_the_same_tokens_when_the_server_is_killed_and_comes_back(tmp_path):
    """The engine keeps each session's ids and sends them all: a server that forgot everything has lost nothing."""
    stop = toy.TOKENIZER.im_end
    alone = FakeEngine(lambda session, ids, params: serve_script.sampled(ids, stop), stop_ids=(stop,))
    expected = asyncio.run(collected(alone, tmp_path))
    port = free_port()

    async def run():
        endpoint = Endpoint(f"http://127.0.0.1:{port}", timeout=60.0, retries=10, backoff=0.2)
        engine = RemoteEngine([endpoint], "vllm", model="script", max_len=serve_script.MAX_LEN, stop_ids=(stop,))
        try:
            return await collected(engine, tmp_path)
        finally:
            await endpoint.close()

    with Kept("tests.engine.serve_script", port, first=("--dies_at=10",)) as server:
        found = asyncio.run(run())
    assert server.deaths == 1
    for got, wanted in zip(found, expected, strict=True):
        assert got.trajectory.finish == Finish.ANSWERED and got.scored == wanted.scored
        for name, array in wanted.log.arrays().items():
            np.testing.assert_array_equal(got.log.arrays()[name], array)
