"""Facts about what is kept: every rule, and the exact share of recoveries."""

import json
import random
from pathlib import Path

import pytest

from stepdr_jax.records import Finish, PlanStep, Verdict
from stepdr_jax.synthesis import cleaning, plan_alignment, reflection
from stepdr_jax.synthesis.scripted import tasks
from tests.synthesis.episodes import PASSAGE, TASK, episode, search, shown

DATA = Path(__file__).parents[3] / "shared" / "data"
GOOD = Verdict(reward=1.0, judgments=[], correct=True, cited=True)


def reason(trajectory, verdict=GOOD, task=TASK):
    return cleaning.drop_reason(task, trajectory, verdict, tasks.answer_fault)


def test_a_plain_good_episode_stays():
    assert reason(episode()) is None


@pytest.mark.parametrize(
    "trajectory, verdict, expected",
    [
        (episode(finish=Finish.MAX_TURNS), GOOD, "ended as max_turns"),
        (episode(), GOOD.model_copy(update={"correct": False}), "incorrect"),
        (episode(), GOOD.model_copy(update={"reward": None}), "judge failed"),
        (episode(), Verdict(reward=0.6, judgments=[]), "incorrect"),  # an open task without the full reward
        (episode(answer=PASSAGE), GOOD, "uncited"),
        (episode(answer=PASSAGE + r" \cite{web_zzzzzzzz}"), GOOD, "unresolved citation"),
        (episode(answer="# Austria \\cite{web_bakotefi}\n" + PASSAGE), GOOD, "citation in a heading"),
        (
            episode(*[m for t in range(3) for m in (search(t, "capital of Austria"), shown(t))]),
            GOOD,
            "same call repeated",
        ),
        (episode(search(0, "capital of Austria", "I look. " * 5), shown(0)), GOOD, "same sentence repeated"),
        (episode(search(0, "capital of Austria 2024"), shown(0)), GOOD, "wrong time anchor"),
        (episode(search(0, "capital of Austria", "我先搜索一下奥地利的首都是哪里"), shown(0)), GOOD, "mixed languages"),
        (episode(search(0, "capital of Austria", "You told me to look again."), shown(0)), GOOD, "induction trace"),
        (episode(search(0, "capital of Austria", "It is Vienna."), shown(0)), GOOD, "answer before evidence"),
    ],
)
def test_every_rule_names_what_it_drops(trajectory, verdict, expected):
    assert reason(trajectory, verdict) == expected


def test_a_year_is_wrong_only_when_nobody_named_it():
    dated = TASK.model_copy(update={"query": "What was the capital of Austria in 2024?"})
    messages = [search(0, "capital of Austria 2024")]
    assert cleaning.wrong_time_anchor(TASK.query, messages, "2026-06-01")
    assert cleaning.wrong_time_anchor(dated.query, messages, "2026-06-01") is None
    assert cleaning.wrong_time_anchor(TASK.query, [shown(0, "Page of 2024"), *messages], "2026-06-01") is None
    assert cleaning.wrong_time_anchor(TASK.query, [search(0, "Vienna 1683")], "2026-06-01") is None
    assert cleaning.wrong_time_anchor(TASK.query, [search(0, "x", "the simulated date is")], "2026-06-01")


@pytest.mark.parametrize(
    "text, lang, mixed",
    [
        ("奥地利的首都是维也纳。", "zh", False),
        ("奥地利的 capital 是 Vienna，please check。", "zh", True),
        ("OpenAI 在 2024 年发布了 GPT-4o，奥地利的首都是维也纳，货币是欧元，语言是德语。", "zh", False),
        ("The capital of Austria is Vienna.", "en", False),
        ("The capital 首都 of Austria is Vienna.", "en", True),
        (r"quickfacts.test不可靠。我再查奥地利的首都。\cite{web_bakotefi}", "zh", False),
        ("", "en", False),
    ],
)
def test_languages_are_told_apart_from_names(text, lang, mixed):
    assert cleaning.mixed_language(text, lang) is mixed


