"""What makes a run give up a step, and what makes it go back: gradient norms inside the step, losses at each log row.

Inside the compiled step a gradient that is not finite, or whose norm is many times the running mean, is skipped. At each
log row the host looks at what was skipped and at the loss; when that is too much the loop goes back to the last good
checkpoint and reads on past the data that led here. Every judgement is a function of what a checkpoint holds and of the
rows since, so a run that is killed and resumed judges the same. PaLM (arXiv 2204.02311, section 5.1) did this by hand.
"""

import dataclasses
import os
from collections.abc import Callable, Mapping
from pathlib import Path

import jax
import jax.numpy as jnp

from stepdr_jax import files
from stepdr_jax.errors import UserError


@dataclasses.dataclass(frozen=True)
class NormLimits:
    """When a gradient norm is a spike: above `factor` times the mean of the last `window` taken steps; factor 0 = never."""

    factor: float = 0.0
    window: int = 100

    @classmethod
    def of(cls, guard) -> "NormLimits":
        """From the `guard` section of a stage's config."""
        return cls(float(guard.norm_factor), int(guard.norm_window))


NO_LIMIT = NormLimits()


def empty_norms() -> dict:
    """The part of a train state that norms are judged by: running mean float32[] and how many norms it has seen int32[]."""
    return {"mean": jnp.zeros((), jnp.float32), "seen": jnp.zeros((), jnp.int32)}


def norm_limit(norms: dict, limits: NormLimits) -> jax.Array:
    """The largest norm that a step may have, float32[]; infinite until the mean has seen a whole window."""
    if not limits.factor:
        return jnp.float32(jnp.inf)
    return jnp.where(norms["seen"] >= limits.window, limits.factor * norms["mean"], jnp.inf)


def updated(norms: dict, norm: jax.Array, limits: NormLimits) -> dict:
    """The running mean after a step of this norm.

    A spike counts as the largest norm that would have passed, so that a lasting change of scale is followed after a
    while instead of refused for ever. Norms that are not finite, or 0 because a batch had no targets, say nothing.
    """
    seen = norms["seen"] + 1
    share = 1.0 / jnp.minimum(seen, limits.window).astype(jnp.float32)
    mean = norms["mean"] + share * (jnp.minimum(norm, norm_limit(norms, limits)) - norms["mean"])
    counts = jnp.isfinite(norm) & (norm > 0)
    return {"mean": jnp.where(counts, mean, norms["mean"]), "seen": jnp.where(counts, seen, norms["seen"])}


@dataclasses.dataclass
class Watch:
    """The host's memory of how training goes: plain data, saved beside every checkpoint.

    losses: source -> [running mean of its loss over log rows, rows seen].
    good: step of the last checkpoint whose log row was sane; 0 is the start of the stage.
    waiting: steps of checkpoints that no log row has covered yet.
    """

    losses: dict[str, list] = dataclasses.field(default_factory=dict)
    good: int = 0
    waiting: list[int] = dataclasses.field(default_factory=list)

    @classmethod
    def after(cls, rewinds: list["Rewind"], saved: Mapping) -> "Watch":
        """From what `as_dict` gave; a checkpoint that the run went back to was good."""
        watch = cls(**saved)
        if rewinds and rewinds[-1].to >= watch.good:
            watch.good, watch.waiting = rewinds[-1].to, []
        return watch

    def as_dict(self) -> dict:
        return dataclasses.asdict(self)

    def judge(self, guard, row: Mapping, weights: Mapping[str, float]) -> str | None:
        """Takes in a row of metrics.jsonl and says what is wrong with it, or None.

        Args:
            guard: section of the stage's config.
            row: from `metrics.row_of`.
            weights: target tokens of each source in this row.
        """
        reason = self._too_many_skips(guard, row) or self._loss_spike(guard, row, weights)
        if reason:
            return reason
        for name, loss in row["source_loss"].items():
            mean, rows = self.losses.get(name, [0.0, 0])
            rows += 1
            self.losses[name] = [mean + (loss - mean) / min(rows, guard.loss_window), rows]
        if self.waiting:
            self.good, self.waiting = max(self.waiting), []
        return None

    def saved(self, step: int, *, judged: bool) -> None:
        """Takes note of a checkpoint that is kept by the schedule; `judged` when a log row ends at its step."""
        if judged:
            self.good = step
        else:
            self.waiting.append(step)

    def _too_many_skips(self, guard, row) -> str | None:
        skipped = row["skipped"] + row["spikes"]
        if skipped < guard.max_skips:
            return None
        return f"{skipped} steps skipped ({row['skipped']} not finite, {row['spikes']} gradient spikes)"

    def _loss_spike(self, guard, row, weights) -> str | None:
        """Compares sources with themselves, so that another mixture of them is no spike."""
        known = [name for name in row["source_loss"] if self.losses.get(name, [0.0, 0])[1] >= guard.loss_window]
        total = sum(weights[name] for name in known)
        if not guard.loss_rise or not total:
            return None
        rise = sum(weights[name] * (row["source_loss"][name] - self.losses[name][0]) for name in known) / total
        if rise <= guard.loss_rise:
            return None
        return f"loss {rise:.3g} nats per token above its running mean"


