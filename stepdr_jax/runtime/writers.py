"""Everything a stage writes about itself while it trains: metrics.jsonl, events.jsonl, TensorBoard, Weights & Biases.

metrics.jsonl holds one row per log interval, the same whether or not the run was interrupted. events.jsonl is the diary:
what happened and when, restarts and all, in the order in which it happened. Only the first process writes.
"""

import hashlib
import os
import time
from pathlib import Path

import jax

from stepdr_jax import files
from stepdr_jax.errors import UserError


def flat(row: dict, prefix: str = "") -> dict[str, float]:
    """The numbers of a row under slash-joined names."""
    out: dict[str, float] = {}
    for name, value in row.items():
        if isinstance(value, dict):
            out |= flat(value, f"{prefix}{name}/")
        elif isinstance(value, int | float):
            out[prefix + name] = value
    return out


def truncate_rows(path: str | os.PathLike, step: int, *, key: str = "step") -> list[dict]:
    """Removes rows past `step`, which the resumed run will write again, and returns the rest."""
    if not Path(path).exists():
        return []
    rows = files.read_jsonl(path)
    kept = [row for row in rows if row[key] <= step]
    files.write_jsonl(path, kept)  # also drops a torn last line
    return kept


class Journal:
    """The writers of one stage, from where a checkpoint left off.

    Args:
        home: folder of the stage.
        config: the run's config.
        stage: its name.
        step: of the last row that is kept.
        key: field of a row that numbers the rows.

    Attributes:
        rows: of metrics.jsonl, those of earlier processes included (empty in processes other than the first).
        first_start: unix time at which the stage first began.
    """

    def __init__(self, home: str | os.PathLike, config, stage: str, step: int, *, key: str = "step"):
        self.home, self.rows, self.key = Path(home), [], key
        self.first_start = time.time()
        self._board = self._wandb = None
        self._writes = jax.process_index() == 0
        if not self._writes:
            return
        events = read_events(self.home)
        self.first_start = events[0]["time"] if events else self.first_start
        self.rows = truncate_rows(self.home / "metrics.jsonl", step, key=key)
        if config.log.tensorboard:
            from tensorboardX import SummaryWriter  # here: protobuf takes half a second to import

            self._board = SummaryWriter(str(self.home / "tensorboard"), purge_step=step + 1 if self.rows else None)
        if config.log.wandb_project:
            self._wandb = _wandb_run(config, stage, self.home, key)
        devices = jax.devices()
        self.event(
            "start", step=step, device=devices[0].device_kind, devices=len(devices), processes=jax.process_count()
        )

    def row(self, row: dict) -> None:
        """Appends a row of metrics."""
        if not self._writes:
            return
        files.append_jsonl(self.home / "metrics.jsonl", row)
        self.rows.append(row)
        self._plot(row[self.key], flat(row))

    def measured(self, row: dict) -> None:
        """Takes note of the evaluation of a milestone; its row is in qa.jsonl already."""
        self.event("evaluated", step=row["step"])
        if self._writes:
            self._plot(row["step"], flat({"step": row["step"], "qa": row}))

    def _plot(self, step: int, numbers: dict[str, float]) -> None:
        if self._board:
            for name, value in numbers.items():
                self._board.add_scalar(name, value, step)
            self._board.flush()
        if self._wandb:
            self._wandb.log(numbers)

    def event(self, event: str, **fields) -> None:
        """Appends to the diary, with the time."""
        if self._writes:
            files.append_jsonl(self.home / "events.jsonl", {"time": round(time.time(), 3), "event": event} | fields)

    def close(self) -> None:
        if self._board:
            self._board.close()
        if self._wandb:
            self._wandb.finish()


def read_events(home: str | os.PathLike) -> list[dict]:
    """The diary of a stage, a torn last line left out."""
    path = Path(home) / "events.jsonl"
    return files.read_jsonl(path) if path.exists() else []


def _wandb_run(config, stage: str, home: Path, key: str):
    """A run of Weights & Biases that a resumed process continues. WANDB_MODE=offline needs no account."""
    try:
        import wandb
    except ImportError:
        raise UserError(
            "log.wandb_project: Weights & Biases is not installed; install it with: pip install wandb, or leave "
            "--config.log.wandb_project empty"
        ) from None
    name = f"{config.name}-seed{config.seed}-{stage}"
    run = wandb.init(
        project=config.log.wandb_project,
        name=name,
        id=hashlib.blake2b(f"{name} {home.absolute()}".encode(), digest_size=8).hexdigest(),
        resume="allow",
        dir=str(home),
        config=config.to_dict(),
    )
    run.define_metric("*", step_metric=key)  # a run that goes back writes smaller steps again
    return run
