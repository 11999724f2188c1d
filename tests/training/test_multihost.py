"""Two processes that find each other over loopback are one run: same bits as one process, killed or not."""

import signal

import pytest

from stepdr_jax import files
from stepdr_jax.runtime import checkpoint
from tests.training import kills
from tests.training.waiting import wait_for

FIELDS = kills.TINY | {"midtrain1.steps": 40}


@pytest.fixture
def jobs(tmp_path):
    """Makes jobs whose processes do not outlive the test."""
    made = []

    def make(name, **fields):
        made.append(kills.Job(tmp_path / name, FIELDS | fields))
        made[-1].run_dir.mkdir()
        return made[-1]

    yield make
    for job in made:
        kills.kill(job.started, 0.0)


def test_a_run_that_is_preempted_killed_and_moved_between_processes_ends_with_the_same_bits(jobs):
    whole, job = jobs("whole"), jobs("moved")
    expected = whole.finish(1)

    started = job.start(2)
    wait_for(started, lambda: latest(job) >= 10)
    started[1].send_signal(signal.SIGTERM)  # a cluster that takes one of its machines back
    assert [process.wait(120) for process in started] == [75, 75]
    [*_, preempted] = events = files.read_jsonl(job.home / "events.jsonl")
    assert preempted["event"] == "preempted" and 10 <= preempted["step"] == latest(job)

    started = job.start(1)
    wait_for(started, lambda: latest(job) >= 30)
    kills.kill(started, 0.0)
    continued = files.read_jsonl(job.home / "events.jsonl")[len(events)]
    assert (continued["step"], continued["processes"]) == (preempted["step"], 1)  # nothing is lost

    done = job.finish(2)
    assert done["params_sha256"] == expected["params_sha256"]
    assert job.rows() == whole.rows()


def latest(job) -> int:
    return (checkpoint.saved_steps(job.home / "checkpoints") or [0])[-1]
