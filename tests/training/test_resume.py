"""A run that is killed or damaged ends with the same bits; another config gets a one-line error with the fix."""

import errno
import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from stepdr_jax import files
from stepdr_jax.errors import UserError
from stepdr_jax.runtime import checkpoint
from stepdr_jax.training import loop, state
from tests.training import tiny
from tests.training.stage_files import checkpoints, rows

SCRIPT = Path(tiny.__file__)


def train(run_dir, **overrides):
    return loop.train(tiny.tiny_config(run_dir, **overrides), "midtrain1", loader=tiny.Memory(), vocab_size=tiny.VOCAB)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """An uninterrupted run."""
    run_dir = tmp_path_factory.mktemp("whole")
    return run_dir, train(run_dir)


def cut_back(source, target, step):
    """A run directory as a kill just after `step` would leave it, with log rows of steps that never were saved."""
    shutil.copytree(source, target)
    (target / "seed0" / "midtrain1" / "done.json").unlink()
    for other in checkpoint.saved_steps(checkpoints(target)):
        if other > step:
            shutil.rmtree(checkpoints(target) / f"{other:08d}")
    return target


def test_a_process_killed_at_any_moment_continues_to_the_same_bits(tmp_path, whole):
    """SIGKILL once a checkpoint is being written and once in mid-interval; then the same command to the end."""
    command = [sys.executable, str(SCRIPT), str(tmp_path), "midtrain1"]
    environment = os.environ | {"JAX_PLATFORMS": "cpu"}
    for kill_when in (
        lambda: any(checkpoints(tmp_path).glob(".writing-*")) or checkpoint.saved_steps(checkpoints(tmp_path)),
        lambda: len(files.read_jsonl(tmp_path / "seed0" / "midtrain1" / "metrics.jsonl")) >= 3,
    ):
        process = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        while process.poll() is None:
            try:
                if kill_when():
                    process.send_signal(signal.SIGKILL)
            except UserError:  # no metrics yet
                pass
            try:
                process.wait(0.005)
            except subprocess.TimeoutExpired:
                continue
    finished = train(tmp_path)
    assert finished["params_sha256"] == whole[1]["params_sha256"]
    assert finished["final_loss"] == whole[1]["final_loss"]
    assert rows(tmp_path) == rows(whole[0])


def test_a_finished_stage_returns_at_once(whole):
    run_dir, done = whole
    assert train(run_dir) == done


def test_rows_past_the_restored_step_are_written_once(tmp_path, whole):
    cut = cut_back(whole[0], tmp_path / "cut", 10)
    with open(cut / "seed0" / "midtrain1" / "metrics.jsonl", "a") as out:
        out.write('{"step": 11, "lo')  # a torn row
    assert train(cut)["params_sha256"] == whole[1]["params_sha256"]
    assert rows(cut) == rows(whole[0])


@pytest.mark.parametrize("damage", ["truncate", "flip", "delete", "manifest"])
def test_a_damaged_checkpoint_is_named_and_the_one_before_is_used(tmp_path, whole, capsys, damage):
    run_dir, done = whole
    cut = cut_back(run_dir, tmp_path / "cut", 12)
    latest = checkpoints(cut) / "00000012"
    victim = max((p for p in latest.rglob("*") if p.is_file()), key=lambda p: p.stat().st_size)
    if damage == "manifest":
        victim = latest / "manifest.json"
    content = bytearray(victim.read_bytes())
    if damage == "delete":
        victim.unlink()
    else:
        content[len(content) // 2] ^= 1
        victim.write_bytes(content if damage == "flip" else content[: len(content) // 2])
    restored = checkpoint.restore_checkpoint(checkpoints(cut), {"step": np.zeros((), np.int32)})
    assert restored.step == 10
    assert f"{latest} is damaged" in capsys.readouterr().err
    if damage == "flip":
        assert train(cut)["params_sha256"] == done["params_sha256"]
        assert checkpoint.verify_checkpoint(latest)[0] is None


def test_no_usable_checkpoint_is_an_error_that_names_the_fix(tmp_path, whole):
    cut = cut_back(whole[0], tmp_path / "cut", 12)
    for step in checkpoint.saved_steps(checkpoints(cut)):
        (checkpoints(cut) / f"{step:08d}" / "manifest.json").write_text("{")
    with pytest.raises(UserError, match=r"no usable checkpoint .* delete"):
        train(cut)


def test_only_the_latest_checkpoints_are_kept_and_leftovers_of_a_killed_writer_are_removed(tmp_path):
    tree = {"params": np.ones(3, np.float32)}
    (tmp_path / ".writing-00000001").mkdir()
    for step in (1, 2, 3):
        checkpoint.save_checkpoint(tmp_path, step, tree, {}, keep=2)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["00000002", "00000003"]


def test_a_full_disk_is_an_error_that_names_the_fix_and_leaves_the_checkpoint_before(tmp_path, monkeypatch):
    tree = {"params": np.ones(3, np.float32)}
    checkpoint.save_checkpoint(tmp_path, 1, tree, {}, keep=2)

    def full(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "rename", full)
    with pytest.raises(UserError, match="disk full .* free space"):
        checkpoint.save_checkpoint(tmp_path, 2, tree, {}, keep=2)
    assert checkpoint.restore_checkpoint(tmp_path, tree).step == 1
    assert [p.name for p in tmp_path.iterdir()] == ["00000001"]


def test_another_config_is_refused_with_the_field_that_differs(whole):
    with pytest.raises(UserError, match=r"midtrain1\.learning_rate = 0\.0025, this config has 0\.1; choose another"):
        train(whole[0], **{"midtrain1.learning_rate": 0.1})


def test_fields_that_change_no_number_may_change(whole):
    assert train(whole[0], **{"midtrain1.keep_checkpoints": 1}) == whole[1]


def test_the_next_stage_starts_from_this_one_and_refuses_to_start_without_it(tmp_path, whole):
    config = tiny.tiny_config(tmp_path)
    with pytest.raises(UserError, match="launch.midtrain --stage=midtrain1"):
        loop.train(config, "midtrain2", loader=tiny.Memory(), vocab_size=tiny.VOCAB)
    params = state.load_params(tiny.tiny_config(whole[0]), 0, "midtrain1")
    assert checkpoint.params_sha256(params) == whole[1]["params_sha256"]


def test_parameters_of_an_earlier_step_never_pass_for_the_final_ones(tmp_path, whole):
    shutil.copytree(whole[0], tmp_path / "copy")
    (checkpoints(tmp_path / "copy") / "00000012" / "manifest.json").unlink()
    with pytest.raises(UserError, match=r"last checkpoint .* is damaged, what is left is of step 10; delete"):
        state.load_params(tiny.tiny_config(tmp_path / "copy"), 0, "midtrain1")


def test_a_model_of_another_shape_is_refused(whole):
    config = tiny.tiny_config(whole[0], **{"model.hidden_size": 24})
    with pytest.raises(UserError, match=r"model\.hidden_size = 16, this config has 24"):
        state.load_params(config, 0, "midtrain1")


def test_done_says_what_was_trained(whole):
    run_dir, done = whole
    assert json.loads((run_dir / "seed0" / "midtrain1" / "done.json").read_text()) == done
    assert done["steps"] == 12
    assert done["tokens"] == 12 * 4 * 30  # two of 32 positions are padding
    assert done["final_loss"] == rows(run_dir)[-1]["loss"]
