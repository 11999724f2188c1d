"""A judge's endpoint that fails in every way during PPO: the run waits for it, or stops with one line."""

import contextlib
import dataclasses
import gc
import json
import socket
import time

import pytest

from stepdr_jax import files
from stepdr_jax.agent.policy import EndpointPolicy, Turn
from stepdr_jax.errors import UserError
from stepdr_jax.judge.model_judge import ModelJudge
from stepdr_jax.records import Rubric, RubricSet
from stepdr_jax.rl import loop
from tests.kept import Kept, free_port
from tests.rl import judge_server, toy

ITERATIONS = 2


def endpoint(port: int, *first: str, away: float = 0.0) -> Kept:
    return Kept("tests.rl.judge_server", port, "--faults=0.5", first=first, away=away)


def judged_by(config, port, **settings):
    """The toy's parts with a judge at the endpoint."""
    parts = toy.inputs(config)
    rows = [Rubric(rid=f"r{i}", criterion=f"criterion {i}", weight=i + 1, role="explicit") for i in range(4)]
    rows.append(Rubric(rid="flaw", criterion="a flaw", weight=-2, role="negative"))
    sets = {task.id: RubricSet(id="r" + task.id, task_id=task.id, rubrics=rows) for task in parts.tasks}
    policy = EndpointPolicy(
        f"http://127.0.0.1:{port}", "judge", **dict(timeout=2.0, retries=6, backoff=0.05) | settings
    )
    return dataclasses.replace(parts, rubric_sets=sets, judge=ModelJudge(policy, per_request=3))


class Drawn:
    """A policy, and its session, that answers what the server answers, without one."""

    name = "judge"

    def __init__(self, user: str = ""):
        self.user = user

    def start(self, messages, *, episode_id, seed):
        return Drawn(messages[-1].content)

    async def act(self, max_tokens):
        return Turn(json.dumps(judge_server.verdicts(self.user)), "stop")

    async def close(self):
        pass


@pytest.fixture(scope="module")
def expected(tmp_path_factory):
    """The run with a judge that never breaks."""
    config = toy.config(tmp_path_factory.mktemp("whole"), iterations=ITERATIONS)
    parts = dataclasses.replace(judged_by(config, 1), judge=ModelJudge(Drawn(), per_request=3))
    return loop.train_ppo(config, parts)


def test_errors_garbage_and_kills_of_the_endpoint_change_nothing(expected, tmp_path, caplog):
    """Every second request fails at first, and the process is killed in the middle of the first iteration."""
    config, port = toy.config(tmp_path, iterations=ITERATIONS, max_masked_share=0.0), free_port()
    with endpoint(port, "--dies_at=9", away=0.3) as server:
        parts = judged_by(config, port)
        done = loop.train_ppo(config, parts)
        del parts
        gc.collect()
    assert server.deaths == 1
    assert done["params_sha256"] == expected["params_sha256"]
    assert [row["masked/judge_failed"] for row in rows(config)] == [0] * ITERATIONS
    assert "Unclosed" not in caplog.text


def rows(config):
    return files.read_jsonl(loop.ppo_layout(config).directory / "metrics.jsonl")


def test_an_endpoint_that_is_away_stops_the_run_in_one_line_and_it_continues_when_it_is_back(expected, tmp_path):
    config, port = toy.config(tmp_path, iterations=ITERATIONS), free_port()
    with pytest.raises(UserError) as error:
        loop.train_ppo(config, judged_by(config, port, retries=0, backoff=0.0))
    message = str(error.value)
    assert "\n" not in message and "8 of 8 episodes of iteration 0 are masked" in message and "judge_failed" in message
    assert f"http://127.0.0.1:{port}" in message and "check that the endpoint is up" in message
    with endpoint(port):
        assert loop.train_ppo(config, judged_by(config, port))["params_sha256"] == expected["params_sha256"]


def test_an_endpoint_that_takes_requests_and_says_nothing_is_given_up(tmp_path):
    """A listening port that never answers: bounded by the time of a request, not by patience."""
    config = toy.config(tmp_path, iterations=1)
    with contextlib.closing(socket.create_server(("127.0.0.1", 0))) as silent:
        began = time.monotonic()
        with pytest.raises(UserError, match="judge_failed.*TimeoutError"):
            loop.train_ppo(config, judged_by(config, silent.getsockname()[1], timeout=0.1, backoff=0.01))
    # 3 rounds, 3 attempts, twice the time of a request
    assert time.monotonic() - began < 30.0
