"""A judge at an endpoint that breaks in every way it can, while PPO runs: the run waits for it, or says in one line why not."""

import contextlib
import dataclasses
import gc
import json
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from stepdr_jax import files
from stepdr_jax.agent.policy import EndpointPolicy, Turn
from stepdr_jax.errors import UserError
from stepdr_jax.judge.model_judge import ModelJudge
from stepdr_jax.records import Rubric, RubricSet
from stepdr_jax.rl import loop
from tests.rl import judge_server, toy

ROOT = Path(__file__).parents[2]
ITERATIONS = 2


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as probe:
        return probe.getsockname()[1]


class Endpoint:
    """A judge_server process on one port, started again whenever it dies, `away` seconds later."""

    def __init__(self, port: int, *settings: str, away: float = 0.0):
        self.command = [sys.executable, "-m", "tests.rl.judge_server", f"--port={port}", "--faults=0.5"]
        self.settings, self.away, self.deaths, self.stopped = settings, away, 0, threading.Event()
        self.process = self._start(*settings)
        self.thread = threading.Thread(target=self._watch)

    def _start(self, *settings: str) -> subprocess.Popen:
        return subprocess.Popen([*self.command, *settings], cwd=ROOT)

    def _watch(self) -> None:
        while not self.stopped.wait(0.02):
            if self.process.poll() is not None:
                self.deaths += 1
                if not self.stopped.wait(self.away):
                    self.process = self._start()

    def __enter__(self) -> "Endpoint":
        self.thread.start()
        return self

    def __exit__(self, *exc) -> None:
        self.stopped.set()
        self.thread.join()
        self.process.kill()
        self.process.wait()


def judged_by(config, port, **settings):
    """The toy's parts with a judge at the endpoint."""
    parts = toy.parts(config)
    rows = [Rubric(rid=f"r{i}", criterion=f"criterion {i}", weight=i + 1, role="explicit") for i in range(4)]
    rows.append(Rubric(rid="flaw", criterion="a flaw", weight=-2, role="negative"))
    sets = {task.id: RubricSet(id="r" + task.id, task_id=task.id, rubrics=rows) for task in parts.tasks}
    policy = EndpointPolicy(
        f"http://127.0.0.1:{port}", "judge", **dict(timeout=0.5, retries=6, backoff=0.05) | settings
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
    return loop.train(config, parts)


def test_errors_garbage_and_kills_of_the_endpoint_change_nothing(expected, tmp_path, caplog):
    """Every second request is answered wrongly at first, and the process is killed in the middle of the first iteration."""
    config, port = toy.config(tmp_path, iterations=ITERATIONS, max_masked_share=0.0), free_port()
    with Endpoint(port, "--dies_at=9", away=0.3) as endpoint:
        parts = judged_by(config, port)
        done = loop.train(config, parts)
        del parts
        gc.collect()
    assert endpoint.deaths == 1
    assert done["params_sha256"] == expected["params_sha256"]
    assert [row["masked/judge_failed"] for row in rows(config)] == [0] * ITERATIONS
    assert "Unclosed" not in caplog.text


def rows(config):
    return files.read_jsonl(loop.home_of(config) / "metrics.jsonl")


def test_an_endpoint_that_is_away_stops_the_run_in_one_line_and_it_continues_when_it_is_back(expected, tmp_path):
    config, port = toy.config(tmp_path, iterations=ITERATIONS), free_port()
    with pytest.raises(UserError) as error:
        loop.train(config, judged_by(config, port, retries=0, backoff=0.0))
    message = str(error.value)
    assert "\n" not in message and "8 of 8 episodes of iteration 0 are masked" in message and "judge_failed" in message
    assert f"http://127.0.0.1:{port}" in message and "check that the endpoint is up" in message
    with Endpoint(port):
        assert loop.train(config, judged_by(config, port))["params_sha256"] == expected["params_sha256"]


def test_an_endpoint_that_takes_requests_and_says_nothing_is_given_up(tmp_path):
    """A listening port that never answers: bounded by the time of a request, not by patience."""
    config = toy.config(tmp_path, iterations=1)
    with contextlib.closing(socket.create_server(("127.0.0.1", 0))) as silent:
        began = time.monotonic()
        with pytest.raises(UserError, match="judge_failed.*TimeoutError"):
            loop.train(config, judged_by(config, silent.getsockname()[1], timeout=0.1, backoff=0.01))
    # 3 rounds, 3 attempts, twice the time of a request
    assert time.monotonic() - began < 30.0
