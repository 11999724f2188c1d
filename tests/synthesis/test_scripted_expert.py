"""Facts about the offline expert: it answers from what it is shown, and recovers from what goes wrong."""

import asyncio
import random

import pytest

from configs.miniature import get_config
from stepdr_jax.agent.policy import EndpointPolicy
from stepdr_jax.errors import UserError
from stepdr_jax.records import Message
from stepdr_jax.synthesis.scripted import deep_search, reports, verification
from stepdr_jax.synthesis.scripted.expert import ScriptedExpert
from stepdr_jax.synthesis.scripted.style import Style
from stepdr_jax.synthesis.teacher import Teacher
from stepdr_jax.tokens import chat
from tests.synthesis import small_world

KNOWN = small_world.known()
AUTHORITY = {"atlas.test": 2, "quickfacts.test": 0}
ATLAS = "1. Austria | atlas.test | 2025-03-01\nThe capital of Austria is Graz. \\cite{web_bakotefi}"
QUICK = "2. Austria in numbers | quickfacts.test | 2019-05-04\nThe capital of Austria is Linz. \\cite{web_dufalomi}"


def fact():
    return deep_search.fact_task(KNOWN, "aut", "capital", "en", random.Random(0), "")[0]


def play(task, observations, **style):
    """Runs an expert against given observations; returns the expert and what it wrote, parsed."""
    expert = ScriptedExpert(task, AUTHORITY, Style(**style), bad_urls={"dead_link": "http://atlas.test/none"})
    turns = []

    async def run():
        session = expert.start([Message(role="user", content=task.query)], episode_id="e", seed=0)
        for observation in [*observations, ""]:
            turns.append(chat.parse_assistant((await session.act(96)).text))
            if turns[-1].answer is not None:
                break
            await session.observe([observation])
        await session.close()

    asyncio.run(run())
    return expert, turns


def test_the_answer_is_what_the_authoritative_passage_says_not_what_the_task_knows():
    _, turns = play(fact(), [f"{QUICK}\n{ATLAS}"])
    assert turns[0].tool_calls[0].arguments == {"queries": ["capital of Austria"]}
    assert turns[0].thought == "I search the capital of Austria."
    assert turns[1].answer == "The capital of Austria is Graz. \\cite{web_bakotefi}"


def test_only_an_unreliable_page_makes_it_search_again():
    _, turns = play(fact(), [QUICK, f"{QUICK}\n{ATLAS}"])
    assert "quickfacts.test is not reliable" in turns[1].thought and turns[1].tool_calls[0].arguments["topk"] == 4
    assert turns[2].answer.startswith("The capital of Austria is Graz.")


def test_nothing_found_is_said_and_not_made_up():
    _, turns = play(fact(), ["No results."] * 3)
    assert len(turns) == 4 and turns[-1].answer == "I could not find it."


@pytest.mark.parametrize("error", ["misspelt", "empty_query", "dead_link"])
def test_an_injected_error_is_marked_and_recovered_from(error):
    expert, turns = play(fact(), ["No results.", ATLAS], injected_error=error)
    assert expert.injected_turns == {0} and turns[1].tool_calls[0].arguments == {"queries": ["capital of Austria"]}
    assert turns[2].answer.startswith("The capital of Austria is Graz.")
    if error == "misspelt":
        ((wrong, right),) = expert.misspelt.items()
        assert right == "Austria" and turns[0].tool_calls[0].arguments == {"queries": [f"capital of {wrong}"]}


def test_a_hasty_answer_believes_the_unreliable_page():
    _, turns = play(fact(), [f"{ATLAS}\n{QUICK}"], injected_error="hasty")
    assert turns[1].answer == "The capital of Austria is Linz. \\cite{web_dufalomi}"


def test_a_long_page_is_read_to_its_stored_end():
    head = "Austria | http://atlas.test/en/austria | 2025-03-01\nNothing. \\cite{web_lomidufa}\n"
    page = head + "... 900 characters stored in results/p1.md; read with file"
    expert, turns = play(fact(), [ATLAS, page, "The capital of Austria is Graz. \\cite{web_bakotefi}"], open_page=True)
    assert turns[1].tool_calls[0].arguments == {"urls": ["web_bakotefi"]}
    assert turns[2].tool_calls[0].name == "file" and turns[2].tool_calls[0].arguments["path"] == "results/p1.md"
    assert turns[3].answer == "The capital of Austria is Graz. \\cite{web_bakotefi}"


def test_two_hops_go_through_the_country_that_was_found():
    facts = KNOWN.facts["aut", "capital", "en"], KNOWN.facts["aut", "currency", "en"]
    task, _ = deep_search.two_hop_task(KNOWN, *facts, random.Random(0), "")
    found = "1. Ruritania | atlas.test | 2025-03-01\nThe capital of Ruritania is Vienna. \\cite{web_bakotefi}"
    second = "1. Ruritania | atlas.test | 2025-03-01\nThe currency of Ruritania is the crown. \\cite{web_gedamuka}"
    _, turns = play(task, [found, second])
    assert turns[0].tool_calls[0].arguments == {"queries": ["country whose capital is Vienna"]}
    assert turns[1].tool_calls[0].arguments == {"queries": ["currency of Ruritania"]}
    assert turns[2].answer == "The currency of Ruritania is the crown. \\cite{web_gedamuka}"


def test_a_claim_is_compared_with_what_is_found():
    task, _ = verification.claim_task(KNOWN, "aut", "capital", "Graz", "en", random.Random(0), "")
    _, turns = play(task, [ATLAS])
    assert turns[1].answer == "Supported. The capital of Austria is Graz. \\cite{web_bakotefi}"


def test_a_report_searches_its_points_at_once_and_quotes_them_in_order():
    task, _ = reports.report_task(KNOWN, "aut", "zh", random.Random(0), "")
    topics = [step.query for step in task.plan]
    shown = "\n".join(
        f"query: {topic}\n1. 奥地利 | atlas.test | 2025-03-01\n{topic}是某{number}。 \\cite{{web_bakotef{letter}}}"
        for number, (topic, letter) in enumerate(zip(topics, "iu", strict=False))
    )
    _, turns = play(task, ["created", shown], todo=True)
    assert turns[0].tool_calls[0].arguments == {"items": topics}
    assert turns[1].tool_calls[0].arguments == {"queries": topics, "topk": 1}
    assert turns[2].answer.splitlines() == [
        "# 奥地利",
        f"{topics[0]}是某0。 \\cite{{web_bakotefi}}",
        f"{topics[1]}是某1。 \\cite{{web_bakotefu}}",
    ]
    assert reports.follows_plan(turns[2].answer, task)


def test_an_endpoint_takes_the_experts_place_and_needs_a_model():
    config = get_config()

    def scripted(task, style, seed):
        return ScriptedExpert(task, {}, style, seed=seed)

    assert isinstance(Teacher(config, scripted)(fact(), Style(), 0), ScriptedExpert)
    with config.unlocked():
        config.teacher.endpoint = "http://127.0.0.1:1/v1"
    with pytest.raises(UserError, match="teacher.model"):
        Teacher(config, scripted)
    with config.unlocked():
        config.teacher.model = "m"
    assert isinstance(Teacher(config, scripted)(fact(), Style(), 0), EndpointPolicy)
