"""A stage is continued with the settings it was begun with, or the error names the field and both values."""

import pytest

from configs import miniature
from stepdr_jax import files
from stepdr_jax.errors import UserError
from stepdr_jax.models.qwen2 import Qwen2Config
from stepdr_jax.runtime import provenance
from stepdr_jax.runtime.layout import RunLayout


@pytest.fixture
def config(tmp_path):
    config = miniature.get_config().unlock()
    config.run_dir = str(tmp_path)
    return config


def settings(config, data="a"):
    return provenance.training_settings(config, "midtrain1", Qwen2Config.from_config(config.model, 300), data)


@pytest.fixture
def stage(config):
    stage = RunLayout.from_config(config).stage("midtrain1")
    files.write_json(stage.settings, settings(config))
    return stage


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("batch_size", 16, r"midtrain1\.batch_size = 8, this config has 16; choose another --config\.run_dir"),
        ("mixture.copying", 0.5, r"midtrain1\.mixture\.copying = 0\.05, this config has 0\.5"),
        ("mixture.reports", 0.5, r"midtrain1\.mixture\.reports = None, this config has 0\.5"),
        ("warmup_data", "quoting", r"midtrain1\.warmup_data = copying, this config has quoting"),
        ("warmup_data_steps", 7, r"midtrain1\.warmup_data_steps = 1000, this config has 7"),
        ("guard.norm_factor", 3.0, r"midtrain1\.guard\.norm_factor = 10\.0, this config has 3\.0"),
    ],
)
def test_a_field_that_changes_the_data_too_is_named_rather_than_the_data(config, stage, field, value, message):
    *sections, leaf = field.split(".")
    section = config.midtrain1
    for name in sections:
        section = section[name]
    section[leaf] = value
    with pytest.raises(UserError, match=message):
        provenance.require_same_settings(stage, settings(config, data="b"))


def test_other_data_and_another_parent_are_said_in_words(config, stage):
    with pytest.raises(UserError, match="was trained on other data than the run directory has now"):
        provenance.require_same_settings(stage, settings(config, data="b"))
    before = settings(config) | {"sft": "0"}
    files.write_json(stage.settings, before)
    with pytest.raises(UserError, match="started from another sft than the run directory has now"):
        provenance.require_same_settings(stage, before | {"sft": "1", "data": "b"})


def test_what_only_decides_how_it_runs_may_change(config, stage):
    config.midtrain1.update(dict(checkpoint_every=1, keep_checkpoints=9, loss_chunk=1, heldout_every=3))
    config.midtrain1.guard.max_rollbacks = 0
    provenance.require_same_settings(stage, settings(config))


def test_the_path_of_the_config_and_the_seed_do_not_count_for_the_quickstart(config):
    before = provenance.config_fingerprint(config, "seed0.sft", ())
    config.config_file, config.seed = "elsewhere.py", 5
    assert provenance.config_fingerprint(config, "seed0.sft", ()) == before
    config.ppo.clip = 0.3
    assert provenance.config_fingerprint(config, "seed0.sft", ()) != before
