"""Checkpoint folders: what is wrong with one is told at once, and what is right arrives whole wherever it is placed."""

import json
import socket
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
import safetensors.numpy

from stepdr_jax.errors import UserError
from stepdr_jax.models import hf, qwen2

EIGHT_DEVICES = Path(__file__).with_name("place_on_eight_devices.py")
TWO_PROCESSES = Path(__file__).with_name("load_in_two_processes.py")


def small(**overrides) -> qwen2.Qwen2Config:
    shape = dict(
        vocab_size=32,
        hidden_size=16,
        num_layers=2,
        num_heads=4,
        num_kv_heads=2,
        head_dim=4,
        intermediate_size=24,
        rope_theta=1e6,
        rms_norm_eps=1e-6,
        tie_embeddings=False,
    )
    return qwen2.Qwen2Config(**(shape | overrides))


@pytest.fixture
def saved(tmp_path):
    """(config, params, folder with four weight files and an index)."""
    config = small()
    params = qwen2.init_params(config, jax.random.key(0))
    hf.save(config, params, tmp_path / "model", max_shard_bytes=6000)
    assert len(list((tmp_path / "model").glob("*.safetensors"))) == 4
    return config, params, tmp_path / "model"


def edit_config(folder, **changes):
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def edit_tensors(folder, change):
    """Rewrites one weight file through the reference implementation of the format."""
    path = folder / "model-00002-of-00004.safetensors"
    tensors = safetensors.numpy.load_file(path)
    change(tensors)
    safetensors.numpy.save_file(tensors, path)


def refusal(folder) -> str:
    with pytest.raises(UserError) as error:
        hf.load(folder)
    return str(error.value)


def assert_equal(actual, expected):
    assert jax.tree.structure(actual) == jax.tree.structure(expected)
    for (path, a), b in zip(jax.tree_util.tree_leaves_with_path(actual), jax.tree.leaves(expected), strict=True):
        assert a.dtype == b.dtype
        np.testing.assert_array_equal(a, b, err_msg=jax.tree_util.keystr(path))


# ------------------------------------------------------------------------------------------------------ what is wrong


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        (dict(model_type="llama"), "expected model_type qwen2 .* got 'llama'"),
        (dict(hidden_size=-16), "expected hidden_size to be a positive integer, got -16"),
        (dict(num_hidden_layers=None), "expected num_hidden_layers to be a positive integer, got None"),
        (dict(num_key_value_heads=3), "expected num_heads to be a multiple of num_kv_heads, got 4 and 3"),
        (dict(head_dim=None, num_attention_heads=5), "hidden_size 16 is not a multiple of num_attention_heads 5"),
        (dict(rope_theta=None), "expected rope_theta to be a positive number"),
        (dict(rope_scaling=dict(type="linear", factor=2.0)), "expected rope type default or yarn, got 'linear'"),
        (dict(rope_parameters=dict(rope_type="llama3")), "expected rope type default or yarn, got 'llama3'"),
        (dict(rope_scaling=dict(type="yarn")), "expected factor to be a positive number, got None"),
        (dict(rope_scaling=dict(type="yarn", factor=4.0, beta_fast=16)), "yarn with beta_fast = 16 is not supported"),
        (dict(rope_scaling=dict(type="yarn", factor=4.0, attention_factor=1.0)), "yarn with attention_factor = 1.0"),
        (dict(use_sliding_window=True), "expected use_sliding_window false"),
        (dict(layer_types=["full_attention", "sliding_attention"]), "expected use_sliding_window false"),
        (dict(hidden_act="gelu"), "expected hidden_act silu, got 'gelu'"),
        (dict(quantization_config=dict(quant_method="gptq")), "quantised weights are not supported"),
        (dict(intermediate_size=25), r"gate_proj.weight has shape \(24, 16\), expected \(25, 16\)"),
        (dict(num_hidden_layers=1), "tensor model.layers.1.input_layernorm.weight is not one of Qwen2's"),
        (dict(tie_word_embeddings=True), "lm_head.weight differs from the embedding"),
    ],
    ids=lambda value: json.dumps(value) if isinstance(value, dict) else "",
)
def test_a_configuration_that_does_not_fit_is_refused(saved, changes, told):
    _, _, folder = saved
    edit_config(folder, **changes)
    with pytest.raises(UserError, match=told):
        hf.load(folder)


