"""Checkpoints in a bucket: what holds of a folder holds there, and a store that fails is waited for or is one line."""

import json
import os
import subprocess
import sys
import threading

import numpy as np
import pytest

from stepdr_jax import files
from stepdr_jax.errors import UserError
from stepdr_jax.runtime import buckets, checkpoint, chunks, saving, storage
from stepdr_jax.runtime.layout import RunLayout
from stepdr_jax.training import loop, state
from tests.training import kills, stores, tiny
from tests.training.tree import TREE
from tests.training.waiting import wait_for


@pytest.fixture(scope="module", params=["s3", "gs"])
def store(request):
    with stores.store(request.param) as opened:
        yield opened


@pytest.fixture
def s3():
    with stores.store("s3") as opened:
        yield opened


def test_names_of_buckets():
    path = storage.location("s3://bucket//a/b/")
    assert str(path) == "s3://bucket/a/b" and str(path / "c") == "s3://bucket/a/b/c" and path.name == "b"
    assert str(storage.location("gs://bucket")) == "gs://bucket" and storage.location(path) is path
    for wrong in ("s3:/bucket/a", "gs://", "s3:///a"):
        with pytest.raises(UserError, match="expected a folder, gs://BUCKET/PATH or s3://BUCKET/PATH, got"):
            storage.location(wrong)


@pytest.mark.parametrize("shape", [(), (7,), (64, 48), (151643, 64), (3, 5, 7, 11)])
def test_pieces_divide_what_they_are_of(shape, monkeypatch):
    monkeypatch.setattr(chunks, "MAX_CHUNK_BYTES", 4096)
    piece = chunks._chunk_shape(shape, 4)
    assert all(size % part == 0 for size, part in zip(shape, piece, strict=True))
    assert int(np.prod(piece)) * 4 <= 4096


