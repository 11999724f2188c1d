"""Writes the trajectory page: recorded PPO episodes token by token, in one HTML file that opens offline.

By default every iteration of config.run_dir's seed, to run_dir/seed<k>/ppo/trajectories.html; works while PPO runs. For
a big run, or on another machine, name the folder and the iteration:

    python -m launch.trajectories --iterations=/data/run/seed0/ppo/iterations --only=120 --out=120.html
"""

from pathlib import Path

from absl import flags

from launch import entry
from stepdr_jax import records
from stepdr_jax.errors import UserError
from stepdr_jax.records import RubricSet, Task
from stepdr_jax.reporting import trajectories
from stepdr_jax.runtime import stages
from stepdr_jax.runtime.layout import RunLayout, StageLayout
from stepdr_jax.tokens.tokenizer import Tokenizer

_ITERATIONS = flags.DEFINE_string("iterations", "", "folder of recorded iterations, instead of the config's")
_ONLY = flags.DEFINE_string("only", "", "iterations to show, for example 12 or 0,10-19,59; default all")
_TOKENIZER = flags.DEFINE_string("tokenizer", "", "tokenizer.json that the ids are of; default the run's")
_OUT = flags.DEFINE_string("out", "", "file to write; default trajectories.html beside the iterations")
_MAX_MB = flags.DEFINE_integer("max_mb", 40, "most megabytes of episodes; the rest is left out, evenly", lower_bound=1)


def main(config) -> None:
    iterations = Path(_ITERATIONS.value or RunLayout.from_config(config).stage("ppo").iterations).resolve()
    stage = StageLayout(iterations.parent)  # run_dir/seed<k>/ppo, also of another run than the config's
    run = RunLayout(stage.directory.parents[1])
    if not iterations.is_dir():
        command = stages.command_of("ppo", config)
        raise UserError(f"{iterations} does not exist; run {command}, or name a folder with --iterations")
    wanted = trajectories.select_iterations(iterations, _ONLY.value)
    tokenizer = Path(_TOKENIZER.value or run.tokenizer)
    if not tokenizer.is_file():
        raise UserError(f"{tokenizer} does not exist; name the tokenizer of this run with --tokenizer")
    seed = stage.directory.parent.name.removeprefix("seed")
    out = Path(_OUT.value or stage.trajectories)
    counts = trajectories.write_trajectories_page(
        iterations,
        out,
        iterations=wanted,
        tokenizer=Tokenizer.load(tokenizer),
        tasks=_by_task(run.tasks, Task, "id"),
        rubrics=_by_task(run.rubrics, RubricSet, "task_id"),
        title=f"Trajectories of {run.root.name}",
        seed=int(seed) if seed.isdigit() else None,
        max_bytes=_MAX_MB.value * 1_000_000,
    )
    left = counts["episodes"] - counts["shown"]
    rest = f", {left} left out (--max_mb, --only)" if left else ""
    print(f"{out}  {counts['shown']} episodes{rest}, {counts['bytes'] / 1e6:.1f} MB")


def _by_task(path: Path, kind: type, field: str) -> dict:
    return {getattr(row, field): row for row in records.read_records(path, kind)} if path.exists() else {}


if __name__ == "__main__":
    entry.run(main, __doc__)
