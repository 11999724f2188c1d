"""Runs all stages, one after another: skips what is finished, shows the time left, ends with a table.

What is finished is in run_dir/stages.json; each stage's output is in run_dir/logs. A stage that stops ends the run with
its own one line; the same command continues there.
"""

import re
import shutil
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import rich.console
import rich.table
from ml_collections import ConfigDict

from stepdr_jax import configuration, files
from stepdr_jax.errors import UserError
from stepdr_jax.orchestration import plan, process
from stepdr_jax.orchestration.plan import PlannedStage
from stepdr_jax.progress import clock
from stepdr_jax.runtime import provenance
from stepdr_jax.runtime.layout import ENTRIES, RunLayout

NEEDED_BYTES = 2 * 10**9  # corpus, rows, checkpoints and reports of a run, with room to spare
LEFT = re.compile(r", (?:(\d+)h)?(?:(\d+)m)?(?:(\d+)s)? left$")
DONE = re.compile(r"  (\d+)/(\d+) ")


def run_stages(
    config: ConfigDict,
    reference: ConfigDict,
    config_arguments: Sequence[str],
    *,
    seeds: int = 1,
    fresh: bool = False,
) -> Path:
    """Runs every stage of `config` that is not finished and returns the report's path.

    Args:
        config: the run's config.
        reference: the config that the time estimates belong to.
        config_arguments: the --config flags that gave `config`, for the stages' own command lines.
        seeds: training seeds from config.seed on.
        fresh: delete the run directory first; refused when it holds anything that a run does not write.

    Raises:
        UserError: the folder is in use, not writable or short of space; or a stage stopped, with the stage's reason.
    """
    layout = RunLayout.from_config(config)
    with process.exclusive(layout.root):
        if fresh:
            _empty(layout.root)
        process.check_space(layout.root, NEEDED_BYTES)
        configuration.save_config(config, layout.root)
        ledger = _read_ledger(layout)
        todo = plan.plan(config, reference, seeds)
        view = _View(todo)
        ran = False
        for stage in todo:
            fingerprint = provenance.config_fingerprint(config, stage.key, stage.arguments)
            # The report draws on everything before it, so it is made again whenever something before it ran.
            if plan.finished(layout, stage, fingerprint, ledger) and not (ran and stage is todo[-1]):
                view.skip(stage, ledger[stage.key])
                continue
            ran = True
            _run_stage(layout, stage, fingerprint, ledger, list(config_arguments), view)
        view.table()
        return layout.root / todo[-1].output


def _run_stage(
    layout: RunLayout, stage: PlannedStage, fingerprint: str, ledger: dict, arguments: list[str], view: "_View"
) -> None:
    log_path, output = layout.logs / f"{stage.key}.log", layout.root / stage.output
    view.start(stage)
    outcome = process.run_module(stage.module, [*arguments, *stage.arguments], log_path, view.line)
    before = ledger.get(stage.key, {})
    resumed = before.get("unfinished", False)
    entry = {
        "seconds": round(outcome.seconds + (before.get("seconds", 0.0) if resumed else 0.0), 1),
        "peak_bytes": max(outcome.peak_bytes, before.get("peak_bytes", 0) if resumed else 0),
    }
    done = outcome.status == 0 and output.exists()
    entry |= {"fingerprint": fingerprint, "finished_at": time.time()} if done else {"unfinished": True}
    ledger[stage.key] = entry
    files.write_json(layout.ledger, ledger)
    view.end(stage, entry, done)
    if done:
        return
    if outcome.status in (130, -2):
        raise KeyboardInterrupt
    reason = process.describe(outcome.status) if outcome.status else f"ended without writing {output}"
    reason += f": {outcome.error}" if outcome.error and outcome.status else ""
    raise UserError(f"{stage.title} {reason} (log: {log_path}); then run the same command, finished work is kept")


def _read_ledger(layout: RunLayout) -> dict:
    try:
        ledger = files.read_json(layout.ledger) if layout.ledger.exists() else {}
    except UserError:  # only a record of what is done: every stage finds that out again by itself
        ledger = {}
    return ledger if isinstance(ledger, dict) else {}