def test_damage_is_named_and_the_checkpoint_before_is_used(store, monkeypatch):
    monkeypatch.setattr(chunks, "MAX_CHUNK_BYTES", 8000)  # the larger array is three pieces
    where = f"{store.url}/damage"
    for step in range(1, 4):
        tree = TREE | {"step": np.full((), step, np.int32)}
        latest = checkpoint.save_checkpoint(where, step, tree, {"noted": step}, keep=2)
    assert checkpoint.saved_steps(where) == [2, 3]
    restored = checkpoint.restore_checkpoint(where, TREE)
    assert (restored.step, restored.metadata, int(restored.tree["step"])) == (3, {"noted": 3}, 3)
    np.testing.assert_array_equal(restored.tree["params"]["a"], TREE["params"]["a"])
    names = latest.names()
    listed = json.loads((latest / "manifest.json").read_text())["files"]
    assert set(names) == listed.keys() | {"manifest.json"} and "arrays/params.a/c/2" in names
    for name in names:
        whole = (latest / name).read_bytes()
        flipped = bytearray(whole)
        flipped[len(whole) // 2] ^= 1
        for damaged in (bytes(flipped), whole[:-1], None):
            (latest / name).remove() if damaged is None else (latest / name).write_bytes(damaged)
            lines = []
            assert checkpoint.restore_checkpoint(where, TREE, report=lines.append).step == 2
            assert name == "manifest.json" or name in lines[0]  # a manifest may name what it no longer agrees with
            (latest / name).write_bytes(whole)
    assert checkpoint.restore_checkpoint(where, TREE).step == 3
    checkpoint.remove_after(where, 2)
    assert checkpoint.saved_steps(where) == [2]
    with pytest.raises(UserError, match=r"expected an array of shape \(4,\), the checkpoint has \(\)"):
        checkpoint.restore_checkpoint(where, {"step": np.zeros(4, np.int32)})
    with pytest.raises(UserError, match="absent: could not be read"):
        checkpoint.restore_checkpoint(where, {"absent": np.zeros(4, np.int32)})


def test_what_a_killed_writer_left_is_no_checkpoint_and_goes(store, monkeypatch):
    where = storage.location(f"{store.url}/killed")
    checkpoint.save_checkpoint(where, 1, TREE, {}, keep=2)
    with monkeypatch.context() as context, pytest.raises(KeyboardInterrupt):
        context.setattr(saving.Saver, "_prune", None)
        context.setattr(storage, "write_json", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        checkpoint.save_checkpoint(where, 2, TREE, {}, keep=2)
    assert storage.numbered_entries(where) == [1, 2] and checkpoint.saved_steps(where) == [1]
    checkpoint.save_checkpoint(where, 3, TREE, {}, keep=2)
    assert storage.numbered_entries(where) == [1, 3] == checkpoint.saved_steps(where)


def test_a_copy_in_a_folder_is_read(store, tmp_path):
    where = storage.location(f"{store.url}/copied")
    checkpoint.save_checkpoint(where, 1, TREE, {}, keep=1)
    for name in where.names():
        files.write_atomic(tmp_path / name, (where / name).read_bytes())
    np.testing.assert_array_equal(
        checkpoint.restore_checkpoint(tmp_path, TREE).tree["params"]["b"], TREE["params"]["b"]
    )


def test_it_restores_on_another_mesh_and_on_fewer_devices(store):
    command = [sys.executable, "-m", "tests.training.another_mesh", f"{store.url}/mesh"]
    environment = os.environ | {"JAX_PLATFORMS": "cpu"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    assert len(done.stdout.splitlines()) == 4


def test_a_stage_is_the_same_in_a_bucket_and_its_readers_find_it(store, tmp_path):
    field = {"checkpointing.directory": f"{store.url}/stage", "eval.every_tokens": 600, "eval.inline": False}
    done = {}
    for name, fields in {"bucket": field, "folder": {}}.items():
        config = tiny.tiny_config(tmp_path / name, **fields)
        done[name] = loop.train(config, "midtrain1", loader=tiny.Memory(), vocab_size=tiny.VOCAB)
    assert done["bucket"]["params_sha256"] == done["folder"]["params_sha256"]
    home = tmp_path / "bucket" / "seed0" / "midtrain1"
    assert not (home / "checkpoints").exists() and not (home / "eval_checkpoints").exists()
    without = tiny.tiny_config(tmp_path / "bucket")
    layout = RunLayout.from_config(without).stage("midtrain1").for_reading()
    assert checkpoint.saved_steps(layout.checkpoint_dir) == [10, 12] and layout.eval_steps()
    params = state.load_params(without, 0, "midtrain1")
    assert checkpoint.params_sha256(params) == done["bucket"]["params_sha256"]
    state.load_params(without, 0, f"midtrain1@{layout.eval_steps()[0]}")
    (home / "done.json").unlink()
    with pytest.raises(UserError, match=r"there are none in .*give --config.checkpointing.directory='.*/stage'"):
        loop.train(without, "midtrain1", loader=tiny.Memory(), vocab_size=tiny.VOCAB)


def test_a_store_that_is_gone_is_one_line_and_one_that_comes_back_is_waited_for(s3, monkeypatch, capfd):
    where = f"{s3.url}/lost"
    monkeypatch.setattr(
        buckets, "TENSORSTORE_RETRIES", {"max_retries": 1, "initial_delay": "10ms", "max_delay": "10ms"}
    )
    checkpoint.save_checkpoint(where, 1, TREE, {}, keep=2)
    with pytest.raises(UserError, match="the store refuses .*check the bucket's name"):
        checkpoint.save_checkpoint("s3://absent/x", 1, TREE, {}, keep=1)
    s3.stop()
    monkeypatch.setattr(buckets, "RETRY_SECONDS", 0.1)
    for work in (
        lambda: checkpoint.save_checkpoint(where, 2, TREE, {}, keep=2),
        lambda: checkpoint.restore_checkpoint(where, TREE),
    ):
        with pytest.raises(UserError, match=r"the store has failed for 0 seconds .*run the same command"):
            work()
    monkeypatch.setattr(buckets, "RETRY_SECONDS", 60.0)
    timer = threading.Timer(2.0, s3.start)  # empty: this one forgets
    timer.start()
    checkpoint.save_checkpoint(where, 3, TREE, {}, keep=2)
    timer.join()
    assert "trying again" in capfd.readouterr().err and checkpoint.restore_checkpoint(where, TREE).step == 3


def test_a_store_that_turns_requests_away_is_asked_again(monkeypatch):
    monkeypatch.setattr(
        buckets, "TENSORSTORE_RETRIES", {"max_retries": 9, "initial_delay": "10ms", "max_delay": "50ms"}
    )
    with stores.store("throttled s3") as throttled:
        where = f"{throttled.url}/busy"
        for step in (1, 2):
            checkpoint.save_checkpoint(where, step, TREE, {}, keep=2)
        assert checkpoint.saved_steps(where) == [1, 2]
        restored = checkpoint.restore_checkpoint(where, TREE)
        assert restored.step == 2
        np.testing.assert_array_equal(restored.tree["params"]["a"], TREE["params"]["a"])


@pytest.mark.slow
def test_two_processes_that_are_killed_while_they_save_to_a_bucket_continue_with_the_same_bits(s3, tmp_path):
    field = {"checkpointing.directory": s3.url}
    fields = kills.TINY | {"midtrain1.steps": 40}
    whole, job = kills.Job(tmp_path / "whole", fields), kills.Job(tmp_path / "killed", fields | field)
    for made in (whole, job):
        made.run_dir.mkdir()
    where = f"{s3.url}/seed0/midtrain1/checkpoints"
    expected = whole.finish(1)
    try:
        for wanted in (10, 20):
            started = job.start(2)
            wait_for(started, lambda wanted=wanted: wanted in storage.numbered_entries(storage.location(where)))
            kills.kill(started, 0.0)  # its objects have begun to appear
        assert job.finish(2)["params_sha256"] == expected["params_sha256"]
    finally:
        kills.kill(job.started, 0.0)
    assert job.rows() == whole.rows() and checkpoint.saved_steps(where) == [30, 40]
