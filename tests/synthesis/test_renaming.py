"""Facts about renaming: consistent, complete, and never a held-out name."""

import random
import re

from stepdr_jax.records import Finish, Message, ObservedSource, ToolCall, Trajectory
from stepdr_jax.synthesis import renaming
from stepdr_jax.tokens import chat

NAMES = {"Austria": "country", "Vienna": "city", "Guinea": "country", "Equatorial Guinea": "country", "维也纳": "city"}


def episode():
    call = {"queries": ["capital of Austria"]}
    passage = "The capital of Austria is Vienna."
    return Trajectory(
        id="t",
        task_id="k",
        policy="expert",
        finish=Finish.ANSWERED,
        answer=passage + r" \cite{web_bakotefi}",
        messages=[
            Message(role="system", content="You are a research agent. Today is 2026-06-01."),
            Message(role="user", content="What is the capital of Austria?"),
            Message(
                role="assistant",
                content=chat.tool_call_text("batch_web_surfer", call),
                tool_calls=[ToolCall(id="0.0", name="batch_web_surfer", arguments=call)],
            ),
            Message(
                role="tool",
                content=f"1. Austria | atlas.test | 2025-03-01\n{passage} \\cite{{web_bakotefi}}\n"
                "http://flaky.test/en/austria: HTTP 503\nThe population of Austria is 8527230.",
                tool_call_id="0.0",
                sources=[
                    ObservedSource(id="web_bakotefi", url="http://atlas.test/en/austria", text=passage, authority=2)
                ],
            ),
            Message(role="assistant", content=f"<answer>{passage} \\cite{{web_bakotefi}}</answer>"),
        ],
    )


def renamed(seed=0):
    return renaming.Renamer(NAMES).rename(episode(), random.Random(seed))


def test_names_numbers_and_ids_change_together_everywhere():
    copy = renamed()
    text = copy.model_dump_json()
    for old in ("Austria", "austria", "Vienna", "8527230", "web_bakotefi"):
        assert old not in text
    subject = re.fullmatch(r"What is the capital of (.+)\?", copy.messages[1].content).group(1)
    assert copy.messages[2].tool_calls[0].arguments == {"queries": [f"capital of {subject}"]}
    assert chat.parse_assistant(copy.messages[2].content).tool_calls[0].arguments == {
        "queries": [f"capital of {subject}"]
    }
    assert f"1. {subject} | atlas.test | 2025-03-01\nThe capital of {subject} is" in copy.messages[3].content
    assert copy.messages[3].sources[0].url.startswith("http://atlas.test/en/")
    source = copy.messages[3].sources[0]
    assert copy.answer == f"{source.text} \\cite{{{source.id}}}"
    assert copy.messages[4].content == f"<answer>{copy.answer}</answer>"
    assert source.authority == 2 and copy.finish == Finish.ANSWERED


def test_dates_codes_hosts_and_call_ids_stay():
    copy = renamed()
    assert copy.messages[0].content == episode().messages[0].content
    assert "HTTP 503" in copy.messages[3].content
    assert copy.messages[2].tool_calls[0].id == copy.messages[3].tool_call_id == "0.0"


def test_a_seed_gives_one_copy_and_seeds_differ():
    assert renamed(1) == renamed(1)
    assert renamed(1).answer != renamed(2).answer


def test_a_name_inside_a_longer_one_is_not_touched():
    renamer = renaming.Renamer(NAMES)
    assert sorted(renamer.names_in("Equatorial Guinea")) == ["Equatorial Guinea", "Guinea"]
    row = {"text": "Equatorial Guinea borders no Guinean town. Guinea is far.\nGuinea"}
    text = renamer.rename_row(row, random.Random(0))["text"]
    assert "Guinean" in text and "Equatorial" not in text
    assert re.fullmatch(r"(.+) borders no Guinean town\. (.+) is far\.\n\2", text)


def test_swapped_names_come_from_the_pool_of_their_kind():
    renamer = renaming.Renamer(NAMES, {("city", "en"): ["Graz"], ("city", "zh"): ["格拉茨"]})
    row = renamer.rename_row({"text": "Vienna, 维也纳"}, random.Random(0), swap_share=1.0)
    assert row["text"] == "Graz, 格拉茨"


def test_masking_touches_hidden_names_only():
    renamer = renaming.Renamer(NAMES)
    row = {"text": r"Austria and Vienna 12 \cite{web_bakotefi}"}
    masked = renamer.mask(row, random.Random(0), {"Vienna"})["text"]
    assert masked.startswith("Austria and ") and masked.endswith(r" 12 \cite{web_bakotefi}") and "Vienna" not in masked
    assert renamer.mask(row, random.Random(0), {"Graz"}) is row


def test_a_misspelling_stays_a_misspelling_of_the_new_name():
    row = {"text": "Autsria Austria", "metadata": {"misspelt": {"Autsria": "Austria"}}}
    copy = renaming.Renamer(NAMES).rename_row(row, random.Random(3))
    ((wrong, right),) = copy["metadata"]["misspelt"].items()
    assert copy["text"] == f"{wrong} {right}" and wrong != right and "Austria" not in copy["text"]


def test_invented_names_are_varied_and_pronounceable():
    rng = random.Random(0)
    english = {renaming.invented_name(rng) for _ in range(1000)}
    chinese = {renaming.invented_name(rng, "zh") for _ in range(1000)}
    assert len(english) > 950 and len(chinese) > 900
    assert all(re.fullmatch(r"[A-Z][a-z]+( [A-Z][a-z]+)?", name) for name in english)
    assert {len(name) for name in chinese} == {2, 3, 4}
    assert all(re.search("[aeiouy]", word.lower()) for name in english for word in name.split())
    assert re.fullmatch(r"web_([bdfghjklmnprstvz][aeiou]){4}", renaming.citation_id(rng))