def test_everything_that_is_wrong_is_told_at_once(saved):
    _, _, folder = saved
    edit_config(folder, intermediate_size=25)

    def change(tensors):
        del tensors["model.layers.0.mlp.gate_proj.weight"]
        tensors["model.layers.0.self_attn.q_norm.weight"] = np.ones(4, np.float32)
        tensors["model.layers.0.mlp.up_proj.weight"] = tensors["model.layers.0.mlp.up_proj.weight"].astype(np.int32)

    edit_tensors(folder, change)
    last = folder / "model-00004-of-00004.safetensors"
    last.write_bytes(last.read_bytes()[:-7])
    (folder / "model-00003-of-00004.safetensors").unlink()
    told = refusal(folder)
    for part in (
        "tensor model.layers.0.mlp.gate_proj.weight is missing",
        "tensor model.layers.0.self_attn.q_norm.weight is not one of Qwen2's",
        "model.layers.0.mlp.up_proj.weight has type I32, expected one of F32, BF16, F16",
        "model.layers.0.mlp.up_proj.weight has shape (24, 16), expected (25, 16)",
        "model-00004-of-00004.safetensors is truncated or damaged",
        "file model-00003-of-00004.safetensors of model.safetensors.index.json is missing",
    ):
        assert part in told
    assert "down_proj.weight is missing" not in told  # it is in the file whose absence is told


def test_a_long_list_of_problems_is_cut(saved):
    _, _, folder = saved
    edit_config(folder, num_hidden_layers=40)
    told = refusal(folder)
    assert told.count("is missing") == hf.SHOWN
    assert f"and {38 * 12 - hf.SHOWN} more" in told


@pytest.mark.parametrize("kept", [0, 5, 100, 1500], ids=lambda kept: f"{kept}-bytes")
def test_a_truncated_file_is_named_wherever_it_ends(saved, kept):
    _, _, folder = saved
    path = folder / "model-00001-of-00004.safetensors"
    path.write_bytes(path.read_bytes()[:kept])
    told = refusal(folder)
    assert "model-00001-of-00004.safetensors is truncated" in told
    assert "embed_tokens.weight is missing" not in told


def test_missing_files_are_named(saved, tmp_path):
    _, _, folder = saved
    assert "does not exist" in refusal(tmp_path / "nowhere")
    (folder / "config.json").unlink()
    (folder / "model.safetensors.index.json").unlink()
    told = refusal(folder)
    assert "config.json is missing" in told
    assert "neither model.safetensors nor model.safetensors.index.json is there; its shards are" in told


def test_an_index_cannot_point_out_of_its_folder(saved):
    _, _, folder = saved
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    index["weight_map"]["model.norm.weight"] = "../model.safetensors"
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    assert "points to ../model.safetensors, which is not in the same folder" in refusal(folder)


# ------------------------------------------------------------------------------------------------------ what is right


def test_the_reference_implementation_of_the_format_reads_what_is_written(saved):
    _, params, folder = saved
    tensors = {}
    for path in folder.glob("*.safetensors"):
        tensors |= safetensors.numpy.load_file(path)
    assert len(tensors) == 3 + 2 * 12
    np.testing.assert_array_equal(tensors["lm_head.weight"], params["unembedding"])
    np.testing.assert_array_equal(tensors["model.layers.1.mlp.down_proj.weight"], params["layers"]["down_kernel"][1].T)
    np.testing.assert_array_equal(tensors["model.layers.1.self_attn.k_proj.bias"], params["layers"]["k_bias"][1])


@pytest.mark.parametrize("chunk", [1, 3000, 2**28])
def test_pieces_of_any_size_make_the_same_arrays(saved, chunk, monkeypatch):
    config, params, folder = saved
    monkeypatch.setattr(hf, "CHUNK", chunk)
    reported = []
    loaded_config, loaded = hf.load(folder, report=lambda done, total: reported.append((done, total)))
    assert loaded_config == config
    assert_equal(loaded, params)
    size = sum(leaf.nbytes for leaf in jax.tree.leaves(params))
    assert reported[-1] == (size, size)


