"""Every field is declared once, with a rule; a config survives its JSON; the reference page is current."""

import importlib
import json
import subprocess
import sys
from pathlib import Path

import pytest
from ml_collections import ConfigDict

from configs import base, miniature
from launch import document_configs, entry
from stepdr_jax import configuration
from stepdr_jax.configuration import Rule, above, declared_fields, field, section
from stepdr_jax.errors import UserError
from stepdr_jax.training import loop
from tests.training import tiny

CONFIGS = sorted(
    path for path in Path(base.__file__).parent.glob("*.py") if path.stem not in ("__init__", "base", "ppo_presets")
)


def test_every_field_has_a_rule_that_its_default_satisfies():
    declared = dict(declared_fields(base.FIELDS))
    assert all(isinstance(declared[name].rule, Rule) for name in declared)
    config = base.get_config()
    leaves = [name for name, _ in configuration.fields(config) if not name.startswith("synthesis.kind_weights.")]
    empty = [name for name, field in declared.items() if field.default == {}]
    assert sorted([*leaves, *empty, "synthesis.kind_weights"]) == sorted(declared)
    configuration.check_values(miniature.get_config(), base.FIELDS)


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_a_config_of_the_repository_loads_and_its_json_gives_it_again(path, tmp_path):
    config = entry.load(path)
    config.run_dir = str(tmp_path)
    configuration.check_values(config, base.FIELDS)
    configuration.save_config(config, tmp_path)
    again = entry.load(tmp_path / "config.json")
    assert again.to_dict() == config.to_dict()
    assert {n: type(v) for n, v in configuration.fields(again)} == {n: type(v) for n, v in configuration.fields(config)}


def test_tuples_floats_and_empty_sections_survive_json(tmp_path):
    config = miniature.get_config()
    config.sft.mixture_schedule = ((5, dict(sft_deep_search=0.1 + 0.2)), (9, dict(sft_deep_search=1e-300)))
    config.synthesis.kind_weights = ConfigDict(dict(fact=1.0))
    config.model.rope_theta = 1e22
    configuration.save_config(config, tmp_path)
    again = entry.parse(["launch/sft.py", f"--config={tmp_path}/config.json", "--config.seed=7"])
    assert again.config_file == f"{tmp_path}/config.json" and again.seed == 7
    config.config_file, config.seed = again.config_file, 7
    assert again.to_dict() == config.to_dict() and again.data.sources.to_dict() == {}


def test_a_stage_writes_the_config_that_it_was_started_with(tmp_path):
    config = tiny.tiny_config(tmp_path, **{"midtrain1.steps": 2})
    loop.train(config, "midtrain1", loader=tiny.Memory(), vocab_size=tiny.VOCAB)
    assert entry.load(tmp_path / "seed0" / "midtrain1" / "config.json").to_dict() == config.to_dict()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda values: values["ppo"].update(clipp=1.0), "has an unknown field ppo.clipp; did you mean ppo.clip"),
        (lambda values: values["ppo"].pop("clip"), "lacks ppo.clip"),
        (lambda values: values["ppo"].update(clip="x"), "ppo.clip: expected a number, got 'x'"),
        (lambda values: values.update(seed=True), "seed: expected an integer, got True"),
        (lambda values: values.update(ppo=3), "ppo: expected a section"),
        (lambda values: values["sft"].update(mixture=3), "sft.mixture: expected a section"),
    ],
)
def test_a_wrong_json_is_refused_with_file_and_field(change, message, tmp_path):
    values = miniature.get_config().to_dict()
    change(values)
    path = tmp_path / "config.json"
    path.write_text(json.dumps(values))
    with pytest.raises(UserError, match=f"config file {path}.*{message}"):
        entry.load(path)
    path.write_text("{")
    with pytest.raises(UserError, match="is not valid JSON"):
        entry.load(path)


def test_rules_are_those_of_a_path_and_not_of_a_name():
    for word, message in [
        ("--config.eval.heldout_tasks=0", "has no field"),
        ("--config.eval.tasks=0", "eval.tasks: expected a number above 0, got 0"),
        ("--config.sft.mixture.sft_deep_search=-1", "sft.mixture.sft_deep_search: expected a number from 0 up"),
        ("--config.profile.steps=3", "profile.steps: expected .first, last."),
        ("--config.profile.steps=a,b", "profile.steps: expected a tuple such as"),
        ("--config.sampler.urls=10.0.0.5:8000", "sampler.urls: expected addresses such as http"),
        ("--config.sampler.engine=vllm", "sampler.urls: expected addresses of vllm servers"),
        ("--config.profile.steps=(3,1)", "profile.steps: expected .first, last."),
        ("--config.sft.mixture_schedule=(3,1)", "sft.mixture_schedule: expected ..step"),
        ("--config.model.head_dim=33", "model.head_dim: expected an even number"),
    ]:
        with pytest.raises(UserError, match=message):
            entry.parse(["launch/sft.py", word])
    urls = entry.parse(["launch/sft.py", "--config.sampler.urls=http://a:1,http://b:2"]).sampler.urls
    assert urls == ("http://a:1", "http://b:2")
    schedule = entry.parse(["launch/sft.py", "--config.sft.mixture_schedule=((3,{'sft_deep_search':1.0}),)"])
    assert schedule.sft.mixture_schedule == ((3, {"sft_deep_search": 1.0}),)


def test_one_line_declares_a_field():
    declared = section("Toy", **base.FIELDS.members | dict(toy=section("More", size=field(3, above(2), "in meters"))))
    config = configuration.build_config(declared)
    configuration.override(config, "toy.size", "2")
    configuration.check_shape(config, declared)
    with pytest.raises(UserError, match="toy.size: expected a number above 2, got 2"):
        configuration.check_values(config, declared)
    assert "| `size` | `3` | a number above 2 | in meters |" in document_configs.page(declared)


def test_the_reference_page_is_that_of_the_declared_fields():
    assert document_configs.PAGE.read_text() == document_configs.page(base.FIELDS), "python -m launch.document_configs"


def test_rules_are_usable_without_jax():
    program = "import sys; from configs import miniature; miniature.get_config(); sys.exit('jax' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", program]).returncode == 0


def test_choices_are_those_of_the_code():
    remat = importlib.import_module("stepdr_jax.models.qwen2").REMAT
    assert set(base.REMAT) == set(remat)