@dataclasses.dataclass(frozen=True)
class Rewind:
    """One return: at the row of step `at`, to the checkpoint of step `to` (0 = the start of the stage), and why.

    `complete` once the checkpoints past `to`, which hold what is being undone, are gone.
    """

    at: int
    to: int
    reason: str
    complete: bool = False


def read_rewinds(home: str | os.PathLike) -> list[Rewind]:
    """The returns of a stage so far, in order."""
    path = Path(home) / "rewinds.json"
    return [Rewind(**row) for row in files.read_json(path)] if path.exists() else []


def go_back(home: str | os.PathLike, stage: str, guard, rewinds: list[Rewind], rewind: Rewind, row: Mapping) -> bool:
    """Writes down that the run goes back, before anything is undone: one that is killed from here on finds it.

    Returns:
        False when the config says never to go back (max_rollbacks 0).

    Raises:
        UserError: it has gone back max_rollbacks times already; or may not, and took no step at all in `row`.
    """
    if not guard.max_rollbacks and row["grad_norm"] is not None:
        return False
    if len(rewinds) >= guard.max_rollbacks:
        raise UserError(
            f"{stage}: {rewind.reason} at step {rewind.at}, after going back {len(rewinds)} times; lower "
            f"--config.{stage}.learning_rate and delete {home}, or let it go back more often with "
            f"--config.{stage}.guard.max_rollbacks={2 * len(rewinds) or 3}"
        )
    if jax.process_index() == 0:
        _write(home, [*rewinds, rewind])
    return True


def complete(home: str | os.PathLike, remove_after: Callable[[int], None]) -> list[Rewind]:
    """The returns of a stage; the checkpoints that the last of them undoes are removed if they still exist."""
    rewinds = read_rewinds(home)
    if rewinds and not rewinds[-1].complete:
        remove_after(rewinds[-1].to)
        rewinds[-1] = dataclasses.replace(rewinds[-1], complete=True)
        _write(home, rewinds)
    return rewinds


def _write(home: str | os.PathLike, rewinds: list[Rewind]) -> None:
    if jax.process_index() == 0:
        files.write_json(Path(home) / "rewinds.json", [dataclasses.asdict(rewind) for rewind in rewinds])


def data_position(rewinds: list[Rewind], step: int) -> int:
    """Which batch the step after `step` steps reads: past those that were read between each `to` and its `at`.

    Steps before a return's `to` keep the data they had, so a run that resumes from an older checkpoint reads the same.
    """
    skipped, since = 0, step + 1
    for rewind in reversed(rewinds):
        since = min(since, rewind.to)  # a later return undid what an earlier one had begun after it
        skipped += (rewind.at - rewind.to) * (step >= since)
    return step + skipped
