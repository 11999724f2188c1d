"""Evaluation checkpoints, by the training process and by a job that watches: a tiny model, a real tool host."""

import shutil

import numpy as np
import pytest

from stepdr_jax import files, records
from stepdr_jax.evaluation import checkpoints
from stepdr_jax.records import Rubric, RubricSet
from stepdr_jax.runtime import checkpoint
from stepdr_jax.runtime.layout import RunLayout
from stepdr_jax.tokens.tokenizer import Tokenizer
from stepdr_jax.training import loop, state
from tests.reporting import synthetic_run
from tests.tools_env.conftest import write_offline_web
from tests.training import tiny
from tools_env.process import ToolHost


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """Twelve steps of 120 tokens, an evaluation checkpoint every 500 tokens at the rows of every third step."""
    run_dir = tmp_path_factory.mktemp("evaluated")
    tasks = synthetic_run.make_tasks(12)
    records.write_records(run_dir / "corpus" / "tasks.jsonl", tasks)
    check = Rubric(rid="a", criterion="States it.", weight=1, role="explicit", check={"kind": "states", "any": ["x"]})
    rubric_sets = [RubricSet(id=task.id, task_id=task.id, rubrics=[check]) for task in tasks]
    records.write_records(run_dir / "corpus" / "rubrics.jsonl", rubric_sets)
    tokenizer = Tokenizer.train([task.query for task in tasks], 300)
    tokenizer.save(run_dir / "tokenizer" / "tokenizer.json")
    config = tiny.tiny_config(
        run_dir, **{"eval.every_tokens": 500, "eval.checkpoint_tasks": 4, "sampler.max_num_seqs": 4, "sampler.pools": 1}
    )
    config.agent.update(dict(max_turns=2, max_turn_tokens=8, max_episode_tokens=512))
    world = write_offline_web(run_dir / "world")

    def host():
        return ToolHost(world, web_port=9, log_path=run_dir / "log")

    on_eval_checkpoint = checkpoints.inline_evaluation(config, "midtrain1", host)
    loop.train(
        config,
        "midtrain1",
        loader=tiny.Memory(),
        vocab_size=tokenizer.vocab_size,
        on_eval_checkpoint=on_eval_checkpoint,
    )
    return config, host, RunLayout.from_config(config).stage("midtrain1")


def test_evaluation_checkpoints_lie_at_the_rows_that_pass_a_multiple_of_the_tokens(trained):
    config, _, layout = trained
    assert layout.eval_steps() == [6, 9]  # 720 and 1,080 tokens
    assert [event["step"] for event in files.read_jsonl(layout.events) if event["event"] == "evaluated"] == [
        6,
        9,
    ]
    final = checkpoint.restore_checkpoint(layout.checkpoint_dir, {"step": np.zeros((), np.int32)})
    params = {step: state.load_params(config, 0, f"midtrain1@{step}") for step in (6, 9)}
    assert final.step == 12
    assert not np.array_equal(params[6]["embedding"], params[9]["embedding"])


def test_a_row_per_checkpoint_says_what_was_measured(trained):
    rows = files.read_jsonl(trained[2].qa_rows)
    assert [(row["step"], row["tokens"], row["episodes"]) for row in rows] == [(6, 720, 4), (9, 1080, 4)]
    for row in rows:
        assert row["missing"] == 0
        assert row["low"]["reward"] <= row["reward"] <= row["high"]["reward"]
        assert 0 <= row["format"]["turns"] <= 1 and row["format"]["answer"] == row["answered"]


def test_a_job_that_watches_writes_the_same_rows_and_ends_with_the_stages(trained, tmp_path):
    config, host, layout = trained
    path = layout.qa_rows
    before = files.read_jsonl(path)
    shutil.move(path, tmp_path / "qa.jsonl")
    layout.done.rename(tmp_path / "done.json")
    looks = []

    def sleep(seconds):
        looks.append(seconds)
        (tmp_path / "done.json").rename(layout.done)

    rows = list(checkpoints.watch_stages(config, ["midtrain1"], None, every=7.0, sleep=sleep))
    assert looks == [7.0]
    assert rows == [{"stage": "midtrain1"} | row for row in before] and files.read_jsonl(path) == before


def test_a_checkpoint_that_was_undone_loses_its_row(trained, tmp_path):
    config, _, layout = trained
    shutil.move(layout.eval_checkpoint(9), tmp_path / "gone")
    checkpoints.evaluate_checkpoint(config, "midtrain1", 6, None)
    assert [row["step"] for row in files.read_jsonl(layout.qa_rows)] == [6]
    shutil.move(tmp_path / "gone", layout.eval_checkpoint(9))


def test_a_checkpoint_that_a_killed_process_did_not_come_to_is_evaluated_by_the_next(trained, tmp_path):
    """Its checkpoint is of the same step, so that the next process does not pass it again."""
    config, _, _ = trained
    copy = config.copy_and_resolve_references()
    copy.run_dir = str(tmp_path / "run")
    shutil.copytree(config.run_dir, copy.run_dir)
    resumed = RunLayout.from_config(copy).stage("midtrain1")
    resumed.done.unlink()
    shutil.rmtree(resumed.directory / "eval_checkpoints" / "00000009")
    resumed.qa_rows.unlink()
    checkpoint.remove_after(resumed.checkpoint_dir, 10)
    asked = []

    def on_eval_checkpoint(step):
        asked.append(step)
        row = {"step": step, "tokens": 0}
        files.append_jsonl(resumed.qa_rows, row)
        return row

    words = Tokenizer.load(tmp_path / "run" / "tokenizer" / "tokenizer.json").vocab_size
    loop.train(copy, "midtrain1", loader=tiny.Memory(), vocab_size=words, on_eval_checkpoint=on_eval_checkpoint)
    assert asked == [6]


def test_no_evaluation_checkpoints_and_no_evaluation_in_this_process_unless_asked(trained):
    config = trained[0].copy_and_resolve_references()
    config.eval.inline = False
    assert checkpoints.inline_evaluation(config, "midtrain1", trained[1]) is None
    config.eval.update(dict(inline=True, every_tokens=0))
    assert checkpoints.inline_evaluation(config, "midtrain1", trained[1]) is None
