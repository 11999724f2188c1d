"""A run of small scripts: what is skipped, what is repeated, and what a person is told."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from configs import miniature
from stepdr_jax.errors import UserError
from stepdr_jax.orchestration import plan, process, quickstart

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = """
import sys, pathlib
name, path = sys.argv[-2], pathlib.Path(sys.argv[-1])
with open(path / "calls", "a") as calls:
    print(name, *sys.argv[1:-2], file=calls)
behaviour = (path / f"{name}.behaviour").read_text() if (path / f"{name}.behaviour").exists() else ""
exec(behaviour)
(path / f"{name}.out").write_text("done")
print("world  5/10 steps  loss 1.2  3s gone, 1m05s left", file=sys.stderr)
"""


@pytest.fixture
def small_run(tmp_path, monkeypatch):
    """A plan of three scripts a, b, report in tmp_path/run; returns (config, home of their behaviour)."""
    home, modules = tmp_path / "home", tmp_path / "modules"
    home.mkdir()
    modules.mkdir()
    (modules / "small_stage.py").write_text(SCRIPT)
    monkeypatch.setenv("PYTHONPATH", f"{modules}{os.pathsep}{ROOT}")
    config = miniature.get_config().unlock()
    config.run_dir = str(home)

    def small_plan(config, reference, seeds=1):
        return [
            plan.PlannedStage(name, name, "small_stage", (name, str(home)), f"{name}.out", 5.0)
            for name in ("a", "b", "report")
        ]

    monkeypatch.setattr(plan, "plan", small_plan)
    monkeypatch.setattr(quickstart, "ENTRIES", re.compile(r".*"))
    return config.lock(), home


def calls(home):
    return [line.split()[0] for line in (home / "calls").read_text().splitlines()]


def start(config, **kwargs):
    return quickstart.run_stages(config, config, ["--config.seed=0"], **kwargs)


def test_stages_run_in_order_and_a_second_run_does_nothing(small_run, capsys):
    config, home = small_run
    assert start(config) == home / "report.out"
    assert calls(home) == ["a", "b", "report"]
    assert json.loads((home / "config.json").read_text())["run_dir"] == str(home)
    assert (home / "calls").read_text().splitlines()[0] == "a --config.seed=0"
    shown = capsys.readouterr().err
    assert "[1/3] a, about 5s; run: 0s gone, about 1" in shown
    assert "loss 1.2  3s gone, 1m05s left  |  run:" in shown and "all stages" in shown
    assert "loss 1.2" in (home / "logs" / "a.log").read_text()
    start(config)
    assert calls(home) == ["a", "b", "report"]
    assert "already done" in capsys.readouterr().err


def test_a_stage_that_stops_ends_the_run_with_its_own_line_and_the_same_command_goes_on_there(small_run):
    config, home = small_run
    (home / "b.behaviour").write_text("print('error: port 80 is in use; choose another', file=sys.stderr); sys.exit(2)")
    with pytest.raises(UserError, match="b stopped: port 80 is in use; choose another .log: .*b.log"):
        start(config)
    (home / "b.behaviour").unlink()
    start(config)
    assert calls(home) == ["a", "b", "b", "report"]
    assert json.loads((home / "stages.json").read_text())["b"]["finished_at"]


def test_a_killed_stage_is_named_and_a_stage_that_writes_nothing_is_not_taken_for_done(small_run):
    config, home = small_run
    (home / "a.behaviour").write_text("import os; os.kill(os.getpid(), 9)")
    with pytest.raises(UserError, match="a killed .signal 9.; if nobody did it, the machine ran out of memory"):
        start(config)
    (home / "a.behaviour").write_text("sys.exit(0)")
    with pytest.raises(UserError, match="a ended without writing"):
        start(config)


def test_a_missing_output_or_another_config_runs_the_stage_again_and_the_report_after_it(small_run):
    config, home = small_run
    start(config)
    (home / "a.out").unlink()
    start(config)
    assert calls(home) == ["a", "b", "report", "a", "report"]
    other = config.copy_and_resolve_references().unlock()
    other.ppo.clip = 0.3
    start(other.lock())
    assert calls(home)[5:] == ["a", "b", "report"]


def test_a_damaged_ledger_is_ignored(small_run):
    config, home = small_run
    (home / "stages.json").write_text("{")
    start(config)
    assert calls(home) == ["a", "b", "report"]


def test_two_runs_in_one_folder_are_refused_with_the_holders_number(small_run):
    config, home = small_run
    with process.exclusive(home), pytest.raises(UserError, match=f"process {os.getpid()}. is working in"):
        start(config)
    start(config)


def test_an_unwritable_folder_and_a_full_disk_are_named(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot be written"), process.exclusive(tmp_path / "file" / "run"):
        pass
    with pytest.raises(UserError, match="GB free, the run needs 1000000"):
        process.check_space(tmp_path, 10**15)


def test_fresh_deletes_a_run_and_refuses_a_folder_with_other_things(small_run, monkeypatch):
    config, home = small_run
    start(config)
    monkeypatch.undo()
    with pytest.raises(UserError, match="also holds a.out, b.out, calls"):
        quickstart._empty(home)
    for name in ("a.out", "b.out", "report.out", "calls"):
        (home / name).unlink()
    (home / "seed0").mkdir()
    quickstart._empty(home)
    assert [path.name for path in home.iterdir()] == [".lock"]


@pytest.mark.parametrize(
    ("line", "seconds"),
    [
        ("sft  1/2 steps  loss 1  12s gone, 5s left", 5),
        ("x, 3m04s left", 184),
        ("x, 1h02m left", 3720),
        ("x, ? left", None),
        ("sft  1/20 steps  28s gone, 8m53s left", None),
        ("nothing is left", None),
    ],
)
def test_time_left_is_read_from_progress_lines(line, seconds):
    assert quickstart.seconds_left(line) == seconds


def test_the_plan_makes_data_once_and_trains_every_seed():
    config = miniature.get_config()
    keys = [stage.key for stage in plan.plan(config, config, seeds=2)]
    assert keys[:3] == ["offline_web", "synthesize", "build_data"] and keys[-1] == "report"
    assert keys[3:8] == [f"seed0.{name}" for name in ("midtrain1", "midtrain2", "sft", "ppo", "evaluate")]
    assert len(keys) == 14


def test_estimates_follow_the_amount_of_work_and_the_pace_of_the_machine():
    config = miniature.get_config()
    more = miniature.get_config().unlock()
    more.sft.steps *= 2
    seconds = {stage.key: stage.seconds for stage in plan.plan(config, config)}
    assert {stage.key: stage.seconds for stage in plan.plan(more, config)}["seed0.sft"] == 2 * seconds["seed0.sft"]
    assert plan.pace([]) == 1.0 and plan.pace([(90.0, 190.0)]) == 2.0


def test_a_killed_parent_takes_the_stage_with_it(tmp_path):
    child = (
        "import os, sys, time; from launch import entry; entry._die_with_parent(); "
        "print(os.getpid(), flush=True); time.sleep(60)"
    )
    parent = (
        "import os, subprocess, sys; os.environ['STEPDR_DIE_WITH_PARENT'] = str(os.getpid());"
        f"subprocess.run([sys.executable, '-c', {child!r}])"
    )
    with subprocess.Popen([sys.executable, "-c", parent], stdout=subprocess.PIPE, text=True, cwd=ROOT) as process_:
        pid = int(process_.stdout.readline())
        process_.send_signal(signal.SIGKILL)
        process_.stdout.read()  # ends when the last holder of the pipe, the child, is gone
    deadline = time.monotonic() + 10
    while os.path.exists(f"/proc/{pid}") and time.monotonic() < deadline:
        if "Z" in Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1][:3]:
            break
    assert time.monotonic() < deadline


def test_every_stage_is_a_script_that_has_its_flags():
    config = miniature.get_config()
    for stage in plan.plan(config, config):
        source = (ROOT / (stage.module.replace(".", "/") + ".py")).read_text()
        for argument in stage.arguments:
            name = argument.removeprefix("--").partition("=")[0]
            assert name.startswith("config.") or re.search(rf'DEFINE_\w+\(\s*"{name}"', source), (stage.module, name)
