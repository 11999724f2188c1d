"""The run report: self-contained, honest about PPO, safe against page text, and there with whatever stages exist."""

import json
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest

from configs import miniature
from stepdr_jax import files
from stepdr_jax.errors import UserError
from stepdr_jax.reporting import collect, report
from tests.reporting import synthetic_run


def config(run: Path):
    made = miniature.get_config()
    made.run_dir = str(run)
    return made


class Page(HTMLParser):
    """Collects what a browser would load and run."""

    def __init__(self, text, script="episode-data"):
        super().__init__()
        self.external, self.handlers, self.tags, self.data, self._script = [], [], [], "", None
        self.wanted = script
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        given = dict(attributes)
        self.external += [v for k, v in given.items() if k in ("src", "srcset", "data", "poster", "action")]
        self.external += [given["href"] for k in ("href",) if k in given and not given[k].startswith("#")]
        self.handlers += [k for k in given if k.startswith("on")]
        self._script = given.get("id") if tag == "script" else None

    def handle_data(self, data):
        if self._script == self.wanted:
            self.data += data

    def handle_endtag(self, tag):
        if tag == "script":
            self._script = None


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    run = tmp_path_factory.mktemp("finished")
    synthetic_run.write_run(run, seeds=2, tasks=40, skill=synthetic_run.SKILL | {"sft": 0.4, "ppo": 0.95})
    path = report.write_report(config(run), "--config.run_dir=runs/x")
    return run, path.read_text()


def test_page_loads_nothing_from_outside(finished):
    page = Page(finished[1])
    assert page.external == [] and page.handlers == []
    assert "default-src 'none'" in finished[1]
    assert not re.search(r"url\(|@import", finished[1].split("</style>")[0])


def test_text_of_web_pages_stays_text(finished):
    page = Page(finished[1])
    assert "img" not in page.tags and "b" in page.tags
    episodes = json.loads(page.data)
    assert any(synthetic_run.HOSTILE in step.get("text", "") for row in episodes for step in row["steps"])
    assert "<img" not in finished[1]


def test_every_section_is_in_the_contents(finished):
    for id_, _ in report.CONTENTS:
        assert f'<section id="{id_}">' in finished[1] and f'href="#{id_}"' in finished[1]


def test_headline_says_that_ppo_improved_with_its_interval(finished):
    assert re.search(r"PPO raised the mean held-out reward from .* 95\s% interval \+\d\.\d+ to \+\d\.\d+", finished[1])


def test_headline_says_plainly_when_ppo_did_not_improve(tmp_path):
    tasks = synthetic_run.write_corpus(tmp_path)
    synthetic_run.write_eval(tmp_path, 0, tasks, {"sft": 0.6, "ppo": 0.6})
    page, numbers = report.render_report(collect.collect_run(tmp_path), config(tmp_path))
    assert "PPO did not measurably improve over SFT" in page and not numbers["improved"]


def test_headline_says_plainly_when_ppo_made_it_worse(tmp_path):
    tasks = synthetic_run.write_corpus(tmp_path, 40)
    synthetic_run.write_eval(tmp_path, 0, tasks, {"sft": 0.9, "ppo": 0.1})
    page, _ = report.render_report(collect.collect_run(tmp_path), config(tmp_path))
    assert "PPO did not improve over SFT: it lowered" in page


def test_numbers_are_written_beside_the_page(finished):
    numbers = files.read_json(finished[0] / "report.json")
    assert numbers["improved"] and numbers["seeds"] == [0, 1]
    ppo = numbers["differences"]["ppo-sft"]["reward"]
    assert ppo["crossed"]["low"] > 0 and set(ppo["per_seed"]) == {"0", "1"}
    assert numbers["evaluation"]["sft"]["missing"] == {"infra_failed: tools: UNAVAILABLE": 2}
    assert numbers["data"]["trajectories"]["dropped"] == 8
    assert "NaN" not in (finished[0] / "report.json").read_text()


def section_of(page, title):
    return page.split(f"<h3>{title}</h3>")[1].split("<h3>")[0].split("</section>")[0]


def test_training_shows_losses_by_component_capability_family_and_on_held_out_rows(finished):
    sft = section_of(finished[1], "SFT")
    for title in (
        "Loss by mixture component",
        "Held-out loss by component",
        "Loss by capability",
        "Loss by data family",
    ):
        assert title in sft
    assert "FLOPs over the devices" not in sft and "FLOPs over the devices" in section_of(finished[1], "Mid-training I")


def test_a_held_out_loss_is_one_line_through_the_rows_that_have_it(finished):
    figure = section_of(finished[1], "SFT").split("Held-out loss by component", 1)[1].split("</figure>")[0]
    assert re.search(r'd="M[\d.]+ [\d.]+(L[\d.]+ [\d.]+){3}"', figure)


