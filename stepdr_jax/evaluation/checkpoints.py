"""Held-out questions on evaluation checkpoints: what a stage has learned after so many tokens.

Training saves its parameters for evaluation every config.eval.every_tokens tokens. They are evaluated by the training
process itself (`inline_evaluation`, one process on one machine) or by another job that reads the same run directory
(`watch_stages`: pods keep training). Either way seed<k>/<stage>/qa.jsonl gets one row per evaluation checkpoint, and
the episodes lie under seed<k>/eval/.
"""

import contextlib
import time
from collections.abc import Callable, Iterator, Sequence

from stepdr_jax import files
from stepdr_jax.agent.tools import Host
from stepdr_jax.evaluation import format_checks, qa, results
from stepdr_jax.runtime.layout import RunLayout

METRICS = ("reward", "correct", "cited", "answered", "turns")


def evaluate_checkpoint(config, stage: str, step: int, host: Host | None) -> dict:
    """Evaluates the checkpoint of `step`, or takes its recorded episodes, and returns its row of qa.jsonl.

    Returns:
        step, tokens (that training had read), episodes, missing, means of METRICS, each with its 95 % interval under
        `low` and `high`, and `format` (`format_checks.shares`).
    """
    from stepdr_jax.runtime import checkpoint

    found = results.read_results(qa.evaluate(config, f"{stage}@{step}", host))
    layout = RunLayout.from_config(config).stage(stage).for_reading()
    intervals = {name: results.measure(found, results.BY_NAME[name]) for name in METRICS}
    known = {name: interval for name, interval in intervals.items() if interval.n}
    row = {
        "step": step,
        "tokens": checkpoint.latest_metadata(layout.eval_checkpoint(step))["tokens"],
        "episodes": len(found),
        "missing": sum(result.missing is not None for result in found),
        **{name: round(interval.mean, 6) for name, interval in known.items()},
        "low": {name: round(interval.low, 6) for name, interval in known.items()},
        "high": {name: round(interval.high, 6) for name, interval in known.items()},
        "format": format_checks.shares(result.trajectory for result in found if result.missing is None),
    }
    exists = set(layout.eval_steps())
    before = files.read_jsonl(layout.qa_rows) if layout.qa_rows.exists() else []
    # A rollback removes checkpoints; their rows go with them.
    others = [other for other in before if other["step"] != step and other["step"] in exists]
    files.write_jsonl(layout.qa_rows, sorted([*others, row], key=lambda other: other["step"]))
    return row


def inline_evaluation(
    config, stage: str, host: Callable[[], contextlib.AbstractContextManager[Host | None]]
) -> Callable[[int], dict] | None:
    """What `training.loop.train` calls at an evaluation checkpoint; None when the config leaves that to another job.

    Args:
        host: opens a tool host for the time of one evaluation.
    """
    if not (config.eval.every_tokens and config.eval.inline):
        return None

    def on_checkpoint(step: int) -> dict:
        with host() as opened:
            return evaluate_checkpoint(config, stage, step, opened)

    return on_checkpoint


def watch_stages(
    config, stages: Sequence[str], host: Host | None, *, every: float = 30.0, sleep=time.sleep
) -> Iterator[dict]:
    """Yields the row of each evaluation checkpoint as it appears, until every stage is done and all are evaluated.

    Args:
        stages: of config.seed, whether they have begun or not.
        every: seconds between two scans of the run directory.
    """
    from stepdr_jax.runtime import checkpoint

    run = RunLayout.from_config(config)
    seen = set()  # with a mark of the files: after a rollback a checkpoint may be written again, at the same step
    while True:
        layouts = {stage: run.stage(stage).for_reading() for stage in stages}
        done = all(layout.done.exists() for layout in layouts.values())  # before the scan, so that none is missed
        new = [
            (stage, step, checkpoint.fingerprint(layout.eval_checkpoint(step), step))
            for stage, layout in layouts.items()
            for step in layout.eval_steps()
        ]
        new = [found for found in new if found not in seen]
        for stage, step, _ in new:
            yield {"stage": stage} | evaluate_checkpoint(config, stage, step, host)
        seen.update(new)
        if done and not new:
            return
        if not new:
            sleep(every)
