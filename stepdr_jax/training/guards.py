"""Guards against loss spikes: a limit on gradient norms in each step, a check of losses at each log row, rollback.

Inside the compiled step an update whose gradient is not finite, or whose norm is many times the running mean, is
skipped. At each log row the host checks the number of skipped steps and the loss. When either is too high, the run
rolls back to the last good checkpoint and continues with data after the spike. Every decision is a function of the
state in a checkpoint and of the log rows since, so a run that is killed and resumed decides the same. PaLM (arXiv
2204.02311, section 5.1) did this by hand.
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from ml_collections import ConfigDict

from stepdr_jax import files
from stepdr_jax.errors import UserError
from stepdr_jax.runtime import distributed
from stepdr_jax.runtime.layout import StageLayout


@dataclasses.dataclass(frozen=True)
class NormLimits:
    """A gradient norm above `factor` times the mean of the last `window` applied steps is a spike; factor 0 = never."""

    factor: float = 0.0
    window: int = 100

    @classmethod
    def from_config(cls, guard: ConfigDict) -> "NormLimits":
        """From the `guard` section of a stage's config."""
        return cls(float(guard.norm_factor), int(guard.norm_window))


NO_LIMIT = NormLimits()


def empty_norm_stats() -> dict[str, jax.Array]:
    """The part of the train state that limits norms: running mean float32[] and number of norms in it int32[]."""
    return {"mean": jnp.zeros((), jnp.float32), "seen": jnp.zeros((), jnp.int32)}


def norm_limit(stats: dict[str, jax.Array], limits: NormLimits) -> jax.Array:
    """The largest norm that a step may have, float32[]; infinite until the mean covers a whole window."""
    if not limits.factor:
        return jnp.float32(jnp.inf)
    return jnp.where(stats["seen"] >= limits.window, limits.factor * stats["mean"], jnp.inf)


def update_norm_stats(stats: dict[str, jax.Array], norm: jax.Array, limits: NormLimits) -> dict[str, jax.Array]:
    """The running mean after a step of this norm.

    A spike is added as the largest norm that would have passed, so that the mean follows a lasting change of scale.
    Norms that are not finite, or 0 because a batch had no targets, are not added.
    """
    seen = stats["seen"] + 1
    share = 1.0 / jnp.minimum(seen, limits.window).astype(jnp.float32)
    mean = stats["mean"] + share * (jnp.minimum(norm, norm_limit(stats, limits)) - stats["mean"])
    counts = jnp.isfinite(norm) & (norm > 0)
    return {"mean": jnp.where(counts, mean, stats["mean"]), "seen": jnp.where(counts, seen, stats["seen"])}


@dataclasses.dataclass(frozen=True)
class Rollback:
    """One rollback: from the log row of step `at` to the checkpoint of step `to` (0 = the start of the stage).

    `complete` once the checkpoints after `to` have been removed.
    """

    at: int
    to: int
    reason: str
    complete: bool = False


