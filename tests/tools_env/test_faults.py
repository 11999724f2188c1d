"""Facts about injected faults: what each kind does, that draws repeat, and that a wrong profile is named."""

import asyncio
import json

import pytest

from tools_env.client import ToolInfraError
from tools_env.errors import BadArguments
from tools_env.service import faults

AUSTRIA = {"queries": ["capital of Austria"]}


def ask(running, rows, *, calls=(AUSTRIA,), timeout=None, **opening):
    async def main():
        async with running() as it:
            profile = {"seed": 3, "tools": {"batch_web_surfer": rows}}
            session = await it.client.open_session("e", faults=profile, **opening)
            return [
                await session.call("batch_web_surfer", call, call_id=str(i), timeout=timeout)
                for i, call in enumerate(calls)
            ]

    return asyncio.run(main())


@pytest.mark.parametrize(
    "row, outcome, text",
    [
        ({"kind": "http_error", "status": 502}, "tool_error", "HTTP 502"),
        ({"kind": "timeout", "seconds": 0.01}, "tool_error", "timed out"),
        ({"kind": "empty"}, "ok", "No results."),
    ],
)
def test_fault_replaces_the_result_and_is_named_apart_from_the_text(running, row, outcome, text):
    (result,) = ask(running, [row])
    assert (result.outcome, result.text, result.faults) == (outcome, text, (row["kind"],))
    assert result.sources == ()


def test_injected_timeout_is_an_outcome_also_when_the_deadline_is_nearer(running):
    (result,) = ask(running, [{"kind": "timeout", "seconds": 60}], timeout=0.4)
    assert (result.outcome, result.text) == ("tool_error", "timed out")


def test_latency_beyond_the_deadline_is_an_infrastructure_error(running):
    with pytest.raises(ToolInfraError, match="DEADLINE_EXCEEDED"):
        ask(running, [{"kind": "latency", "seconds": 60}], timeout=0.3)


def test_truncated_text_is_a_prefix_and_keeps_only_the_sources_it_shows(running):
    (whole,) = ask(running, [])
    (cut,) = ask(running, [{"kind": "truncate", "keep": 0.6}])
    assert whole.text.startswith(cut.text) and len(cut.text) == int(0.6 * len(whole.text))
    assert len(cut.sources) == 1 and len(whole.sources) == 2 and whole.faults == ()


def test_renamed_field_is_refused_under_its_old_name_and_works_under_the_new(running):
    rows = [{"kind": "rename_fields", "fields": {"queries": "q"}}]
    old, new = ask(running, rows, calls=(AUSTRIA, {"q": AUSTRIA["queries"]}))
    assert (old.outcome, old.text) == ("bad_arguments", "unknown field queries; the fields are q, topk, urls")
    assert new.outcome == "ok" and "Vienna" in new.text


def test_contradiction_adds_a_citable_passage_that_says_otherwise(running):
    (result,) = ask(running, [{"kind": "contradiction"}])
    true, *_, twin = result.sources
    assert true.text in result.text and f"{twin.text} \\cite{{{twin.id}}}" in result.text
    assert twin.text != true.text and twin.id not in {s.id for s in result.sources[:-1]}
    assert any(s.text.startswith("The capital of Austria is ") and "Vienna" not in s.text for s in result.sources)


def test_draws_repeat_for_equal_seeds_and_call_ids_whatever_the_order():
    profile = faults.parse_fault_profile(
        json.dumps({"seed": 1, "tools": {"*": [{"kind": "empty", "rate": 0.3}]}}), ["file"]
    )
    drawn = {i: bool(profile.plan("file", 5, str(i)).chosen) for i in range(1000)}
    again = {i: bool(profile.plan("file", 5, str(i)).chosen) for i in reversed(range(1000))}
    other = {i: bool(profile.plan("file", 6, str(i)).chosen) for i in range(1000)}
    assert drawn == again and drawn != other
    assert 240 < sum(drawn.values()) < 360


def test_renamed_field_stays_renamed_for_the_whole_session():
    row = {"kind": "rename_fields", "rate": 0.5, "fields": {"op": "verb"}}
    profile = faults.parse_fault_profile(json.dumps({"tools": {"file": [row]}}), ["file"])
    drawn = [{bool(profile.plan("file", seed, str(call)).chosen) for call in range(20)} for seed in range(20)]
    assert {len(of_session) for of_session in drawn} == {1} and drawn.count({True}) not in (0, 20)


@pytest.mark.parametrize(
    "text, message",
    [
        ("{", "faults must be"),
        ("[]", "faults must be"),
        ('{"tools": {"shel": []}}', "faults name no tool of this host: shel; the tools are file"),
        ('{"tools": {"file": [{"kind": "fire"}]}}', "faults of file, entry 0: kind must be one of latency"),
        ('{"tools": {"file": [{"kind": "empty", "seconds": 1}]}}', "empty has no setting seconds; it has rate"),
        ('{"tools": {"file": [{"kind": "empty", "rate": 2}]}}', "rate must be a number from 0 to 1, got 2"),
        ('{"tools": {"file": [{"kind": "latency", "seconds": true}]}}', "seconds must be a number"),
        ('{"tools": {"file": [{"kind": "rename_fields"}]}}', "fields must be"),
    ],
)
def test_wrong_profile_is_named(text, message):
    with pytest.raises(BadArguments, match=message):
        faults.parse_fault_profile(text, ["file"])


def test_wrong_profile_is_refused_when_the_session_opens(running):
    async def main():
        async with running() as it:
            with pytest.raises(ToolInfraError, match="INVALID_ARGUMENT: faults of todo, entry 0"):
                await it.client.open_session("e", faults={"tools": {"todo": [{"kind": "x"}]}})
            with pytest.raises(ToolInfraError, match="INVALID_ARGUMENT: cache_mode must be one of"):
                await it.client.open_session("e", cache_mode="sometimes")

    asyncio.run(main())
