"""PPO that samples on servers which speak vLLM's or SGLang's HTTP, against PPO that samples in its own process."""

import os
import time

import jax
import pytest

from stepdr_jax import files
from stepdr_jax.engine import factory, remote
from stepdr_jax.errors import UserError
from stepdr_jax.models import hf, qwen2
from stepdr_jax.rl import loop
from tests.kept import Kept, free_port
from tests.rl import toy

ITERATIONS = 2


def config_of(run_dir, **sampler):
    config = (
        toy.config(run_dir, iterations=ITERATIONS, critic_warmup_iterations=0).copy_and_resolve_references().unlock()
    )
    config.sampler.update(dict(timeout=60.0, weights_dtype="float32") | sampler)
    return config.lock()


def wait_until_it_answers(url):
    for _ in range(1200):
        try:
            return factory._require_server(url)
        except UserError:
            time.sleep(0.1)
    raise TimeoutError(url)


def rows_of(run_dir):
    return files.read_jsonl(run_dir / "seed0" / "ppo" / "metrics.jsonl")


@pytest.fixture(scope="module")
def expected(tmp_path_factory):
    run_dir = tmp_path_factory.mktemp("jax")
    config = config_of(run_dir)
    return loop.train_ppo(config, toy.inputs(config)), rows_of(run_dir)


@pytest.mark.parametrize("engine", ["vllm", "sglang"])
def test_a_server_that_is_killed_gives_what_the_engine_in_process_gives(engine, expected, tmp_path, monkeypatch):
    """The server under test samples with the session's seed and token index, so seeds must come to it as they are."""
    monkeypatch.setattr(remote, "_seed", lambda seed, length: seed)
    other, port = tmp_path / "first", free_port()
    config = config_of(tmp_path / "run", engine=engine, urls=(f"http://127.0.0.1:{port}",), model="toy")
    model = qwen2.Qwen2Config.from_config(config.model, toy.TOKENIZER.vocab_size)
    hf.save(model, qwen2.init_params(model, jax.random.key(99)), other)  # what the server has when it starts
    log = tmp_path / "versions"
    settings, first = (f"--model={other}", f"--log={log}"), ("--dies_in=00000001",)
    with Kept("tests.engine.serve_checkpoint", port, *settings, first=first) as server:
        wait_until_it_answers(config.sampler.urls[0])
        done = loop.train_ppo(config, toy.inputs(config))
    assert server.deaths == 1
    rows = rows_of(tmp_path / "run")
    assert [row["sampler_weights_sent_again"] for row in rows] == [0, 1]
    assert done["params_sha256"] == expected[0]["params_sha256"]
    assert [row["reward"] for row in rows] == [row["reward"] for row in expected[1]]
    assert max(row["logprob_gap/max"] for row in rows) < 1e-4
    (kept,) = os.listdir(tmp_path / "run" / "weights")  # the folders of older versions are deleted
    assert kept.startswith("00000001-") and hf.load(tmp_path / "run" / "weights" / kept)[0] == model
    assert {line[:8] for line in log.read_text().split() if line != "default"} == {"00000000", "00000001"}


def test_a_server_that_is_not_there_is_one_line(tmp_path):
    config = config_of(tmp_path, engine="sglang", urls=(f"http://127.0.0.1:{free_port()}",))
    with pytest.raises(UserError, match="does not answer .* start the server first"):
        loop.train_ppo(config, toy.inputs(config))