@dataclasses.dataclass
class LossMonitor:
    """Running means of the losses, and the last good checkpoint. Plain data, saved with every checkpoint.

    losses: source -> (running mean of its loss over log rows, number of rows).
    good_step: step of the last checkpoint whose log row passed the check; 0 is the start of the stage.
    unchecked: steps of checkpoints that no log row has covered yet.
    """

    losses: dict[str, tuple[float, int]] = dataclasses.field(default_factory=dict)
    good_step: int = 0
    unchecked: list[int] = dataclasses.field(default_factory=list)

    @classmethod
    def restore(cls, saved: Mapping[str, Any], rollbacks: list[Rollback]) -> "LossMonitor":
        """From the `as_dict` of a checkpoint. A checkpoint that the run rolled back to counts as good."""
        monitor = cls(**saved)
        monitor.losses = {name: (mean, rows) for name, (mean, rows) in monitor.losses.items()}
        if rollbacks and rollbacks[-1].to >= monitor.good_step:
            monitor.good_step, monitor.unchecked = rollbacks[-1].to, []
        return monitor

    def as_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)

    def check(self, guard: ConfigDict, row: Mapping[str, Any], weights: Mapping[str, float]) -> str | None:
        """The reason to roll back because of this log row, or None; then the row is added to the running means.

        Args:
            guard: section of the stage's config.
            row: from `metrics.metrics_row`.
            weights: target tokens of each source in this row.
        """
        reason = self._too_many_skips(guard, row) or self._loss_spike(guard, row, weights)
        if reason:
            return reason
        for name, loss in row["source_loss"].items():
            mean, rows = self.losses.get(name, (0.0, 0))
            rows += 1
            self.losses[name] = (mean + (loss - mean) / min(rows, guard.loss_window), rows)
        if self.unchecked:
            self.good_step, self.unchecked = max(self.unchecked), []
        return None

    def checkpoint_saved(self, step: int, *, checked: bool) -> None:
        """Records a scheduled checkpoint; `checked` when a log row ends at its step."""
        if checked:
            self.good_step = step
        else:
            self.unchecked.append(step)

    def _too_many_skips(self, guard: ConfigDict, row: Mapping[str, Any]) -> str | None:
        skipped = row["skipped"] + row["spikes"]
        if skipped < guard.max_skips:
            return None
        return f"{skipped} steps skipped ({row['skipped']} not finite, {row['spikes']} gradient spikes)"

    def _loss_spike(self, guard: ConfigDict, row: Mapping[str, Any], weights: Mapping[str, float]) -> str | None:
        """Compares each source with itself, so that another mixture of sources is no spike."""
        known = [name for name in row["source_loss"] if self.losses.get(name, (0.0, 0))[1] >= guard.loss_window]
        total = sum(weights[name] for name in known)
        if not guard.loss_rise or not total:
            return None
        rise = sum(weights[name] * (row["source_loss"][name] - self.losses[name][0]) for name in known) / total
        if rise <= guard.loss_rise:
            return None
        return f"loss {rise:.3g} nats per token above its running mean"


def read_rollbacks(layout: StageLayout) -> list[Rollback]:
    """The rollbacks of a stage so far, in order."""
    return [Rollback(**row) for row in files.read_json(layout.rollbacks)] if layout.rollbacks.exists() else []


def record_rollback(
    layout: StageLayout, guard: ConfigDict, rollbacks: list[Rollback], rollback: Rollback, row: Mapping[str, Any]
) -> bool:
    """Writes a rollback to rollbacks.json before anything is removed, so that a run killed from here on completes it.

    Returns:
        False when the config turns rollbacks off (max_rollbacks 0).

    Raises:
        UserError: max_rollbacks is used up; or rollbacks are off and no step of `row` was applied.
    """
    if not guard.max_rollbacks and row["grad_norm"] is not None:
        return False
    if len(rollbacks) >= guard.max_rollbacks:
        raise UserError(
            f"{layout.name}: {rollback.reason} at step {rollback.at}, after {len(rollbacks)} rollbacks; lower "
            f"--config.{layout.name}.learning_rate and delete {layout.directory}, or allow more rollbacks with "
            f"--config.{layout.name}.guard.max_rollbacks={2 * len(rollbacks) or 3}"
        )
    if distributed.is_lead():
        _write_rollbacks(layout, [*rollbacks, rollback])
    return True


def complete_rollback(layout: StageLayout, remove_after: Callable[[int], None]) -> list[Rollback]:
    """The rollbacks of a stage, after removing the checkpoints that the last one undoes if they still exist."""
    rollbacks = read_rollbacks(layout)
    if rollbacks and not rollbacks[-1].complete:
        remove_after(rollbacks[-1].to)
        rollbacks[-1] = dataclasses.replace(rollbacks[-1], complete=True)
        _write_rollbacks(layout, rollbacks)
    return rollbacks


def _write_rollbacks(layout: StageLayout, rollbacks: list[Rollback]) -> None:
    files.write_json(layout.rollbacks, [dataclasses.asdict(rollback) for rollback in rollbacks])


def data_position(rollbacks: list[Rollback], step: int) -> int:
    """Index of the batch that is read after `step` steps: batches between the `to` and `at` of a rollback are left out.

    Steps before the `to` of a rollback keep their data, so a run that resumes from an older checkpoint reads the same.
    """
    skipped, since = 0, step + 1
    for rollback in reversed(rollbacks):
        since = min(since, rollback.to)  # a later rollback undid what an earlier one had begun after it
        skipped += (rollback.at - rollback.to) * (step >= since)
    return step + skipped
