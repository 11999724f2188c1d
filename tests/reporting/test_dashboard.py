"""The terminal dashboard: what it follows, what it shows, and how it leaves."""

import io
import os
import pty
import select
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from rich.console import Console

from stepdr_jax import files
from stepdr_jax.reporting import dashboard, following, measures
from stepdr_jax.runtime.writers import truncate_rows
from tests.reporting import synthetic_run

ROOT = Path(__file__).resolve().parents[2]


def row(iteration: int, **fields) -> dict:
    return {
        "iteration": iteration,
        "episodes": 8,
        "reward": 0.1 * iteration,
        "kl": None,
        "masked_share": 0.0,
        "masked/infra_failed": 0,
        "sampled_tokens": 50.0,
        "seconds_sampling": 4.0,
        "seconds_training": 1.0,
        **fields,
    }


def ppo(run: Path, seed: int = 0, count: int = 5, **fields) -> Path:
    path = run / f"seed{seed}" / "ppo" / "metrics.jsonl"
    for iteration in range(count):
        files.append_jsonl(path, row(iteration, **fields))
    return path


def watched(run: Path) -> following.FollowedRun:
    out = following.FollowedRun(run)
    out.poll()
    return out


def text(one: following.FollowedRun, width: int = 100, height: int = 60, **settings) -> str:
    out = io.StringIO()
    console = Console(file=out, width=width, height=height, no_color=True)
    console.print(dashboard.render_dashboard(one, console, **settings))
    return out.getvalue()


def test_rows_are_read_as_they_come_and_half_a_line_waits(tmp_path):
    path = ppo(tmp_path)
    one = watched(tmp_path)
    with open(path, "a") as file:
        file.write('{"iteration": 5, "rew')
    assert not one.poll() and one.stages_named("ppo")[0].made == 5
    with open(path, "a") as file:
        file.write('ard": 0.5}\n')
    assert one.poll() and one.stages_named("ppo")[0].last["reward"] == 0.5


def test_a_resumed_run_drops_rows_past_its_checkpoint(tmp_path):
    path = ppo(tmp_path)
    one = watched(tmp_path)
    truncate_rows(path, 1, key="iteration")
    files.append_jsonl(path, row(2, reward=9.0))
    assert one.poll()
    assert one.stages_named("ppo")[0].series("reward") == pytest.approx([0.0, 0.1, 9.0])


def test_an_appended_iteration_that_was_done_before_replaces_the_later_ones(tmp_path):
    path = ppo(tmp_path)
    one = watched(tmp_path)
    files.append_jsonl(path, row(2, reward=7.0))
    one.poll()
    assert one.stages_named("ppo")[0].series("reward") == pytest.approx([0.0, 0.1, 7.0])


def test_lines_that_are_no_rows_are_counted_not_fatal(tmp_path):
    path = ppo(tmp_path)
    with open(path, "a") as file:
        file.write('not json\n[1]\n{"reward": 1}\n')
    assert "3 unreadable lines" in text(watched(tmp_path))


def test_a_file_that_goes_away_keeps_what_was_read(tmp_path):
    path = ppo(tmp_path)
    one = watched(tmp_path)
    path.unlink()
    assert not one.poll() and one.stages_named("ppo")[0].made == 5


def test_a_dead_run_says_so_and_how_long_ago(tmp_path):
    now = ppo(tmp_path).stat().st_mtime
    assert "last row 3s ago" in text(watched(tmp_path), now=now + 3)
    assert "no row for 2h00m and not finished" in text(watched(tmp_path), now=now + 7200)
    assert "last row 0s ago" in text(watched(tmp_path), now=now - 500)  # its clock is ahead of ours
    files.write_json(tmp_path / "seed0" / "ppo" / "done.json", {})
    assert "finished 2h00m ago" in text(watched(tmp_path), now=now + 7200)


def test_time_left_is_what_the_last_iterations_took(tmp_path):
    now = ppo(tmp_path).stat().st_mtime
    assert "iteration 5 of 17  last row 0s ago  1m00s left" in text(watched(tmp_path), totals={"ppo": 17}, now=now)


def test_seeds_stand_side_by_side_as_far_as_there_is_room(tmp_path):
    for seed in range(6):
        ppo(tmp_path, seed)
    shown = text(watched(tmp_path), width=80)
    assert max(map(len, shown.splitlines())) <= 80
    assert "no room for seed 3, seed 4, seed 5" in shown
    assert "no room" not in text(watched(tmp_path), width=160)