def test_training_tells_of_skips_returns_restarts_and_goodput(finished):
    first = section_of(finished[1], "Mid-training I")
    assert "Of its steps, 2 whose gradient was a spike were skipped." in first
    assert "At step 120 it rolled back to step 100 (5 steps skipped) and skipped the data in between." in first
    assert "It was started 2 times." in first and "Goodput 90" in first
    assert "<title>rolled back to here from step 120: 5 steps skipped</title>" in first
    assert "rolled back" not in section_of(finished[1], "SFT")


def test_qa_at_evaluation_checkpoints_is_drawn_over_training_tokens(finished):
    first = section_of(finished[1], "Mid-training I")
    figure = first.split("Held-out tasks while training", 1)[1].split("</figure>")[0]
    assert "training tokens" in figure and "409600" in figure.replace(".0", "")
    assert "Share of sampled output that is well-formed" in first
    assert "Held-out tasks while training" not in section_of(finished[1], "SFT")


def test_renamed_copies_are_not_counted_as_episodes(finished):
    assert files.read_json(finished[0] / "report.json")["data"]["trajectories"]["kept"] == 32


def test_ppo_episodes_carry_values_and_advantages_per_token(finished):
    episodes = json.loads(Page(finished[1]).data)
    detailed = [row for row in episodes if "tokens" in row]
    assert {row["where"] for row in detailed} == {f"PPO, iteration {i}" for i in (0, 20, 39)}
    tokens = detailed[0]["tokens"]
    assert sum(tokens["runs"]) == len(tokens["ids"])
    assert len(tokens["value"]) == len(tokens["advantage"]) == len(tokens["trainer"]) == sum(tokens["runs"][1::2])
    known = json.loads(Page(finished[1], "vocabulary").data)
    assert {str(id_) for row in detailed for id_ in row["tokens"]["ids"]} == known.keys()


def test_the_same_tasks_are_shown_at_every_stage(finished):
    episodes = json.loads(Page(finished[1]).data)
    stages = {}
    for row in episodes:
        if row["where"].startswith("held out") and row["seed"] == 0:
            stages.setdefault(row["where"], set()).add(row["task"])
    assert len(stages) == 5 and len(set(map(frozenset, stages.values()))) == 1


def test_embedded_episodes_are_bounded(finished):
    run = collect.collect_run(finished[0])
    few = report.episodes_for_viewer(run, max_bytes=40_000)
    assert 0 < len(json.dumps(few, ensure_ascii=False).encode()) <= 41_000
    assert len({row["where"] for row in few}) > 5


def test_commands_repeat_the_config_flags(finished):
    assert "python -m launch.ppo --config.run_dir=runs/x" in finished[1]


def test_empty_run_names_the_commands(tmp_path):
    page = report.write_report(config(tmp_path / "new")).read_text()
    for name in ("synthesize", "build_data", "midtrain --stage=midtrain1", "sft", "ppo", "evaluate"):
        assert f"python -m launch.{name}" in page
    assert "Nothing has been evaluated yet" in page


@pytest.mark.parametrize("parts", ["corpus", "training", "ppo", "eval"])
def test_report_renders_with_some_stages(tmp_path, parts):
    tasks = synthetic_run.write_corpus(tmp_path)
    if parts == "training":
        synthetic_run.write_training(tmp_path, 0, steps=20)
    if parts == "ppo":
        synthetic_run.write_ppo(tmp_path, 3, tasks, iterations=3)
    if parts == "eval":
        synthetic_run.write_eval(tmp_path, 0, tasks, {"init": 0.0, "sft": 0.5})
    page, numbers = report.render_report(collect.collect_run(tmp_path), config(tmp_path))
    assert "</html>" in page and not numbers["improved"]


def test_one_row_of_metrics_is_enough(tmp_path):
    files.append_jsonl(tmp_path / "seed0" / "sft" / "metrics.jsonl", {"step": 1, "loss": 3.0})
    assert "1 step, loss 3.00" in report.render_report(collect.collect_run(tmp_path), config(tmp_path))[0]


def test_a_damaged_file_is_named(tmp_path):
    path = tmp_path / "seed0" / "sft" / "metrics.jsonl"
    path.parent.mkdir(parents=True)
    path.write_text("{broken}\n{}\n")
    with pytest.raises(UserError, match=r"metrics\.jsonl line 1"):
        report.write_report(config(tmp_path))


def test_curves_of_a_resumed_stage_take_the_last_row_of_a_step():
    curves = collect.read_curves(
        [{"step": 1, "loss": 5.0}, {"step": 2, "loss": 4.0}, {"step": 1, "loss": 3.0, "by": {"a": 1}}]
    )
    assert curves.x == [1, 2] and curves.values["loss"] == [3.0, 4.0]
    assert curves.values["by/a"][0] == 1.0 and curves.values["by/a"][1] != curves.values["by/a"][1]
