"""Where a run keeps its files, and where a reader finds checkpoints that were written elsewhere."""

from pathlib import Path

import pytest

from configs import miniature
from stepdr_jax import files
from stepdr_jax.errors import UserError
from stepdr_jax.runtime import provenance
from stepdr_jax.runtime.layout import ENTRIES, RunLayout


def layout_of(run_dir, directory="", seed=0):
    config = miniature.get_config().unlock()
    config.run_dir, config.seed, config.checkpointing.directory = str(run_dir), seed, str(directory)
    return RunLayout.from_config(config)


def write_checkpoint(directory):
    (directory / "00000010").mkdir(parents=True)


def test_names_on_disk(tmp_path):
    layout = layout_of(tmp_path, seed=2)
    stage = layout.stage("sft")
    assert stage.directory == tmp_path / "seed2" / "sft" and layout.stage("sft", 5).directory.parent.name == "seed5"
    assert stage.checkpoint_dir == stage.directory / "checkpoints"
    assert stage.eval_checkpoint(12) == stage.directory / "eval_checkpoints" / "00000012"
    assert layout.evaluated("sft@12") == tmp_path / "seed2" / "eval" / "sft@12.jsonl"
    assert layout.tool_host_log("seed2.ppo") == tmp_path / "logs" / "seed2.ppo_tool_host.log"


def test_every_shared_file_is_known_as_the_runs_own(tmp_path):
    layout = layout_of(tmp_path)
    shared = [getattr(layout, name) for name, found in vars(RunLayout).items() if isinstance(found, property)]
    assert len(shared) > 10
    for path in shared:
        assert ENTRIES.match(path.relative_to(tmp_path).parts[0]), path
    assert ENTRIES.match("seed0") and not ENTRIES.match("thesis.tex")


def test_checkpoints_elsewhere(tmp_path):
    stage = layout_of(tmp_path / "run", tmp_path / "elsewhere").stage("sft")
    assert stage.checkpoint_dir == tmp_path / "elsewhere" / "seed0" / "sft" / "checkpoints"
    assert str(layout_of(tmp_path, "gs://bucket/runs").stage("sft").checkpoint_dir) == (
        "gs://bucket/runs/seed0/sft/checkpoints"
    )
    with pytest.raises(UserError, match="gs://"):
        layout_of(tmp_path, "gs://")


def test_a_reader_without_the_field_finds_them_and_a_writer_is_refused(tmp_path):
    written, without = (layout_of(tmp_path / "run", place).stage("sft") for place in (tmp_path / "elsewhere", ""))
    write_checkpoint(written.checkpoint_dir)
    files.write_json(written.settings, {})
    provenance.record_location(written)
    assert without.for_reading().checkpoint_dir == written.checkpoint_dir
    provenance.require_same_location(written)
    with pytest.raises(UserError, match="there are none in .*give --config.checkpointing.directory='.*elsewhere'"):
        provenance.require_same_location(without)
    write_checkpoint(without.checkpoint_dir)  # they were moved
    provenance.require_same_location(without)
    assert without.for_reading() == without


def test_seeds_are_in_the_order_of_their_numbers(tmp_path):
    for name in ("seed10", "seed2", "seeds", "seed"):
        (tmp_path / name).mkdir()
    Path(tmp_path / "seed3").touch()
    assert layout_of(tmp_path).seeds() == [2, 10]
