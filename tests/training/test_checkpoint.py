"""A damaged checkpoint is not used; saving does not disturb training; the right checkpoints are kept."""

import json
import os
import subprocess
import sys
import threading
import time

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
import pytest

from stepdr_jax.errors import UserError
from stepdr_jax.runtime import checkpoint, saving
from stepdr_jax.runtime.watchdog import Watchdog
from tests.training import tiny
from tests.training.tree import TREE


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def test_damage_to_any_one_file_is_named_and_the_checkpoint_before_is_used(tmp_path):
    checkpoint.save_checkpoint(tmp_path, 1, TREE, {}, keep=2)
    latest = checkpoint.save_checkpoint(tmp_path, 2, TREE, {}, keep=2)
    everything = sorted(path for path in latest.rglob("*") if path.is_file())
    listed = json.loads((latest / "manifest.json").read_text())["files"]
    assert {str(path.relative_to(latest)) for path in everything} == listed.keys() | {"manifest.json"}
    assert any("ocdbt" in name for name in listed) and len(everything) > 5
    for path in everything:
        whole = path.read_bytes()
        flipped = bytearray(whole)
        flipped[len(whole) // 2] ^= 1
        for damaged in (bytes(flipped), whole[:-1], whole + b"x", None):
            path.unlink() if damaged is None else path.write_bytes(damaged)
            lines = []
            restored = checkpoint.restore_checkpoint(tmp_path, TREE, report=lines.append)
            if path.name == "manifest.json" and damaged == whole[:-1]:  # a newline less is no damage
                assert whole.endswith(b"\n") and restored.step == 2
            else:
                assert restored.step == 1, path
                assert f"{latest} is damaged: " in lines[0]
                assert path.name in lines[0] or path.name == "manifest.json"
            path.write_bytes(whole)
    assert checkpoint.restore_checkpoint(tmp_path, TREE).step == 2


def test_one_step_can_be_asked_for(tmp_path):
    for step in (1, 2):
        checkpoint.save_checkpoint(tmp_path, step, TREE | {"step": np.full((), step, np.int32)}, {}, keep=2)
    assert checkpoint.restore_checkpoint(tmp_path, TREE, step=1).tree["step"] == 1
    with pytest.raises(UserError, match=r"no checkpoint of step 3; it has \[1, 2\]"):
        checkpoint.restore_checkpoint(tmp_path, TREE, step=3)


def test_training_goes_on_while_a_checkpoint_is_written(tmp_path, monkeypatch):
    """The bytes are those of the moment of the call, though the step that follows reuses their memory."""
    may_go_on = threading.Event()
    really = saving.Saver._own_files
    monkeypatch.setattr(saving.Saver, "_own_files", lambda *a: may_go_on.wait(30) and really(*a))
    bump = jax.jit(lambda tree: jax.tree.map(lambda a: a + 1, tree), donate_argnums=0)
    now = {"a": jnp.zeros((200, 1000))}
    with checkpoint.Saver(tmp_path) as saver:
        saver.save(1, now, {}, keep=2)
        for _ in range(50):
            now = bump(now)
        assert checkpoint.saved_steps(tmp_path) == []  # not whole, so not there
        may_go_on.set()
        saver.wait()
        assert checkpoint.saved_steps(tmp_path) == [1]
    assert not np.any(checkpoint.restore_checkpoint(tmp_path, {"a": np.zeros((200, 1000), np.float32)}).tree["a"])
    assert float(now["a"][0, 0]) == 50


def test_what_goes_wrong_in_the_background_is_raised_by_the_next_call(tmp_path):
    with checkpoint.Saver(tmp_path / "there") as saver:
        saver.save(1, TREE, {}, keep=1)
        saver.wait()
        saver._own_files = lambda target: (_ for _ in ()).throw(OSError(5, "Input/output error"))
        saver.save(2, TREE, {}, keep=1)
        with pytest.raises(UserError, match=r"storage .* failed .*Input/output error.*run the same command"):
            saver.wait()
    assert names(tmp_path / "there") == ["00000001"]


def test_what_is_kept(tmp_path):
    with checkpoint.Saver(tmp_path, background=False) as saver:
        for step in range(1, 8):
            saver.save(step, TREE, {}, keep=2, keep_every=3, spare=(1,), emergency=step == 5)
            if step == 5:
                assert checkpoint.saved_steps(tmp_path) == [1, 3, 4, 5]  # an emergency takes nobody's place
    assert checkpoint.saved_steps(tmp_path) == [1, 3, 6, 7]


def test_a_disk_that_is_really_full_leaves_the_checkpoint_before(tmp_path):
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=600k", "tmpfs", tmp_path], check=False, capture_output=True
    )
    if mounted.returncode:
        pytest.skip("mounting a small disk needs root")
    try:
        rng = np.random.default_rng(0)
        small, large = ({"params": rng.random(size).astype(np.float32)} for size in (10_000, 1_000_000))
        checkpoint.save_checkpoint(tmp_path, 1, small, {}, keep=2)
        with pytest.raises(UserError, match="disk full .* free space"):
            checkpoint.save_checkpoint(tmp_path, 2, large, {}, keep=2)
        assert names(tmp_path) == ["00000001"]
        assert checkpoint.restore_checkpoint(tmp_path, small).step == 1
    finally:
        subprocess.run(["umount", "-l", tmp_path], check=True)


