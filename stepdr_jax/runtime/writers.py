"""What a stage logs while it trains: metrics.jsonl, events.jsonl, TensorBoard, Weights & Biases.

metrics.jsonl has one row per log interval, the same whether or not the run was interrupted. events.jsonl is the event
log: what happened and when, restarts included. Only the lead process writes.
"""

import hashlib
import os
import time
from pathlib import Path
from typing import Any

import jax
from ml_collections import ConfigDict

from stepdr_jax import files
from stepdr_jax.errors import UserError
from stepdr_jax.runtime import distributed
from stepdr_jax.runtime.layout import StageLayout


def flatten_numbers(row: dict[str, Any], prefix: str = "") -> dict[str, float]:
    """The numbers of a nested row, under slash-joined names."""
    out: dict[str, float] = {}
    for name, value in row.items():
        if isinstance(value, dict):
            out |= flatten_numbers(value, f"{prefix}{name}/")
        elif isinstance(value, int | float):
            out[prefix + name] = value
    return out


def truncate_rows(path: str | os.PathLike, step: int, *, key: str = "step") -> list[dict[str, Any]]:
    """Removes the rows after `step`, which the resumed run writes again, and returns the others."""
    if not Path(path).exists():
        return []
    rows = files.read_jsonl(path)
    kept = [row for row in rows if row[key] <= step]
    files.write_jsonl(path, kept)  # also drops an incomplete last line
    return kept


class StageWriters:
    """The logs of one stage, continued from a checkpoint.

    Args:
        layout: of the stage.
        config: the run's config.
        step: of the checkpoint; later rows are removed.
        key: field of a row that numbers the rows.

    Attributes:
        rows: of metrics.jsonl, those of earlier processes included (empty except in the lead process).
        first_start: unix time at which the stage first began.
    """

    def __init__(self, layout: StageLayout, config: ConfigDict, step: int, *, key: str = "step") -> None:
        self.layout, self.key = layout, key
        self.rows: list[dict[str, Any]] = []
        self.first_start = time.time()
        self._board = self._wandb = None
        if not distributed.is_lead():
            return
        events = files.read_jsonl(layout.events) if layout.events.exists() else []
        self.first_start = events[0]["time"] if events else self.first_start
        self.rows = truncate_rows(layout.metrics, step, key=key)
        if config.log.tensorboard:
            from tensorboardX import SummaryWriter  # here: protobuf takes half a second to import

            self._board = SummaryWriter(str(layout.tensorboard), purge_step=step + 1 if self.rows else None)
        if config.log.wandb_project:
            self._wandb = _start_wandb(config, layout, key)
        devices = jax.devices()
        self.write_event(
            "start", step=step, device=devices[0].device_kind, devices=len(devices), processes=jax.process_count()
        )

    def write_row(self, row: dict[str, Any]) -> None:
        """Appends a row of metrics."""
        if not distributed.is_lead():
            return
        files.append_jsonl(self.layout.metrics, row)
        self.rows.append(row)
        self._plot(row[self.key], flatten_numbers(row))

    def write_evaluation(self, row: dict[str, Any]) -> None:
        """Logs the evaluation of a checkpoint, whose row is in qa.jsonl already."""
        self.write_event("evaluated", step=row["step"])
        if distributed.is_lead():
            self._plot(row["step"], flatten_numbers({"step": row["step"], "qa": row}))

    def _plot(self, step: int, numbers: dict[str, float]) -> None:
        if self._board:
            for name, value in numbers.items():
                self._board.add_scalar(name, value, step)
            self._board.flush()
        if self._wandb:
            self._wandb.log(numbers)

    def write_event(self, event: str, **fields: Any) -> None:
        """Appends to the event log, with the time."""
        if distributed.is_lead():
            files.append_jsonl(self.layout.events, {"time": round(time.time(), 3), "event": event} | fields)

    def close(self) -> None:
        if self._board:
            self._board.close()
        if self._wandb:
            self._wandb.finish()


def _start_wandb(config: ConfigDict, layout: StageLayout, key: str):
    """A Weights & Biases run that a resumed process continues. WANDB_MODE=offline needs no account."""
    try:
        import wandb
    except ImportError:
        raise UserError(
            "log.wandb_project: Weights & Biases is not installed; install it with: pip install wandb, or leave "
            "--config.log.wandb_project empty"
        ) from None
    name = f"{config.name}-seed{config.seed}-{layout.name}"
    run = wandb.init(
        project=config.log.wandb_project,
        name=name,
        id=hashlib.blake2b(f"{name} {layout.directory.absolute()}".encode(), digest_size=8).hexdigest(),
        resume="allow",
        dir=str(layout.directory),
        config=config.to_dict(),
    )
    run.define_metric("*", step_metric=key)  # after a rollback smaller steps are written again
    return run
