"""A new stage is one row: the plan, the commands, the parents, the report and the dashboard follow."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

from configs import miniature
from stepdr_jax import files
from stepdr_jax.errors import UserError
from stepdr_jax.orchestration import plan
from stepdr_jax.reporting import collect, dashboard, following, report
from stepdr_jax.runtime import provenance, stages
from stepdr_jax.runtime.layout import RunLayout

ROOT = Path(__file__).parents[2]
JUDGE_SFT = stages.Stage(
    "judge_sft",
    "Judge, fine-tuned",
    "launch.judge --stage=judge_sft",
    "judge_sft/done.json",
    program="train",
    parent="init",
    unit="step",
    seconds=10,
    work=lambda config: config.sft.steps,
)
JUDGE_RL = stages.Stage(
    "judge_rl",
    "Judge, RL",
    "launch.judge_rl",
    "judge_rl/done.json",
    program="ppo",
    parent="judge_sft",
    unit="iteration",
)


@pytest.fixture
def config(tmp_path):
    config = miniature.get_config().unlock()
    config.run_dir = str(tmp_path)
    return config


@pytest.fixture
def more(monkeypatch):
    """The table with the two stages of a judge before PPO."""
    names = [stage.name for stage in stages.STAGES]
    at = names.index("ppo")
    monkeypatch.setattr(stages, "STAGES", (*stages.STAGES[:at], JUDGE_SFT, JUDGE_RL, *stages.STAGES[at:]))


def test_the_plan_runs_it_for_every_seed_and_estimates_its_time(config, more):
    found = {stage.key: stage for stage in plan.plan(config, config, seeds=2)}
    keys = list(found)
    assert (
        keys.index("seed0.sft") < keys.index("seed0.judge_sft") < keys.index("seed0.judge_rl") < keys.index("seed0.ppo")
    )
    judge = found["seed1.judge_sft"]
    assert (judge.module, judge.arguments) == ("launch.judge", ("--stage=judge_sft", "--config.seed=1"))
    assert judge.output == "seed1/judge_sft/done.json" and judge.seconds == 10 and judge.exact
    twice = config.copy_and_resolve_references()
    twice.sft.steps *= 2
    assert {stage.key: stage.seconds for stage in plan.plan(twice, config)}["seed0.judge_sft"] == 20


def test_it_starts_from_its_parent_and_names_the_command_that_is_missing(config, more):
    assert stages.parent_of(config, "judge_sft") == "init" and stages.parent_of(config, "judge_rl") == "judge_sft"
    with pytest.raises(UserError, match="judge_rl starts from judge_sft, .*python -m launch.judge --stage=judge_sft"):
        provenance.require_parent(config, "judge_rl")
    files.write_json(RunLayout.from_config(config).stage("judge_sft").done, {"params_sha256": "0"})
    provenance.require_parent(config, "judge_rl")


def test_it_has_packed_data_and_metrics_but_does_not_answer_questions(more):
    assert "judge_sft" in stages.trained() and "judge_rl" not in stages.trained()
    assert {"judge_sft", "judge_rl"} <= set(stages.with_metrics())
    assert not {"judge_sft", "judge_rl"} & set(stages.evaluated())


def test_the_report_and_the_dashboard_show_its_title_unit_and_command(config, more, tmp_path):
    layout = RunLayout.from_config(config)
    for step in (10, 20):
        files.append_jsonl(layout.stage("judge_sft").metrics, {"step": step, "loss": 1.0})
        files.append_jsonl(layout.stage("judge_rl").metrics, {"iteration": step, "reward": 0.5})
    page, _ = report.render_report(collect.collect_run(tmp_path), config)
    assert "Judge, fine-tuned" in page and "Judge, RL" in page
    assert "python -m launch.judge --stage=judge_sft" in page
    watched = following.FollowedRun(tmp_path)
    watched.poll()
    shown = {one.stage: str(dashboard._standing(one, {}, None, True)) for one in watched.stages.values()}
    assert "step 20" in shown["judge_sft"] and "iteration 21" in shown["judge_rl"]


def test_a_command_is_complete(config):
    config.config_file = "configs/my config.py"
    config.seed = 3
    words, where = "launch.midtrain --stage=midtrain1", f"--config.run_dir={config.run_dir} --config.seed=3"
    assert stages.command_of("midtrain1", config) == f"python -m {words} '--config=configs/my config.py' {where}"
    assert stages.command_of("midtrain1", config, seed=4).endswith("--config.seed=4")
    assert "--config.seed" not in stages.command_of("synthesize", config)
    assert "launch.evaluate --watch" in stages.command_of("evaluate", config, "--watch")


def test_every_command_is_a_script_that_has_its_flags():
    for stage in stages.STAGES:
        module, *arguments = stage.command.split()
        source = (ROOT / (module.replace(".", "/") + ".py")).read_text()
        for argument in arguments:
            name = argument.removeprefix("--").partition("=")[0]
            assert re.search(rf'DEFINE_\w+\(\s*"{name}"', source), (module, name)


def test_an_unknown_stage_is_named_with_those_there_are():
    with pytest.raises(UserError, match="expected a stage among offline_web, .*, got 'rlhf'"):
        stages.stage_named("rlhf")


def test_the_table_does_not_import_jax():
    code = "import sys; from stepdr_jax.runtime import layout, stages; sys.exit('jax' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0
