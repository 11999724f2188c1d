"""Two processes over loopback are one PPO run: each samples its share, and the bits are those of one process."""

import dataclasses
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from stepdr_jax import files
from stepdr_jax.rl import hosts, recordings, rollout_metrics
from stepdr_jax.runtime import checkpoint
from tests.rl import toy

ROOT = Path(__file__).parents[2]
FLAGS = "--xla_force_host_platform_device_count={} --xla_backend_optimization_level=0"  # compiles sooner


class Run:
    """The toy's PPO in a folder, by one process of four devices or two of two."""

    def __init__(self, folder: Path):
        self.folder, self.home = folder, folder / "seed0" / "ppo"
        self.started: list[subprocess.Popen] = []

    def start(self, *own: dict) -> list[subprocess.Popen]:
        """A process for each dict of fields; all have a coordinator, whose collectives add in the same order."""
        with socket.socket() as probe:
            probe.bind(("localhost", 0))
            port = probe.getsockname()[1]
        environment = os.environ | {
            "JAX_PLATFORMS": "cpu",
            "XLA_FLAGS": FLAGS.format(4 // len(own)),
            "PYTHONPATH": str(ROOT),
            "JAX_COMPILATION_CACHE_DIR": str(self.folder.parent / "compiled"),
            "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        }
        joined = {"distributed.coordinator": f'"localhost:{port}"', "distributed.processes": len(own)}
        joined |= {"distributed.heartbeat_seconds": 10.0}
        for number, fields in enumerate(own):
            fields = joined | {"distributed.process": number} | fields
            words = [f"{name}={value}" for name, value in fields.items()]
            command = [sys.executable, "-m", "tests.rl.toy_process", str(self.folder), *words]
            pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
            self.started.append(subprocess.Popen(command, env=environment, cwd=ROOT, **pipes))
        return self.started[-len(own) :]

    def finish(self, *own: dict) -> list[str]:
        """Runs to the end; the processes' lines on standard error."""
        started = self.start(*own)
        said = [process.communicate(timeout=240)[1] for process in started]
        assert not any(process.returncode for process in started), said
        return said

    def result(self) -> tuple:
        """All that must not depend on the processes."""
        found = files.read_jsonl(self.home / "metrics.jsonl")
        kept = [{name: value for name, value in row.items() if name not in rollout_metrics.TIMINGS} for row in found]
        recorded = [files.read_jsonl(self.home / "iterations" / f"{i:04d}.jsonl") for i in range(len(kept))]
        return files.read_json(self.home / "done.json")["params_sha256"], kept, recorded


@pytest.fixture
def run(tmp_path):
    """Makes runs whose processes do not outlive the test."""
    made = []

    def make(name):
        made.append(Run(tmp_path / name))
        return made[-1]

    yield make
    for process in (process for run in made for process in run.started if process.poll() is None):
        process.kill()
        process.wait()


@pytest.mark.slow
def test_a_run_by_two_processes_one_of_which_dies_ends_with_the_bits_of_one_process(run):
    whole, shared = run("whole"), run("shared")
    whole.finish({})

    # The tools of one process break: which episodes are sampled again is decided on all, whoever sampled them.
    lead, other = shared.start({"fail": 8}, {"die": 1})
    said = [process.communicate(timeout=240)[1] for process in (lead, other)]
    assert other.returncode == -signal.SIGKILL
    assert lead.returncode and "another" in said[0]  # it says that another process or task has gone
    assert "4 of 8 episodes of iteration 0 are masked" not in said[1] and "ppo" not in said[1]  # only the lead speaks
    assert "sampling them again" in said[0]
    assert checkpoint.saved_steps(shared.home / "checkpoints") == [1]

    shared.finish({})
    assert shared.result() == whole.result()

    known = {task.id: task for task in toy.inputs(toy.config(shared.folder)).tasks}
    recorded = recordings.load_rollouts(shared.home / "iterations", 0, known)
    assert hosts.decode_rollouts(hosts.encode_rollouts([]), known) == []
    for one, other in zip(hosts.decode_rollouts(hosts.encode_rollouts(recorded), known), recorded, strict=True):
        assert dataclasses.replace(one, log=None) == dataclasses.replace(other, log=None)
        logs = one.log.arrays(), other.log.arrays()
        assert all(np.array_equal(logs[0][name], logs[1][name]) for name in logs[0])
