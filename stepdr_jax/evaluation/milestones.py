"""The QA sets at milestones of training: what a stage has learnt after so many tokens.

Training lays down its parameters every config.eval.every_tokens tokens. They are evaluated by the training process itself
(`inline`, one process on one machine) or by another job that reads the same run directory (`watch`: pods keep training).
Either way seed<k>/<stage>/qa.jsonl gets one row a milestone, and the episodes lie under seed<k>/eval/.
"""

import contextlib
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from stepdr_jax import files
from stepdr_jax.agent.tools import Host
from stepdr_jax.evaluation import format_checks, qa, results

METRICS = ("reward", "correct", "cited", "answered", "turns")
TRAINED = ("midtrain1", "midtrain2", "sft")


def rows_path(config, stage: str) -> Path:
    return Path(config.run_dir) / f"seed{config.seed}" / stage / "qa.jsonl"


def evaluate(config, stage: str, step: int, host: Host | None) -> dict:
    """Evaluates one milestone, or takes what is there already, and returns its row of qa.jsonl.

    Returns:
        step, tokens (that training had read), episodes, missing, means of METRICS, each with its 95 % interval under
        `low` and `high`, and `format` (`format_checks.shares`).
    """
    from stepdr_jax.runtime import checkpoint
    from stepdr_jax.training import state

    found = results.read(qa.evaluate(config, f"{stage}@{step}", host))
    kept = state.found_in(config, state.stage_dir(config, config.seed, stage))
    intervals = {name: results.measure(found, results.BY_NAME[name]) for name in METRICS}
    known = {name: interval for name, interval in intervals.items() if interval.n}
    row = {
        "step": step,
        "tokens": checkpoint.latest_metadata(state.milestone_dir(kept, step))["tokens"],
        "episodes": len(found),
        "missing": sum(result.missing is not None for result in found),
        **{name: round(interval.mean, 6) for name, interval in known.items()},
        "low": {name: round(interval.low, 6) for name, interval in known.items()},
        "high": {name: round(interval.high, 6) for name, interval in known.items()},
        "format": format_checks.shares(result.trajectory for result in found if result.missing is None),
    }
    path, exists = rows_path(config, stage), set(state.milestones(kept))
    before = files.read_jsonl(path) if path.exists() else []
    kept = [other for other in before if other["step"] != step and other["step"] in exists]  # others were undone
    files.write_jsonl(path, sorted([*kept, row], key=lambda other: other["step"]))
    return row


def inline(
    config, stage: str, host: Callable[[], contextlib.AbstractContextManager[Host | None]]
) -> Callable[[int], dict] | None:
    """What `training.loop.train` calls at a milestone; None when the config leaves evaluation to another job.

    Args:
        host: opens a tool host for the time of one evaluation.
    """
    if not (config.eval.every_tokens and config.eval.inline):
        return None

    def on_milestone(step: int) -> dict:
        with host() as opened:
            return evaluate(config, stage, step, opened)

    return on_milestone


def watch(config, stages: Sequence[str], host: Host | None, *, every: float = 30.0, sleep=time.sleep) -> Iterator[dict]:
    """Yields the row of each milestone as it appears, until every stage is done and all of them are evaluated.

    Args:
        stages: of config.seed, whether they have begun or not.
        every: seconds between looks at the run directory.
    """
    from stepdr_jax.runtime import checkpoint
    from stepdr_jax.training import state

    homes = {stage: state.stage_dir(config, config.seed, stage) for stage in stages}
    seen = set()  # a milestone that was undone may come again, at the same step
    while True:
        kept = {stage: state.found_in(config, home) for stage, home in homes.items()}
        done = all((home / "done.json").exists() for home in homes.values())  # before looking, so that none is missed
        new = [
            (stage, step, checkpoint.mark(state.milestone_dir(kept[stage], step), step))
            for stage in stages
            for step in state.milestones(kept[stage])
        ]
        new = [milestone for milestone in new if milestone not in seen]
        for stage, step, _ in new:
            yield {"stage": stage} | evaluate(config, stage, step, host)
        seen.update(new)
        if done and not new:
            return
        if not new:
            sleep(every)