def test_equal_tied_heads_and_types_that_differ_are_read_without_loss(tmp_path):
    config = small(tie_embeddings=True, param_dtype="bfloat16")
    params = qwen2.init_params(config, jax.random.key(0))
    hf.save(config, params, tmp_path)
    path = tmp_path / "model.safetensors"
    tensors = safetensors.numpy.load_file(path)
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"]
    tensors["model.norm.weight"] = np.full(16, 1 + 2**-20, np.float32)
    safetensors.numpy.save_file(tensors, path)
    loaded_config, loaded = hf.load(tmp_path)
    assert loaded_config.param_dtype == loaded_config.dtype == "float32"
    assert np.all(np.asarray(loaded["final_norm"]) == np.float32(1 + 2**-20))
    np.testing.assert_array_equal(loaded["embedding"], params["embedding"].astype(np.float32))


def test_weights_of_bfloat16_train_as_float32_parameters_if_asked(tmp_path):
    config = small(param_dtype="bfloat16", dtype="bfloat16")
    params = qwen2.init_params(config, jax.random.key(0))
    hf.save(config, params, tmp_path)
    loaded_config, loaded = hf.load(tmp_path, param_dtype="float32")
    assert (loaded_config.dtype, loaded_config.param_dtype) == ("bfloat16", "float32")
    assert_equal(loaded, jax.tree.map(lambda leaf: leaf.astype(np.float32), params))


@pytest.mark.parametrize("form", ["rope_scaling", "rope_parameters"])
def test_yarn_is_read_in_the_form_of_every_version_of_transformers(saved, form):
    _, _, folder = saved
    scaling = {"factor": 4.0, "original_max_position_embeddings": 32768}
    if form == "rope_scaling":
        edit_config(folder, rope_scaling=scaling | {"type": "yarn"}, rope_theta=5e5)
    else:
        edit_config(folder, rope_parameters=scaling | {"rope_type": "yarn", "rope_theta": 5e5}, rope_theta=None)
    config, _ = hf.load(folder)
    assert (config.yarn_factor, config.original_context, config.rope_theta) == (4.0, 32768, 5e5)


def test_a_new_checkpoint_replaces_the_old_one_and_nothing_else(saved):
    _, _, folder = saved
    (folder / "tokenizer.json").write_text("{}")
    config = small(num_layers=1)
    params = qwen2.init_params(config, jax.random.key(1))
    hf.save(config, params, folder)
    assert sorted(path.name for path in folder.iterdir()) == ["config.json", "model.safetensors", "tokenizer.json"]
    assert_equal(hf.load(folder)[1], params)


def test_a_writer_that_fails_leaves_the_old_checkpoint(saved, monkeypatch):
    config, params, folder = saved
    before = sorted(path.name for path in folder.iterdir())

    def full(*arguments):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(hf.safetensors, "write", full)
        with pytest.raises(OSError, match="No space"):
            hf.save(config, params, folder)
    assert sorted(path.name for path in folder.iterdir()) == before
    assert_equal(hf.load(folder)[1], params)


def test_saving_refuses_parameters_of_another_shape(saved, tmp_path):
    _, params, _ = saved
    with pytest.raises(ValueError, match="expected the parameters of"):
        hf.save(small(num_layers=3), params, tmp_path / "other")


def test_eight_devices_get_their_slices_and_give_them_back(saved, tmp_path):
    """Only the bytes of a device's slice are read for it: the script counts them."""
    config, params, folder = saved
    done = subprocess.run(
        [sys.executable, str(EIGHT_DEVICES), str(folder), str(tmp_path / "back")],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    result = json.loads(done.stdout)
    assert result["placed by the rules"]
    assert result["share of q_kernel"] == 1 / 8
    assert result["share of embedding"] < 1
    for name, (read, size) in result["values read"].items():
        assert read == size, name
    assert_equal(hf.load(tmp_path / "back")[1], params)


@pytest.mark.slow
def test_each_of_two_processes_reads_its_own_slices_and_the_first_writes(saved, tmp_path):
    _, params, folder = saved
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    commands = [
        [sys.executable, str(TWO_PROCESSES), str(number), str(port), str(folder), str(tmp_path / "back")]
        for number in range(2)
    ]
    processes = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for command in commands]
    try:
        for process in processes:
            out, _ = process.communicate(timeout=120)
            assert process.returncode == 0
            counts = json.loads(out.splitlines()[-1])
            assert counts["read"] == counts["here"] < 0.6 * counts["all"]
    finally:
        for process in processes:  # one that waits for the other's failure
            process.kill()
    assert_equal(hf.load(tmp_path / "back")[1], params)