def test_storage_that_goes_away_is_one_line(tmp_path):
    with checkpoint.Saver(tmp_path / "net" / "checkpoints", background=False) as saver:
        saver.save(1, TREE, {}, keep=2)
        (tmp_path / "net").rename(tmp_path / "gone")
        (tmp_path / "net").write_text("")
        with pytest.raises(UserError, match="storage of checkpoint .* failed .* run the same command"):
            saver.save(2, TREE, {}, keep=2)
    assert checkpoint.saved_steps(tmp_path / "gone" / "checkpoints") == [1]


@pytest.mark.parametrize("jump", [-7200.0, 7200.0])
def test_a_clock_that_jumps_changes_nothing_but_what_it_measures(tmp_path, monkeypatch, jump):
    from stepdr_jax.training import loop

    really, calls = time.time, []

    def clock():
        calls.append(1)
        return really() + (jump if len(calls) > 20 else 0.0)

    monkeypatch.setattr(time, "time", clock)
    done = loop.train(tiny.tiny_config(tmp_path), "midtrain1", loader=tiny.Memory(), vocab_size=tiny.VOCAB)
    assert done["steps"] == 12 and 0 < done["seconds"] < 600
    home = tmp_path / "seed0" / "midtrain1"
    rows = [json.loads(line) for line in (home / "metrics.jsonl").read_text().splitlines()]
    assert all(row["eta_seconds"] is None or 0 <= row["eta_seconds"] < 600 for row in rows)
    assert not (home / "hangs").exists()


def test_a_step_that_hangs_is_shown_with_its_stack(tmp_path, capfd):
    settings = ml_collections.ConfigDict(dict(factor=2.0, floor_seconds=0.2, first_seconds=9.0, exit=False))
    hangs = []

    def hanging_write():
        while not hangs:
            time.sleep(0.01)

    with Watchdog(tmp_path, settings, hangs.append) as watchdog:
        for _ in range(3):
            watchdog.record_step(0.01)
        with watchdog.paused():
            time.sleep(0.5)
        assert not hangs
        hanging_write()
    [path] = tmp_path.iterdir()
    for text in (path.read_text(), capfd.readouterr().err):
        assert "no step for" in text and "in hanging_write" in text


def test_a_checkpoint_restores_on_another_mesh_and_on_fewer_devices():
    """Values, placement and digest."""
    command = [sys.executable, "-m", "tests.training.another_mesh"]
    environment = os.environ | {"JAX_PLATFORMS": "cpu"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    assert len(done.stdout.splitlines()) == 4
