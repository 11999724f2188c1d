"""Follows the metrics of a run, which may be on another machine, by reading what was appended to its files.

A row counts when its line is complete. A file that was replaced or truncated (a resumed stage drops rows after its
checkpoint) is read again from its start.
"""

import dataclasses
import itertools
import json
import math
import os
import time

from stepdr_jax import files
from stepdr_jax.errors import UserError
from stepdr_jax.reporting.measures import derived_rates, flatten_row
from stepdr_jax.runtime import stages
from stepdr_jax.runtime.layout import RunLayout, StageLayout

QUIET_SECONDS = 120.0  # without a row, and five times as long as rows usually take: worth saying
KEYS = ("iteration", "step")


@dataclasses.dataclass
class FollowedStage:
    """One stage of one seed. `rows`: x -> flat numbers; `poll` brings it up to date."""

    layout: StageLayout
    seed: int
    stage: str
    rows: dict[int, dict[str, float]] = dataclasses.field(default_factory=dict)
    unreadable: int = 0  # lines that are no JSON objects
    written: float = 0.0  # when the file last changed, seconds since 1970 by its file system's clock
    done: bool = False
    events: list[dict] = dataclasses.field(default_factory=list)
    _identity: tuple[int, int] = (0, 0)
    _offset: int = 0

    def poll(self) -> bool:
        """Reads what is new; returns whether there was anything. A file that is away for a moment changes nothing."""
        try:
            with open(self.layout.metrics, "rb") as file:
                status = os.fstat(file.fileno())
                identity = (status.st_dev, status.st_ino)
                if identity != self._identity or status.st_size < self._offset:
                    self.rows, self.unreadable, self._offset, self._identity = {}, 0, 0, identity
                file.seek(self._offset)
                new = file.read()
        except OSError:
            return False
        whole = new[: new.rfind(b"\n") + 1]
        self._offset += len(whole)
        self.written = status.st_mtime
        for line in whole.split(b"\n")[:-1]:
            self._take(line)
        done, self.done = self.done, self.layout.done.exists()
        self.events = self._events()
        return bool(whole) or done != self.done

    def _take(self, line: bytes) -> None:
        try:
            row = flatten_row(json.loads(line))
            x = next(int(row[key]) for key in KEYS if key in row)
        except (ValueError, AttributeError, StopIteration):
            self.unreadable += 1
            return
        for later in [old for old in self.rows if old > x]:  # a resumed stage does these again
            del self.rows[later]
        self.rows[x] = row | derived_rates(row)

    def _events(self) -> list[dict]:
        try:
            return files.read_jsonl(self.layout.events)
        except (OSError, UserError):
            return []

    @property
    def last(self) -> dict[str, float]:
        return self.rows[max(self.rows)] if self.rows else {}

    @property
    def made(self) -> int:
        """Iterations or steps behind it; iterations are numbered from 0."""
        return max(self.rows) + (self.unit == "iteration") if self.rows else 0

    @property
    def unit(self) -> str:
        return stages.stage_named(self.stage).unit

    def series(self, name: str) -> list[float]:
        return [self.rows[x].get(name, math.nan) for x in sorted(self.rows)]

    def row_seconds(self) -> float | None:
        """How long a row usually takes to come, by what the last rows say; None when they do not."""
        xs = sorted(self.rows)[-10:]
        taken = []
        for before, x in zip([None, *xs], xs, strict=False):
            row = self.rows[x]
            seconds = row.get("seconds", math.nan)  # of an iteration; sampling and training may overlap in it
            if math.isnan(seconds):
                seconds = row.get("seconds_sampling", math.nan) + row.get("seconds_training", math.nan)
            if math.isnan(seconds) and before is not None:
                seconds = row.get("step_seconds/median", math.nan) * (x - before)
            if math.isfinite(seconds):
                taken.append(seconds)
        return sum(taken) / len(taken) if taken else None

    def age(self, now: float | None = None) -> float:
        """Seconds since the last row; 0 where the other machine's clock is ahead."""
        return max(0.0, (time.time() if now is None else now) - self.written)

    def silent(self, now: float | None = None) -> bool:
        """Whether rows stopped coming though the stage is not finished."""
        return not self.done and self.age(now) > max(QUIET_SECONDS, 5 * (self.row_seconds() or 0.0))


class FollowedRun:
    """All stages of all seeds of a run directory that have rows so far."""

    def __init__(self, run_dir: str | os.PathLike):
        self.layout = RunLayout.of_run_dir(run_dir)
        self.stages: dict[tuple[int, str], FollowedStage] = {}

    def poll(self) -> bool:
        """Finds new stages and reads what is new in all; returns whether there was anything."""
        for key in itertools.product(self.layout.seeds(), stages.with_metrics()):
            layout = self.layout.stage(key[1], key[0])
            if key not in self.stages and layout.metrics.exists():
                self.stages[key] = FollowedStage(layout, *key)
        return any([followed.poll() for followed in self.stages.values()])

    @property
    def seeds(self) -> list[int]:
        return sorted({seed for seed, _ in self.stages})

    def latest(self) -> str | None:
        """The stage to look at: of those that run the one whose rows came last, else the last of the recipe."""
        order = stages.with_metrics()
        running = [one for one in self.stages.values() if not one.done]
        if running:
            return max(running, key=lambda one: (one.written, order.index(one.stage))).stage
        # What the quickstart does not run (a replay) is shown only where there is nothing else.
        return max(
            (stage for _, stage in self.stages),
            key=lambda stage: (stages.stage_named(stage).planned, order.index(stage)),
            default=None,
        )

    def stages_named(self, stage: str) -> list[FollowedStage]:
        """One per seed that has this stage."""
        return [self.stages[seed, stage] for seed in self.seeds if (seed, stage) in self.stages]
