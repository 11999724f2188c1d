"""A stage can start from a converted checkpoint; one that does not fit is refused before any work."""

import dataclasses

import jax
import numpy as np
import pytest

from stepdr_jax.errors import UserError
from stepdr_jax.models.qwen2 import Qwen2Config
from stepdr_jax.runtime import checkpoint, provenance
from stepdr_jax.training import program, state
from tests.training.tiny import VOCAB, tiny_config


@pytest.fixture
def config(tmp_path):
    config = tiny_config(tmp_path / "run")
    config.initial_checkpoint = str(tmp_path / "converted")
    return config


def save(config, **changes):
    model = dataclasses.replace(Qwen2Config.from_config(config.model, VOCAB), **changes)
    params = state.initial_params(model, 7)
    checkpoint.save_checkpoint(
        config.initial_checkpoint, 0, {"params": params}, {"model": dataclasses.asdict(model)}, keep=1
    )
    return params


def test_midtraining_starts_from_the_checkpoint(config):
    expected = save(config)
    start = state.starting_params(config, "midtrain1", Qwen2Config.from_config(config.model, VOCAB))
    jax.tree.map(np.testing.assert_array_equal, start, expected)


def test_fine_tuning_may_be_the_first_stage(config):
    with pytest.raises(UserError, match="sft starts from midtrain2, which is not finished.*--config.first_stage=sft"):
        provenance.require_parent(config, "sft")
    expected = save(config)
    config.first_stage = "sft"
    provenance.require_parent(config, "sft")
    start = state.starting_params(config, "sft", Qwen2Config.from_config(config.model, VOCAB))
    jax.tree.map(np.testing.assert_array_equal, start, expected)


def test_a_checkpoint_of_another_model_or_none_is_named(config):
    with pytest.raises(UserError, match="converted has no checkpoint.*launch.convert"):
        state.starting_params(config, "midtrain1", Qwen2Config.from_config(config.model, VOCAB))
    save(config, rope_theta=5.0)
    with pytest.raises(UserError, match="model.rope_theta = 5.0, this config has"):
        state.starting_params(config, "midtrain1", Qwen2Config.from_config(config.model, VOCAB))


@pytest.mark.parametrize(
    ("number", "wanted", "found"), [(1188, 4, 4), (594, 4, 3), (1187, 4, 1), (768, 1, 1), (297, 8, 9)]
)
def test_slices_of_the_vocabulary_are_as_many_as_divide_it(number, wanted, found):
    assert program._nearest_divisor(number, wanted) == found
