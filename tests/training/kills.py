"""Kills a training run with signal 9 at random moments, on changing numbers of processes, and compares
its result to an uninterrupted run: rows of metrics and parameters must be equal to the bit.

  python -m tests.training.kills --kills=20                          a tiny model on data made in memory
  python -m tests.training.kills --kills=20 --run_dir=runs/miniature     the miniature's first stage, from that run's
  data

Every run has 8 simulated devices on this machine: one process with eight, or two with four (see `runtime.distributed`
for why their bits are the same). A third of the way the run goes from two processes to one, and later back.
"""

import dataclasses
import json
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from absl import app, flags

from stepdr_jax import files
from stepdr_jax.training import metrics

ROOT = Path(__file__).parents[2]
DEVICES = 8
FIELDS = {"mesh.data": 2, "mesh.fsdp": 2, "mesh.context": 2, "distributed.join_seconds": 60.0}
TINY = FIELDS | {
    "midtrain1.batch_size": 8,
    "model.num_kv_heads": 2,
    "midtrain1.log_every": 5,
    "midtrain1.checkpoint_every": 10,
}


@dataclasses.dataclass
class Job:
    """A training command in `run_dir`: of tests.training.tiny, or of launch.midtrain when it has data of its own."""

    run_dir: Path
    fields: dict
    real: bool = False
    started: list[subprocess.Popen] = dataclasses.field(default_factory=list)

    @property
    def home(self) -> Path:
        return self.run_dir / "seed0" / "midtrain1"

    def start(self, processes: int) -> list[subprocess.Popen]:
        """One Popen for each process, that find each other on a free port of this machine."""
        with socket.socket() as probe:
            probe.bind(("localhost", 0))
            port = probe.getsockname()[1]
        environment = os.environ | {
            "JAX_PLATFORMS": "cpu",
            "XLA_FLAGS": f"--xla_force_host_platform_device_count={DEVICES // processes}",
            "PYTHONPATH": str(ROOT),
            "JAX_COMPILATION_CACHE_DIR": str(self.run_dir.parent / "compiled"),
        }
        self.started = []
        for number in range(processes):
            joined = {
                "distributed.coordinator": f"localhost:{port}",
                "distributed.processes": processes,
                "distributed.process": number,
            }
            log = open(self.run_dir.with_suffix(f".{number}.log"), "ab")
            self.started.append(
                subprocess.Popen(self._command(self.fields | joined), env=environment, cwd=ROOT, stdout=log, stderr=log)
            )
        return self.started

    def _command(self, fields: dict) -> list[str]:
        if self.real:
            words = [f"--config.{name}={value}" for name, value in {"run_dir": self.run_dir, **fields}.items()]
            return [sys.executable, "-m", "launch.midtrain", "--stage=midtrain1", *words]
        words = [f"{name}={json.dumps(value)}" for name, value in fields.items()]
        return [sys.executable, "-m", "tests.training.tiny", str(self.run_dir), "midtrain1", *words]

    def finish(self, processes: int, seconds: float = 1200.0) -> dict:
        """Runs to the end of the stage and returns its done.json."""
        statuses = [process.wait(seconds) for process in self.start(processes)]
        if any(statuses):
            raise RuntimeError(f"exit statuses {statuses}; see {self.run_dir}.*.log")
        return files.read_json(self.home / "done.json")

    def rows(self) -> list[dict]:
        """metrics.jsonl without timings."""
        return [
            {name: value for name, value in row.items() if name not in metrics.TIMINGS}
            for row in files.read_jsonl(self.home / "metrics.jsonl")
        ]


def kill(processes: list[subprocess.Popen], after: float) -> bool:
    """Sends signal 9 to all, `after` seconds from now; False when they had all ended by themselves."""
    time.sleep(after)
    alive = any(process.poll() is None for process in processes)
    for process in processes:
        if process.poll() is None:
            process.send_signal(signal.SIGKILL)
        process.wait()
    return alive


def layouts(kills: int) -> list[int]:
    """Processes of each killed start, and of the last one: two, one for the middle third, two."""
    return [1 if kills // 3 <= number < 2 * kills // 3 else 2 for number in range(kills)] + [2]


def torture(job: Job, kills: int, seed: int, longest: float) -> tuple[dict, list[str]]:
    """Kills `job` so often, then lets it end. Returns its done.json and a line for each kill."""
    rng, lines = random.Random(seed), []
    *killed, last = layouts(kills)
    for processes in killed:
        after = rng.uniform(1.0, longest)
        if not kill(job.start(processes), after):
            raise RuntimeError("the run ended before it had been killed often enough; give it more --steps")
        saved = sorted(path.name for path in (job.home / "checkpoints").glob("*"))
        lines.append(f"{processes} processes, killed after {after:.1f} s; checkpoints: {', '.join(saved) or 'none'}")
        print(lines[-1], file=sys.stderr, flush=True)
    return job.finish(last), lines


def main(_) -> None:
    began = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        jobs = []
        for name in ("whole", "killed"):
            fields = FIELDS | {"midtrain1.warmup_data_steps": _STEPS.value // 4} if _RUN_DIR.value else TINY
            job = Job(Path(folder) / name, fields | {"midtrain1.steps": _STEPS.value}, real=bool(_RUN_DIR.value))
            job.run_dir.mkdir()
            for part in ("data", "tokenizer") if job.real else ():
                shutil.copytree(Path(_RUN_DIR.value) / part, job.run_dir / part)
            if job.real:
                job.fields["midtrain1.checkpoint_every"] = 10
            jobs.append(job)
        whole, killed = jobs
        expected = whole.finish(1)
        done, lines = torture(killed, _KILLS.value, _SEED.value, _LONGEST.value)
        same = done["params_sha256"] == expected["params_sha256"] and killed.rows() == whole.rows()
        print(
            json.dumps(
                {
                    "kills": len(lines),
                    "steps": done["steps"],
                    "rows": len(whole.rows()),
                    "final_loss": [expected["final_loss"], done["final_loss"]],
                    "bit_for_bit": same,
                    "seconds": round(time.monotonic() - began),
                }
            )
        )
    sys.exit(0 if same else 1)


if __name__ == "__main__":
    _KILLS = flags.DEFINE_integer("kills", 20, "how often")
    _SEED = flags.DEFINE_integer("kill_seed", 0, "of the moments")
    _LONGEST = flags.DEFINE_float("longest", 40.0, "seconds that a start may live at most")
    _STEPS = flags.DEFINE_integer("steps", 400, "of the run")
    _RUN_DIR = flags.DEFINE_string(
        "run_dir", "", "a run with data and tokenizer, which are copied; empty = data in memory"
    )
    app.run(main)