def many(tasks, recovered):
    """Tasks with a clean episode each; the first `recovered` of them also have one with an empty result."""
    rows = []
    for number in range(tasks):
        task = TASK.model_copy(update={"id": f"k{number:03d}"})
        rows.append(episode(id=f"clean{number}", task=task))
        if number < recovered:
            turns = (
                search(0, "capital of Autsria"),
                shown(0, "No results.", ()),
                search(1, "capital of Austria"),
                shown(1),
            )
            rows.append(episode(*turns, id=f"noisy{number}", task=task))
    return rows


def test_the_share_of_recoveries_is_exact_and_one_episode_stays_per_task():
    rows = many(100, 30)
    cleaning.select_episodes(rows, 0.08, random.Random(0))
    kept = [row for row in rows if row.kept]
    assert len(kept) == len({row.task_id for row in kept}) == 100
    assert sum(cleaning.has_recovery(row) for row in kept) == 8
    assert all(row.drop_reason for row in rows if not row.kept)


def test_too_few_recoveries_are_all_kept():
    rows = many(50, 2)
    cleaning.select_episodes(rows, 0.1, random.Random(0))
    assert sum(cleaning.has_recovery(row) for row in rows if row.kept) == 2


def test_the_shortest_correct_episode_stays():
    long = episode(search(0, "Austria"), shown(0), search(1, "capital of Austria"), shown(1), id="long")
    rows = [long, episode(id="short")]
    cleaning.select_episodes(rows, 0.0, random.Random(0))
    assert [row.id for row in rows if row.kept] == ["short"]
    assert long.drop_reason == "longer than another correct episode"


def test_plan_alignment_measures_coverage_order_and_strays():
    plan = [PlanStep(goal="a", query="capital of Austria"), PlanStep(goal="b", query="currency of Austria")]
    both = episode(search(0, "capital of Austria"), shown(0), search(1, "currency of Austria"), shown(1))
    assert plan_alignment.alignment(plan, both) == plan_alignment.Alignment(1.0, 1.0, 0.0)
    swapped = episode(search(0, "currency of Austria"), shown(0), search(1, "capital of Austria"), shown(1))
    assert plan_alignment.alignment(plan, swapped).order == 0.5
    stray = episode(search(0, "capital of Austria"), shown(0), search(1, "weather"), shown(1))
    assert plan_alignment.alignment(plan, stray) == plan_alignment.Alignment(0.5, 0.5, 0.5)
    assert not plan_alignment.alignment(plan, stray).consistent


def test_induction_is_removed_from_thoughts_and_never_from_calls():
    call = '<tool_call>\n{"name": "x", "arguments": {"q": "you told"}}\n</tool_call>'
    text = f"<think>According to the hint I was wrong. I check again.</think>\n{call}"
    cleaned = reflection.remove_induction(text)
    assert cleaned.startswith("<think>I check again.</think>") and '"you told"' in cleaned
    assert (
        reflection.remove_induction("<think>根据用户的提示，我错了。再查一次。</think>") == "<think>再查一次。</think>"
    )


def standard_episodes():
    paths = sorted(DATA.glob("adp_samples/*_std.json"))
    if not paths:
        pytest.skip("../shared/data/adp_samples is absent")
    for path in paths:
        for row in json.loads(path.read_text()):
            yield [item for item in row["content"] if item.get("class_") == "message_action"]


def test_real_agent_texts_do_not_look_degenerate():
    texts = [item["content"] for episode_ in standard_episodes() for item in episode_ if len(item["content"]) > 80]
    assert texts
    from stepdr_jax.text import repetition

    flagged = [text for text in texts if repetition.degenerate_reason(text)]
    assert len(flagged) <= 0.05 * len(texts)


def test_real_requests_are_in_one_language():
    path = DATA / "deep_research_bench" / "query.jsonl"
    if not path.exists():
        pytest.skip("../shared/data/deep_research_bench is absent")
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    flagged = [row for row in rows if cleaning.mixed_language(row["prompt"], row["language"])]
    assert len(rows) == 100 and len(flagged) <= 15  # technical requests quote English terms
