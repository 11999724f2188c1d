"""Facts about two-step rubric synthesis."""

import dataclasses
import random

from stepdr_jax.synthesis import rubrics
from stepdr_jax.synthesis.scripted import deep_search, reports, verification
from tests.synthesis import small_world

KNOWN = small_world.known()
AS_OF = "2026-06-01"


def fact(query=None, **changes):
    task, brief = deep_search.fact_task(KNOWN, "aut", "capital", "en", random.Random(0), AS_OF)
    if query:
        task = task.model_copy(update={"query": query})

    return task, dataclasses.replace(
        brief, asks_sources=rubrics.SOURCE_REQUEST.search(task.query) is not None, **changes
    )


def roles(rubric_set):
    return {r.check["kind"]: (r.role, r.weight) for r in rubric_set.rubrics}


def test_a_fact_asks_for_its_value_and_lets_good_form_be_implicit():
    rubric_set = rubrics.synthesize_rubrics(*fact("What is the capital of Austria?"))
    assert rubric_set.kept
    assert roles(rubric_set) == {
        "states": ("explicit", 5),
        "cites_support": ("implicit", 3),
        "states_wrong": ("negative", -2),
        "authoritative": ("implicit", 2),
        "unresolved_citation": ("negative", -3),
        "degenerate": ("negative", -2),
    }
    assert rubric_set.consistency["spans"] == {"r1": "capital"}


def test_sources_asked_for_make_citing_explicit():
    rubric_set = rubrics.synthesize_rubrics(*fact("What is the capital of Austria? Cite the source."))
    assert rubric_set.kept and roles(rubric_set)["cites_support"] == ("explicit", 3)


def test_a_role_that_the_task_does_not_bear_out_discards_the_sample():
    task, brief = fact("What do you know of Austria?")
    rubric_set = rubrics.synthesize_rubrics(task, brief)
    assert not rubric_set.kept and rubric_set.drop_reason == "roles disagree"
    assert rubric_set.consistency["disagreement"]["r1"][:2] == ["explicit", "implicit"]


def test_a_hidden_entity_that_the_task_names_discards_the_sample():
    task, brief = deep_search.two_hop_task(
        KNOWN, KNOWN.facts["aut", "capital", "en"], KNOWN.facts["aut", "currency", "en"], random.Random(0), AS_OF
    )
    assert rubrics.synthesize_rubrics(task, brief).kept
    leaky = task.model_copy(update={"query": task.query + " It is Austria."})
    assert not rubrics.synthesize_rubrics(leaky, brief).kept


def test_a_value_both_wanted_and_punished_discards_the_sample():
    task, brief = fact("What is the capital of Austria?")
    point = rubrics.Point("capital of Austria", ("capital",), "Austria", accepted=("Vienna",), wrong=("Vienna",))

    rubric_set = rubrics.synthesize_rubrics(task, dataclasses.replace(brief, points=(point,)))
    assert rubric_set.drop_reason == "rubrics contradict"


def test_every_kind_and_language_passes_its_own_check():
    rng = random.Random(1)
    for lang in ("en", "zh"):
        made = [
            deep_search.fact_task(KNOWN, "che", "language", lang, rng, AS_OF),
            deep_search.two_hop_task(
                KNOWN, KNOWN.facts["hun", "calling_code", lang], KNOWN.facts["hun", "currency", lang], rng, AS_OF
            ),
            reports.report_task(KNOWN, "aut", lang, rng, AS_OF),
            verification.claim_task(KNOWN, "aut", "capital", "Budapest", lang, rng, AS_OF),
        ]
        for task, brief in made:
            rubric_set = rubrics.synthesize_rubrics(task, brief)
            assert rubric_set.kept, (task.query, rubric_set.consistency)
            assert all((r.weight < 0) == (r.role == "negative") for r in rubric_set.rubrics)
