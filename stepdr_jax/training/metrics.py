"""Rows of metrics.jsonl, one per log interval: losses by source and capability from exact sums, and timings.

All fields but `TIMINGS` are the same whether or not the run was interrupted.
"""

import time
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

TIMINGS = ("tokens_per_second", "step_seconds", "mfu", "goodput", "eta_seconds", "slowest_host")


def mean_losses(names: Sequence[str], loss: Iterable[float], weight: Iterable[float]) -> dict[str, float]:
    """Mean loss per name, from sums. Entries of the same name are added; names without weight are left out."""
    sums: dict[str, list[float]] = {}
    for name, part, w in zip(names, loss, weight, strict=True):
        total = sums.setdefault(name, [0.0, 0.0])
        total[0] += float(part)
        total[1] += float(w)
    return {name: part / w for name, (part, w) in sums.items() if w}


def metrics_row(
    window: Mapping[str, np.ndarray],
    sources: Sequence[str],
    *,
    step: int,
    learning_rate: float,
    tokens: int,
    capabilities: Sequence[str] = (),
    families: Sequence[str] = (),
) -> dict[str, Any]:
    """One row from the sums of a window (`training.step.empty_window`, on the host).

    Args:
        sources, capabilities: names of the window's sums.
        families: of each source; empty leaves them out.

    Returns:
        step, loss (nats per target token; null when the window had none), source_loss, capability_loss and family_loss
        {name: nats per target token}, learning_rate, grad_norm (mean before clipping), skipped (steps whose gradient
        was not finite), spikes (steps whose gradient was too large), tokens (so far, padding excluded).
    """
    weight = float(window["weight"].sum())
    steps = int(window["steps"])
    row: dict[str, Any] = {
        "step": step,
        "loss": float(window["loss"].sum()) / weight if weight else None,
        "source_loss": mean_losses(sources, window["loss"], window["weight"]),
    }
    if capabilities:
        row["capability_loss"] = mean_losses(capabilities, window["capability_loss"], window["capability_weight"])
    if families:
        row["family_loss"] = mean_losses(families, window["loss"], window["weight"])
    return row | {
        "learning_rate": learning_rate,
        "grad_norm": float(window["grad_norm"]) / steps if steps else None,
        "skipped": int(window["skipped"]),
        "spikes": int(window["spikes"]),
        "tokens": tokens,
    }


class ThroughputMeter:
    """Step durations, and the timings of a log row that follow from them.

    Args:
        productive: seconds of steps that earlier processes took and that are still part of the run.
        first_start: unix time at which the stage first began, for goodput.
        peak_flops: of all devices, FLOP/s; None leaves MFU out.
    """

    def __init__(self, *, productive: float, first_start: float, peak_flops: float | None) -> None:
        self.productive, self.first_start, self.peak_flops = productive, first_start, peak_flops
        self.compiled = False
        self.seconds: list[float] = []

    def record_step(self, seconds: float) -> None:
        """Records one step. The first step of a process includes compilation: neither speed nor goodput counts it."""
        if self.compiled:
            self.seconds.append(seconds)
            self.productive += seconds
        self.compiled = True

    def timings(self, *, steps: int, tokens: float, flops: float, remaining: int) -> dict[str, Any]:
        """The timings of a log row; resets the meter for the next row.

        Args:
            steps, tokens, flops: of the row, by whichever process; only their means are used.
            remaining: steps to the end of the stage.

        Returns:
            tokens_per_second, step_seconds {median, p90, largest}, mfu (share of peak), goodput (share of the wall
            clock since the first start, restarts and rollbacks included, that went into steps which still count),
            eta_seconds; null where unknown.
        """
        out: dict[str, Any] = dict.fromkeys(TIMINGS)
        if self.seconds and steps:
            spent, share = sum(self.seconds), len(self.seconds) / steps
            median, p90, largest = (float(np.quantile(self.seconds, q)) for q in (0.5, 0.9, 1.0))
            out["tokens_per_second"] = round(tokens * share / spent, 1)
            out["step_seconds"] = {"median": round(median, 5), "p90": round(p90, 5), "largest": round(largest, 5)}
            out["eta_seconds"] = round(remaining * spent / len(self.seconds), 1)
            if self.peak_flops:
                out["mfu"] = round(flops * share / spent / self.peak_flops, 5)
        wall = time.time() - self.first_start
        if 0 < self.productive <= wall:  # unknown after the clock was set back
            out["goodput"] = round(self.productive / wall, 4)
        self.seconds = []
        return out