def _empty(run_dir: Path) -> None:
    foreign = sorted(path.name for path in run_dir.iterdir() if not ENTRIES.match(path.name))
    if foreign:
        raise UserError(
            f"--fresh would delete {run_dir}, which also holds {', '.join(foreign[:3])} that no run writes; move it "
            "or choose another --config.run_dir"
        )
    for path in run_dir.iterdir():
        if path.name == ".lock":  # held by this process
            continue
        shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()


def seconds_left(line: str) -> float | None:
    """Reads the time left off a progress line (stepdr_jax.progress); None when it has none.

    The first tenth of a stage is not believed either: its rate includes compilation.
    """
    match, done = LEFT.search(line), DONE.search(line)
    if done and int(done[1]) * 10 < int(done[2]):
        return None
    if not match or not any(match.groups()):
        return None
    hours, minutes, seconds = (int(part or 0) for part in match.groups())
    return hours * 3600 + minutes * 60 + seconds


class _View:
    """What a person sees: where the run is, how long it will take, and at the end where the time went."""

    def __init__(self, todo: list[PlannedStage]):
        self.todo = todo
        self.rows: dict[str, tuple[str, dict]] = {}
        self.actual: list[tuple[float, float]] = []  # (estimated, actual) seconds of what ran to its end
        self.began = time.monotonic()
        self.stage_began = self.began
        self.current: PlannedStage | None = None
        self.terminal = sys.stderr.isatty()
        self.overwriting = False

    def skip(self, stage: PlannedStage, entry: dict) -> None:
        self.rows[stage.key] = ("already done", entry)

    def start(self, stage: PlannedStage) -> None:
        self.current, self.stage_began = stage, time.monotonic()
        number = self.todo.index(stage) + 1
        expected = clock(stage.seconds * plan.pace(self.actual))
        self._print(f"[{number}/{len(self.todo)}] {stage.title}, about {expected}; {self._overall(None)}")

    def line(self, line: str) -> None:
        left = seconds_left(line)
        if left is None and not DONE.search(line):
            self._print(f"    {line}")
        else:
            self._print(f"    {line}  |  {self._overall(left)}", overwrite=True)

    def end(self, stage: PlannedStage, entry: dict, done: bool) -> None:
        self.rows[stage.key] = ("done" if done else "stopped", entry)
        if done:
            self.actual.append((stage.seconds, time.monotonic() - self.stage_began))
        self.current = None
        if self.overwriting:
            self._print("")

    def table(self) -> None:
        table = rich.table.Table("stage", "", box=None, pad_edge=False)
        table.add_column("time", justify="right")
        table.add_column("peak memory", justify="right")
        peak = total = 0.0
        for stage in self.todo:
            state, entry = self.rows[stage.key]
            total += entry.get("seconds", 0.0)
            peak = max(peak, entry.get("peak_bytes", 0))
            table.add_row(stage.title, state, clock(entry.get("seconds", 0.0)), _gigabytes(entry.get("peak_bytes", 0)))
        table.add_row("all stages", "", clock(total), _gigabytes(peak), style="bold")
        rich.console.Console(file=sys.stderr).print(table)

    def _overall(self, stage_left: float | None) -> str:
        pace = plan.pace(self.actual)
        now = time.monotonic()
        left = 0.0
        for stage in self.todo:
            if stage is self.current:
                estimated = max(stage.seconds * pace - (now - self.stage_began), 0.0)
                exact = stage_left is not None and stage.exact
                left += stage_left if exact else max(estimated, stage_left or 0.0)
            elif stage.key not in self.rows:
                left += stage.seconds * pace
        return f"run: {clock(now - self.began)} gone, about {clock(left)} left"

    def _print(self, text: str, overwrite: bool = False) -> None:
        if not self.terminal:
            sys.stderr.write(text + "\n" if text else "")
        else:
            columns = shutil.get_terminal_size().columns
            start = "\r\x1b[K" if self.overwriting and overwrite else "\n" if self.overwriting and text else ""
            sys.stderr.write(start + (text[: columns - 1] if overwrite else text) + ("" if overwrite else "\n"))
            self.overwriting = overwrite
        sys.stderr.flush()


def _gigabytes(count: float) -> str:
    return f"{count / 1e9:.1f} GB"
