"""What a stage directory holds."""

from pathlib import Path

from stepdr_jax import files
from stepdr_jax.training import metrics


def rows(run_dir):
    """metrics.jsonl without timings."""
    path = Path(run_dir) / "seed0" / "midtrain1" / "metrics.jsonl"
    return [{k: v for k, v in row.items() if k not in metrics.TIMINGS} for row in files.read_jsonl(path)]


def checkpoints(run_dir):
    return Path(run_dir) / "seed0" / "midtrain1" / "checkpoints"