def test_what_is_not_normal_is_marked(tmp_path):
    ppo(tmp_path, masked_share=0.4)
    lines = text(watched(tmp_path)).splitlines()
    assert any(line.startswith("masked ") and "0.4!" in line for line in lines)
    assert not any("!" in line for line in lines if line.startswith("reward"))


def test_a_low_terminal_keeps_what_tells_most(tmp_path):
    synthetic_run.write_corpus(tmp_path)
    synthetic_run.write_ppo(tmp_path, 0, synthetic_run.make_tasks(8), iterations=3)
    low = text(watched(tmp_path), height=12)
    assert len(low.splitlines()) <= 12 and "reward" in low and "s training" not in low
    assert "s training" in text(watched(tmp_path), height=12, whole=True)


def test_unknown_metrics_are_shown_and_missing_ones_are_not(tmp_path):
    ppo(tmp_path, **{"new/thing": 3.5, "staleness/max": 1.0, "note": "words"})
    shown = text(watched(tmp_path), whole=True)
    assert "new/thing" in shown and "staleness max" in shown and "note" not in shown
    assert "explained variance" not in shown
    assert [title for *_, title, _ in measures.arrange_metrics("ppo", ["later", "reward"])] == ["reward", "later"]


def test_training_shows_speed_guards_and_the_latest_stage(tmp_path):
    synthetic_run.write_training(tmp_path, 0)
    one = watched(tmp_path)
    first = text(one, stage="midtrain1", whole=True)
    assert "rollback (step 120, to 100, reason 5 steps skipped)" in first
    for name in ("tokens/s", "goodput", "MFU", "skipped, spikes", "source, quoting"):
        assert name in first
    assert one.latest() == "sft"  # all are done: the last of the recipe
    (tmp_path / "seed0" / "midtrain2" / "done.json").unlink()
    one.poll()
    assert one.latest() == "midtrain2"


def test_sparklines():
    nan = float("nan")
    assert dashboard.sparkline([0, 1, 2, 3], 4) == "▁▃▆█"
    assert dashboard.sparkline([0, 0, 2, 2], 2) == "▁█"
    assert dashboard.sparkline([1.0, nan, 1.0], 3) == "▁ ▁"
    assert dashboard.sparkline([nan, nan, nan, 1.0, nan, 2.0, nan], 7) == "▁█"  # measured now and then
    assert dashboard.sparkline([], 5) == "" and dashboard.sparkline([nan], 5) == ""
    assert dashboard.sparkline([0, 1], 2, dashboard.PLAIN) == "_@"


def watch(*flags: str, **settings) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "launch.watch", *flags]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False, **settings)


def test_one_frame_into_a_pipe_is_plain_text(tmp_path):
    ppo(tmp_path)
    done = watch(f"--run_dir={tmp_path}", "--once", env=os.environ | {"PYTHONIOENCODING": "ascii", "COLUMNS": "80"})
    assert done.returncode == 0 and done.stderr == ""
    assert "\x1b" not in done.stdout and done.stdout.isascii()
    assert "sampled tokens/s" in done.stdout and "100" in done.stdout  # 50 tokens of 8 episodes in 4 s
    nowhere = watch(f"--run_dir={tmp_path / 'nowhere'}", "--once")
    assert nowhere.returncode == 2 and nowhere.stderr.count("\n") == 1


def test_live_it_follows_and_leaves_cleanly(tmp_path):
    path = ppo(tmp_path)
    ours, theirs = pty.openpty()
    command = [sys.executable, "-m", "launch.watch", f"--run_dir={tmp_path}", "--seconds=0.1"]
    running = subprocess.Popen(
        command,
        cwd=ROOT,
        stdin=theirs,
        stdout=theirs,
        stderr=theirs,
        env=os.environ | {"TERM": "xterm"},
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # a test run in the background ignores it
    )
    os.close(theirs)

    def until(wanted: bytes, seconds: float = 20.0) -> bytes:
        seen, end = b"", time.monotonic() + seconds
        while wanted not in seen and time.monotonic() < end:
            if select.select([ours], [], [], 0.2)[0]:
                seen += os.read(ours, 65536)
        assert wanted in seen
        return seen

    try:
        until(b"iteration 5")
        files.append_jsonl(path, row(5))
        until(b"iteration 6")
        running.send_signal(signal.SIGINT)
        last = until(b"\x1b[?1049l")  # the screen is given back
        assert running.wait(20) == 0 and b"Traceback" not in last
    finally:
        running.kill()
        running.wait()
        os.close(ours)
