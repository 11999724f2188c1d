"""Conversion: a Hugging Face folder becomes a checkpoint to train from, and any checkpoint becomes such a folder."""

import json
import subprocess
import sys

import jax
import numpy as np
import pytest

from launch import convert, entry
from stepdr_jax.errors import UserError
from stepdr_jax.models import hf, qwen2
from stepdr_jax.runtime import checkpoint


def model(**overrides) -> qwen2.Qwen2Config:
    return qwen2.Qwen2Config(
        **dict(
            vocab_size=32,
            hidden_size=16,
            num_layers=2,
            num_heads=4,
            num_kv_heads=2,
            head_dim=4,
            intermediate_size=24,
            rope_theta=1e6,
            rms_norm_eps=1e-6,
            tie_embeddings=True,
            dtype="bfloat16",
            param_dtype="bfloat16",
        )
        | overrides
    )


@pytest.fixture
def folder(tmp_path):
    """A Hugging Face folder with a tokenizer."""
    config = model()
    hf.save(config, qwen2.init_params(config, jax.random.key(0)), tmp_path / "hf")
    (tmp_path / "hf" / "tokenizer.json").write_text('{"a": 1}')
    return tmp_path / "hf"


def run(*flags: str) -> None:
    convert.main(entry.parse(["convert", *flags]))


def assert_equal(actual, expected):
    jax.tree.map(np.testing.assert_array_equal, actual, expected)


def test_there_and_back_is_the_same_model(folder, tmp_path, capsys):
    run(f"--hf={folder}", f"--out={tmp_path / 'start'}")
    run(f"--checkpoint={tmp_path / 'start'}", f"--hf_out={tmp_path / 'back'}", "--dtype=bfloat16")
    config, params = hf.load(folder)
    back_config, back = hf.load(tmp_path / "back")
    assert back_config == config
    assert_equal(back, params)
    assert (tmp_path / "back" / "tokenizer.json").read_text() == '{"a": 1}'
    shown = capsys.readouterr().err
    for line in ("reading  17/17 kB", "writing  8/8 kB"):
        assert shown.count(line) == 1, shown


def test_a_converted_checkpoint_restores_as_a_stage_of_training_does(folder, tmp_path):
    run(f"--hf={folder}", f"--out={tmp_path / 'start'}")
    expected = qwen2.param_shapes(model(param_dtype="float32"))
    restored = checkpoint.restore_checkpoint(tmp_path / "start", {"params": expected})
    assert restored.step == 0
    assert qwen2.Qwen2Config(**restored.metadata["model"]) == model(param_dtype="float32")
    assert_equal(restored.tree["params"], jax.tree.map(lambda leaf: leaf.astype(np.float32), hf.load(folder)[1]))


def test_the_latest_checkpoint_of_a_trained_stage_is_exported_without_its_optimizer(tmp_path):
    config = model(param_dtype="float32", dtype="float32")
    stage = tmp_path / "run" / "seed0" / "sft"
    metadata = {"stage": "sft", "model": {**vars(config)}}
    for step in (10, 20):
        params = qwen2.init_params(config, jax.random.key(step))
        state = {"step": np.int32(step), "params": params, "optimizer": {"mu": params}, "window": {"loss": np.zeros(2)}}
        checkpoint.save_checkpoint(stage / "checkpoints", step, state, metadata, keep=2)
    (tmp_path / "run" / "tokenizer").mkdir()
    (tmp_path / "run" / "tokenizer" / "tokenizer.json").write_text("{}")
    run(f"--checkpoint={stage}", f"--hf_out={tmp_path / 'out'}", "--max_position_embeddings=4096")
    loaded_config, loaded = hf.load(tmp_path / "out")
    assert loaded_config == config
    assert_equal(loaded, params)
    assert json.loads((tmp_path / "out" / "config.json").read_text())["max_position_embeddings"] == 4096
    assert (tmp_path / "out" / "tokenizer.json").exists()
    run(f"--checkpoint={stage}", f"--hf_out={tmp_path / 'earlier'}", "--step=10")
    assert_equal(hf.load(tmp_path / "earlier")[1], qwen2.init_params(config, jax.random.key(10)))


def test_nothing_that_exists_is_overwritten(folder, tmp_path):
    run(f"--hf={folder}", f"--out={tmp_path / 'start'}")
    with pytest.raises(UserError, match="is there already; give --out another name"):
        run(f"--hf={folder}", f"--out={tmp_path / 'start'}")
    with pytest.raises(UserError, match="is there already; give --hf_out another name"):
        run(f"--checkpoint={tmp_path / 'start'}", f"--hf_out={folder}")


def test_what_an_interrupted_conversion_left_is_not_in_the_way(folder, tmp_path, monkeypatch):
    def interrupted(*arguments, **keywords):
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(checkpoint, "save_checkpoint", interrupted)
        with pytest.raises(KeyboardInterrupt):
            run(f"--hf={folder}", f"--out={tmp_path / 'start'}")
    assert checkpoint.saved_steps(tmp_path / "start") == []
    run(f"--hf={folder}", f"--out={tmp_path / 'start'}")
    assert checkpoint.saved_steps(tmp_path / "start") == [0]


@pytest.mark.parametrize(
    ("flags", "told"),
    [
        ([], "expected --hf=FOLDER --out=FOLDER or --checkpoint=FOLDER --hf_out=FOLDER"),
        (["--hf=a"], "expected --hf=FOLDER --out=FOLDER or"),
        (["--hf=a", "--out=b", "--hf_out=c"], "expected --hf=FOLDER --out=FOLDER or"),
        (["--hf=a", "--out=b", "--dtype=int8"], "expected --dtype to be float32 or bfloat16, got 'int8'"),
        (["--hf=nowhere", "--out=b"], "checkpoint folder nowhere does not exist"),
        (["--checkpoint=nowhere", "--hf_out=b"], "nowhere has no checkpoint; give a stage's folder"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_a_command_that_cannot_work_says_what_to_give(flags, told, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=told):
        run(*flags)
    assert not any(tmp_path.iterdir())


def test_help_shows_both_directions():
    done = subprocess.run(
        [sys.executable, "-m", "launch.convert", "--help"], capture_output=True, text=True, check=True
    )
    assert "--hf=Qwen2.5-0.5B --out=runs/start" in done.stdout
    assert "--checkpoint=runs/mine/seed0/sft --hf_out=exported" in done.stdout
