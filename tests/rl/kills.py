"""Kills a PPO run with signal 9 while it samples, while it learns and while it saves, and tells it to end (SIGTERM) in
between; compares what it ends with to a run that nobody touched: parameters, rows of metrics and recorded episodes.

  python -m tests.rl.kills --kills=8 --run_dir=runs/miniature                  the SFT policy of that run
  python -m tests.rl.kills --kills=8 --run_dir=runs/miniature --staleness=1    sampled one step off-policy
"""

import dataclasses
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from absl import app, flags

from stepdr_jax import files
from stepdr_jax.rl import rollout_metrics
from stepdr_jax.runtime import distributed

ROOT = Path(__file__).parents[2]
PHASES = ("sampling", "learning", "saving", "preempted")
PATIENCE = 600.0  # seconds to come to a phase
SMALL = {"ppo.iterations": 16, "ppo.prompts_per_iteration": 8, "ppo.checkpoint_every": 3}


@dataclasses.dataclass
class Job:
    """A command that runs PPO in `run_dir`."""

    run_dir: Path
    command: Sequence[str]

    @property
    def home(self) -> Path:
        return self.run_dir / "seed0" / "ppo"

    def start(self) -> subprocess.Popen:
        environment = os.environ | {"JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT)}
        with open(self.run_dir.with_suffix(".log"), "ab") as log:
            return subprocess.Popen(self.command, env=environment, cwd=ROOT, stdout=log, stderr=log)

    def finish(self) -> dict:
        """Runs to the end and returns done.json."""
        if status := self.start().wait(3600):
            raise RuntimeError(f"exit status {status}; see {self.run_dir.with_suffix('.log')}")
        return files.read_json(self.home / "done.json")

    def rows(self) -> list[dict]:
        """metrics.jsonl without what is of one process."""
        found = files.read_jsonl(self.home / "metrics.jsonl") if (self.home / "metrics.jsonl").exists() else []
        return [{n: v for n, v in row.items() if n not in rollout_metrics.TIMINGS} for row in found]

    def recorded(self) -> list[dict[str, np.ndarray]]:
        """Token logs of every iteration."""
        return [dict(np.load(path)) for path in sorted((self.home / "iterations").glob("*.npz"))]

    def phase(self) -> str:
        """What the run does now, from what is on disk; with staleness it may sample, too."""
        if list((self.home / "checkpoints").glob(".writing-*")):
            return "saving"
        try:
            done = (self.home / "metrics.jsonl").read_bytes().count(b"\n")
        except FileNotFoundError:
            done = 0
        return "learning" if (self.home / "iterations" / f"{done:04d}.npz").exists() else "sampling"


def same(one: Job, other: Job) -> bool:
    """Whether rows and recorded episodes of two runs are equal to the bit."""
    logs, others = one.recorded(), other.recorded()
    equal = len(logs) == len(others) and all(
        np.array_equal(log[name], also[name]) for log, also in zip(logs, others, strict=True) for name in log
    )
    return equal and one.rows() == other.rows()


def strike(job: Job, phase: str, skip: int, delay: float) -> str:
    """Starts `job`, lets it come to `phase` as often as `skip` says and once more, and ends it `delay` seconds later.

    Returns what it was doing then. Raises RuntimeError when it ended by itself, or was preempted without a message.
    """
    process, before, seen = job.start(), "", 0
    deadline = time.monotonic() + PATIENCE
    wanted = "learning" if phase == "preempted" else phase
    while seen <= skip:
        if process.poll() is not None or time.monotonic() > deadline:
            process.kill()
            raise RuntimeError(f"status {process.poll()} before it was {phase}; see {job.run_dir.with_suffix('.log')}")
        now = job.phase()
        seen += now == wanted != before
        before = now
        time.sleep(0.002)
    time.sleep(delay)
    doing, rows_then = job.phase(), len(job.rows())
    process.send_signal(signal.SIGTERM if phase == "preempted" else signal.SIGKILL)
    status = process.wait(PATIENCE)
    expected = distributed.RESTART if phase == "preempted" else -signal.SIGKILL
    if status != expected:
        raise RuntimeError(f"exit status {status}, expected {expected}; see {job.run_dir.with_suffix('.log')}")
    saved = sorted(path.name for path in (job.home / "checkpoints").glob("[0-9]*"))
    return f"{phase}: struck while {doing} after {rows_then} iterations; checkpoints: {', '.join(saved) or 'none'}"


def _job(folder: Path, name: str) -> Job:
    run_dir = folder / name
    source = Path(_RUN_DIR.value)
    for part in ("corpus", "tokenizer", "world", "seed0/sft"):
        shutil.copytree(source / part, run_dir / part)
    fields = SMALL | {"run_dir": run_dir}
    if _STALENESS.value:
        fields |= {"ppo.staleness": _STALENESS.value, "ppo.tis_cap": 2.0}
    words = [f"--config.{field}={value}" for field, value in fields.items()]
    return Job(run_dir, [sys.executable, "-m", "launch.ppo", *words])


def main(_) -> None:
    began, rng, kills = time.monotonic(), random.Random(_SEED.value), _KILLS.value
    with tempfile.TemporaryDirectory() as folder:
        whole, killed = (_job(Path(folder), name) for name in ("whole", "killed"))
        expected = whole.finish()
        for number in range(kills):
            line = strike(killed, PHASES[number % len(PHASES)], skip=rng.randrange(2), delay=rng.uniform(0.0, 0.5))
            print(line, file=sys.stderr, flush=True)
        done = killed.finish()
        equal = done["params_sha256"] == expected["params_sha256"] and same(whole, killed)
    print(
        json.dumps(
            {
                "kills": kills,
                "staleness": _STALENESS.value,
                "iterations": done["iterations"],
                "bit_for_bit": equal,
                "seconds": round(time.monotonic() - began),
            }
        )
    )
    sys.exit(0 if equal else 1)


if __name__ == "__main__":
    _KILLS = flags.DEFINE_integer("kills", 8, "how often")
    _SEED = flags.DEFINE_integer("kill_seed", 0, "of the moments")
    _STALENESS = flags.DEFINE_integer("staleness", 0, "ppo.staleness")
    _RUN_DIR = flags.DEFINE_string("run_dir", "runs/miniature", "a run whose first seed has finished SFT; it is copied")
    app.run(main)
