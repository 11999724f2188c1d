"""metrics.jsonl: one row per log interval, equal to an uninterrupted run's (timings apart) however often it resumed."""

import os
from collections.abc import Sequence
from pathlib import Path

from stepdr_jax import files


def row_of(window: dict, sources: Sequence[str], *, step: int, learning_rate: float, tokens: int) -> dict:
    """One row from the sums of a window (`training.step.empty_window`, on the host).

    Returns:
        step, loss (nats per target token; null when the window had none), source_loss {source: nats per target token},
        learning_rate, grad_norm (mean before clipping), skipped (steps whose gradient was not finite), spikes (steps whose
        gradient was too large), tokens (so far, padding excluded).
    """
    weight = float(window["weight"].sum())
    steps = int(window["steps"])
    return {
        "step": step,
        "loss": float(window["loss"].sum()) / weight if weight else None,
        "source_loss": {
            name: float(loss) / float(w)
            for name, loss, w in zip(sources, window["loss"], window["weight"], strict=True)
            if w
        },
        "learning_rate": learning_rate,
        "grad_norm": float(window["grad_norm"]) / steps if steps else None,
        "skipped": int(window["skipped"]),
        "spikes": int(window["spikes"]),
        "tokens": tokens,
    }


def rewind(path: str | os.PathLike, step: int, *, key: str = "step") -> list[dict]:
    """Removes rows past `step`, which the resumed run will write again, and returns the rest."""
    if not Path(path).exists():
        return []
    rows = files.read_jsonl(path)
    kept = [row for row in rows if row[key] <= step]
    files.write_jsonl(path, kept)  # also drops a torn last line
    return kept
