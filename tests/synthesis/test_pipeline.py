"""Facts about a whole synthesis run over a small web behind a real tool host."""

import json
import re
import shutil
from pathlib import Path

import pytest

from configs.miniature import get_config
from stepdr_jax import files, records
from stepdr_jax.errors import UserError
from stepdr_jax.records import RubricSet, Task, Trajectory
from stepdr_jax.synthesis import cleaning, pipeline
from stepdr_jax.synthesis.scripted import knowledge
from stepdr_jax.text.citations import cited_ids
from stepdr_jax.text.matching import states_value
from stepdr_jax.tokens import chat
from tests.synthesis import small_world
from tools_env.process import ToolHost


def config_for(run_dir):
    config = get_config()
    with config.unlocked():
        config.run_dir = str(run_dir)
        config.synthesis.tasks_per_entity = 30
        config.synthesis.heldout_tasks = 12
        config.synthesis.trajectory_copies = 2
        config.synthesis.document_copies = 1
    return config


@pytest.fixture(scope="module")
def host(tmp_path_factory):
    world = tmp_path_factory.mktemp("world")
    small_world.write(world)
    with ToolHost(world, web_port=9, log_path=world / "host.log") as running:  # no page can be opened here
        running.world = world
        yield running


@pytest.fixture(scope="module")
def finished(host, tmp_path_factory):
    run_dir = tmp_path_factory.mktemp("run")
    card = pipeline.synthesize_corpus(config_for(run_dir), host.address, world_dir=host.world)
    return run_dir, card


def contents(run_dir):
    left_out = ("card.json", "config.json")  # these hold times and the run directory
    return {path.name: path.read_bytes() for path in (run_dir / "corpus").iterdir() if path.name not in left_out}


def trajectories(run_dir):
    return records.read_records(run_dir / "corpus" / "trajectories.jsonl", Trajectory)


def test_the_card_counts_what_the_files_hold(finished):
    run_dir, card = finished
    tasks = records.read_records(run_dir / "corpus" / "tasks.jsonl", Task)
    rows = trajectories(run_dir)
    originals = [row for row in rows if "copy_of" not in row.metadata]
    assert sum(sum(table.values()) for table in card["tasks"].values()) == len(tasks)
    assert card["trajectories"]["kept"] == sum(row.kept for row in originals)
    assert card["trajectories"]["renamed copies"] == len(rows) - len(originals) == 2 * card["trajectories"]["kept"]
    documents = files.read_jsonl(run_dir / "corpus" / "synthetic_documents.jsonl")
    assert sum(card["synthetic_documents"].values()) == len(documents)
    kinds = {kind.split()[0] for kind in card["episodes"]["kept"]}
    assert kinds >= {"fact", "deep_search", "verification", "report"}


def test_every_task_has_its_rubrics(finished):
    run_dir, _ = finished
    sets = {row.task_id: row for row in records.read_records(run_dir / "corpus" / "rubrics.jsonl", RubricSet)}
    for task in records.read_records(run_dir / "corpus" / "tasks.jsonl", Task):
        assert sets[task.id].id == task.rubric_set_id and sets[task.id].kept


def test_kept_episodes_are_well_formed_and_their_citations_resolve(finished):
    for row in trajectories(finished[0]):
        if not row.kept:
            assert row.drop_reason
            continue
        assert row.metadata["components"] and row.capability and row.metadata["lang"]
        assert cited_ids(row.answer) and set(cited_ids(row.answer)) <= set(row.sources())
        for message in row.messages:
            if message.role == "assistant":
                parsed = chat.parse_assistant(message.content)
                assert parsed.error is None
                assert [c.arguments for c in parsed.tool_calls] == [c.arguments for c in message.tool_calls]
        assert chat.parse_assistant(row.messages[-1].content).answer == row.answer


def test_the_share_of_recoveries_is_the_configured_one(finished):
    kept = [row for row in trajectories(finished[0]) if row.kept and "copy_of" not in row.metadata]
    noisy = sum(cleaning.has_recovery(row) for row in kept)
    assert noisy == round(0.08 * len(kept))
    assert any(not m.train for row in kept if cleaning.has_recovery(row) for m in row.messages)


def test_training_data_names_nothing_that_only_held_out_countries_have(finished, host):
    run_dir, _ = finished
    known = knowledge.load_knowledge(host.world, heldout_share=0.2, seed=0)
    assert known.heldout
    tasks = {task.id: task for task in records.read_records(run_dir / "corpus" / "tasks.jsonl", Task)}
    assert {task.split for task in tasks.values()} == {"train", "heldout"}
    documents = files.read_jsonl(run_dir / "corpus" / "synthetic_documents.jsonl")
    texts = [json.dumps(row, ensure_ascii=False) for row in documents]
    for row in trajectories(run_dir):
        assert tasks[row.task_id].split == "train"
        texts += [m.content for m in row.messages] + [s.text for s in row.sources().values()]
    for text in texts:
        assert [name for name in known.private if states_value(text, name)] == [], text


def test_a_finished_run_is_left_alone(finished, host):
    run_dir, card = finished
    before = {path: path.stat().st_mtime_ns for path in (run_dir / "corpus").iterdir()}
    assert pipeline.synthesize_corpus(config_for(run_dir), "127.0.0.1:1", world_dir=host.world) == card
    assert before == {path: path.stat().st_mtime_ns for path in (run_dir / "corpus").iterdir()}


def test_a_killed_run_continues_to_the_same_corpus(finished, host, tmp_path):
    run_dir, _ = finished
    corpus = tmp_path / "corpus"
    corpus.mkdir()
    lines = (run_dir / "corpus" / "episodes.journal.jsonl").read_text().splitlines(keepends=True)
    (corpus / "episodes.journal.jsonl").write_text("".join(lines[:60]) + lines[60][:100])  # the kill tore a line
    pipeline.synthesize_corpus(config_for(tmp_path), host.address, world_dir=host.world)
    whole, resumed = contents(run_dir), contents(tmp_path)
    for name in whole.keys() - {"episodes.journal.jsonl"}:
        assert resumed[name] == whole[name], name
    rows = files.read_jsonl(corpus / "episodes.journal.jsonl")
    assert len(rows) == len(lines) and [row["key"] for row in rows[1:60]] == [
        json.loads(line)["key"] for line in lines[1:60]
    ]


def test_another_seed_starts_a_new_journal(finished, host, tmp_path):
    shutil.copytree(finished[0] / "corpus", tmp_path / "corpus")
    config = config_for(tmp_path)
    with config.unlocked():
        config.data_seed = 1
        config.synthesis.tasks_per_entity = 2
    card = pipeline.synthesize_corpus(config, host.address, world_dir=host.world)
    assert card["fingerprint"] != finished[1]["fingerprint"] and card["episodes"]["run"] < 30


def test_a_missing_world_and_a_dead_tool_host_are_named(host, tmp_path):
    with pytest.raises(UserError, match="documents.jsonl does not exist"):
        pipeline.synthesize_corpus(config_for(tmp_path), host.address)


def test_only_the_pipeline_imports_the_domain_and_only_as_a_whole():
    general = Path(pipeline.__file__).parent.glob("*.py")
    lines = {path.name: re.findall(r"^.*synthesis\.scripted.*$", path.read_text(), re.MULTILINE) for path in general}
    expected = ["from stepdr_jax.synthesis.scripted.domain import CountryDomain"]
    assert {name: found for name, found in lines.items() if found} == {"pipeline.py": expected}
