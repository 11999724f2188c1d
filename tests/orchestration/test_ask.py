"""A person's question: choosing who answers, what the terminal shows, what is written."""

import asyncio
import io

import pytest
import rich.console

from configs import miniature
from stepdr_jax.agent.budget import Limits
from stepdr_jax.agent.react import run_episode
from stepdr_jax.errors import UserError
from stepdr_jax.orchestration import ask
from stepdr_jax.records import Trajectory
from tests.agent.scripted import ANSWER, ScriptedPolicy, TableTools, result, search

LIMITS = Limits(max_turns=4, max_turn_tokens=50, max_episode_tokens=400, max_tool_calls=3, wall_seconds=5.0)


@pytest.fixture
def config(tmp_path):
    config = miniature.get_config().unlock()
    config.run_dir = str(tmp_path / "run")
    return config.lock()


def episode(*script, tools=None, on_event=None, question="What is the capital of Austria?"):
    asked = ask.task(question, "2026-06-01")
    return asyncio.run(
        run_episode(asked, ScriptedPolicy(*script), tools or TableTools(), LIMITS, on_event=on_event)
    ).trajectory


def screen(*script, tools=None):
    text = io.StringIO()
    episode(*script, tools=tools, on_event=ask.show(rich.console.Console(file=text, width=100)))
    return text.getvalue()


def test_the_terminal_shows_thoughts_calls_results_and_the_answer():
    shown = screen("<think>I search.</think>" + search("capital of Austria"), ANSWER)
    for expected in (
        "1. thinks",
        "I search.",
        "1. calls",
        "capital of Austria",
        "1. reads",
        "2. answers",
        "web_bakotefi",
    ):
        assert expected in shown


def test_a_page_cannot_steer_the_terminal_or_its_markup():
    shown = screen(search("x"), ANSWER, tools=TableTools({"x": result("\x1b[2J[red]owned[/red]\x07\n" * 20)}))
    assert "\x1b" not in shown and "\x07" not in shown
    assert "[red]owned[/red]" in shown and "8 more lines" in shown


def test_tool_errors_and_malformed_turns_are_marked():
    shown = screen("hm", search("x"), ANSWER, tools=TableTools({"x": result("HTTP 503", "tool_error")}))
    assert (
        "1. malformed turn (expected a <tool_call>" in shown and "   hm" in shown and "2. reads (tool error)" in shown
    )


def test_the_last_finished_stage_answers_and_absence_names_the_command(config, tmp_path):
    with pytest.raises(UserError, match="no trained checkpoint in .*seed0; run bash launch/quickstart.sh"):
        ask.choose_stage(config)
    for stage in ("midtrain1", "sft"):
        (tmp_path / "run" / "seed0" / stage).mkdir(parents=True)
        (tmp_path / "run" / "seed0" / stage / "done.json").write_text("{}")
    assert ask.choose_stage(config) == "sft"
    assert ask.choose_stage(config, "midtrain1") == "midtrain1"
    with pytest.raises(UserError, match="no finished ppo checkpoint"):
        ask.choose_stage(config, "ppo")
    with pytest.raises(UserError, match="--stage: expected one of midtrain1, midtrain2, sft, ppo, got 'rl'"):
        ask.choose_stage(config, "rl")


@pytest.mark.parametrize(
    ("question", "lang"),
    [
        ("What is it?", "en"),
        ("奥地利的首都是什么？", "zh"),
        ("Какая столица?", "en"),
        ("🜁🜂 ภาษาไทย", "en"),
        ("a\udcff b", "en"),
    ],
)
def test_a_question_in_any_script_is_asked(question, lang, config):
    asked = ask.task(ask.clean_question([question]), "2026-06-01")
    assert asked.lang == lang and asked.query.encode()
    assert ask.folder(config, asked, "ppo", 0) == ask.folder(config, asked, "ppo", 0)


def test_empty_questions_and_bad_dates_are_named():
    with pytest.raises(UserError, match="expected a question"):
        ask.clean_question(["  "])
    with pytest.raises(UserError, match="--as_of: expected a date"):
        ask.task("q", "tomorrow")


def test_the_pages_hold_the_answer_and_the_whole_episode(tmp_path):
    trajectory = episode(search("x"), ANSWER)
    markdown, html, record = ask.write(trajectory, "What is the capital of Austria?", tmp_path / "out")
    assert "The capital of Austria is Vienna." in markdown.read_text() and "atlas.test" in markdown.read_text()
    assert "The capital of Austria is Vienna." in html.read_text()
    assert Trajectory.model_validate_json(record.read_text()) == trajectory
    assert ask.summary(trajectory).startswith("answered; 2 turns, 1 tool calls, 1 passages read")
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="--out: expected a folder"):
        ask.write(trajectory, "q", tmp_path / "file" / "x")
    with pytest.raises(UserError, match="--out: expected a folder"):
        ask.write(trajectory, "q", tmp_path / "file")


def test_an_episode_without_an_answer_still_says_why(tmp_path):
    trajectory = episode(*["hm"] * 4)
    assert ask.summary(trajectory).startswith("no answer: the last turn was malformed")
    assert ask.write(trajectory, "q", tmp_path)[0].exists()


def test_a_checkpoint_answers_through_the_sampler_and_too_long_a_question_is_refused(config, monkeypatch):
    import jax

    from stepdr_jax.models import qwen2
    from stepdr_jax.tokens.tokenizer import Tokenizer
    from stepdr_jax.training import state

    config = config.copy_and_resolve_references().unlock()
    config.model.update(
        dict(hidden_size=16, num_layers=1, num_heads=2, num_kv_heads=1, head_dim=8, intermediate_size=16)
    )
    config.agent.update(dict(max_turn_tokens=8, max_episode_tokens=256, max_turns=2))
    tok = Tokenizer.train(["What is the capital of Austria? You are a research agent."] * 4, 320)
    tok.save(f"{config.run_dir}/tokenizer/tokenizer.json")
    shape = qwen2.Qwen2Config.from_config(config.model, tok.vocab_size)
    monkeypatch.setattr(state, "load_params", lambda *_: qwen2.init_params(shape, jax.random.key(0)))
    answerer = ask.trained_policy(config, "sft", "What?", "2026-06-01", 0.0)
    limits = Limits.from_config(config.agent)
    done = asyncio.run(run_episode(ask.task("What?", "2026-06-01"), answerer, TableTools(), limits))
    assert done.trajectory.finish.is_policy_outcome and done.trajectory.policy == "sft"
    assert done.log.sampled_count == done.trajectory.stats["sampled_tokens"] > 0
    with pytest.raises(UserError, match="the question takes .* tokens, this model's context has room for 240"):
        ask.trained_policy(config, "sft", "why " * 500, "2026-06-01", 0.0)
