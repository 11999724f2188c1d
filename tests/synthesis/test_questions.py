"""Facts about questions: unique, without their answer in them, and split by entity."""

import dataclasses
import random

import pytest

from stepdr_jax.records import Link
from stepdr_jax.synthesis.scripted import deep_search, knowledge, reports, tasks, verification
from stepdr_jax.text.matching import states_value
from tests.synthesis import small_world

KNOWN = small_world.known()


def two_hop(clue, asked, country="aut", lang="en"):
    return deep_search.two_hop_task(
        KNOWN, KNOWN.facts[country, clue, lang], KNOWN.facts[country, asked, lang], random.Random(0), "2026-06-01"
    )


def test_knowledge_comes_from_authoritative_pages_and_contradictions_from_the_others():
    assert KNOWN.facts["aut", "capital", "en"].value == "Vienna"
    assert [fact.value for fact in KNOWN.wrong["aut", "capital", "en"]] == ["Budapest"]
    assert KNOWN.kinds["Vienna"] == "city" and KNOWN.kinds["Western Europe"] == "region"


def test_the_split_is_by_entity_and_reproducible():
    ids = [f"c{i}" for i in range(50)]
    held = knowledge.split_entities(ids, 0.2, 0)
    assert len(held) == 10 and held == knowledge.split_entities(reversed(ids), 0.2, 0)
    assert held != knowledge.split_entities(ids, 0.2, 1)
    assert knowledge.split_entities(ids, 0.0, 0) == frozenset()


def test_names_that_give_held_out_answers_away_are_private():
    known = small_world.known(0.2)
    country = known.countries[next(iter(known.heldout))]
    assert {country.en, country.zh, known.facts[country.id, "capital", "en"].value} <= known.private
    pool = [name for names in known.renamer()._swap.values() for name in names]
    assert pool and not known.private & set(pool)


@pytest.mark.parametrize("lang", ["en", "zh"])
def test_a_two_hop_question_hides_the_country_and_the_answer(lang):
    task, brief = two_hop("capital", "currency", lang=lang)
    assert not states_value(task.query, brief.hidden_entity)
    assert not states_value(task.query, task.answer.value)
    assert states_value(task.query, KNOWN.facts["aut", "capital", lang].value)
    assert [t.relation for t in task.facts] == ["capital", "currency"]
    assert task.plan[1].depends_on == [0]


def test_an_ambiguous_clue_makes_no_question():
    assert two_hop("currency", "capital") is None  # the euro has two countries here


def test_a_question_that_contains_its_answer_is_not_made():
    assert two_hop("capital", "capital") is None


def test_lists_want_every_element():
    task, _ = deep_search.fact_task(KNOWN, "che", "language", "en", random.Random(0), "")
    assert task.answer.type == "list" and task.answer.value == "German; French"


def test_a_claim_is_refuted_or_supported_by_the_authoritative_fact():
    for value, verdict in (("Budapest", "refuted"), ("Vienna", "supported"), ("vienna", "supported")):
        task, _ = verification.claim_task(KNOWN, "aut", "capital", value, "en", random.Random(0), "")
        assert task.answer.value == verdict


def test_pages_are_taken_apart_into_typed_points():
    document = next(d for d in small_world.documents() if d.id == "quickfacts:aut")
    points = verification.extract_points(document)
    assert [p.type for p in points] == ["place", "data"]
    assert verification.points_to_check(points, document.authority) == points
    assert verification.points_to_check(points, 2) == []


def test_a_report_is_reverse_engineered_from_a_page_in_its_order():
    task, brief = reports.report_task(KNOWN, "aut", "en", random.Random(0), "")
    order = KNOWN.relations("aut", "en")
    relations = task.metadata["relations"]
    page = KNOWN.pages["aut", "en"][0].text
    positions = [page.index(KNOWN.facts["aut", r, "en"].sentence) for r in relations]
    assert positions == sorted(positions) and set(relations) <= set(order)
    assert [step.query for step in task.plan] == [f"{r.replace('_', ' ')} of Austria" for r in relations]
    assert not any(states_value(task.query, p.accepted[0]) for p in brief.points if p.accepted)


def test_the_page_gives_no_more_points_than_it_has():
    document = next(d for d in small_world.documents() if d.id == "quickfacts:aut")
    project = reports.reverse_engineer(document, random.Random(0), subject="Austria", relations=["capital"], size=3)
    assert project.relations == ("capital",)


def draw(**changes):
    known = small_world.known(0.2)
    settings = dict(
        tasks_per_entity=10,
        heldout_tasks=8,
        kind_weights=dict(fact=0.5, deep_search=0.2, verification=0.1, report=0.2),
        chinese_share=0.3,
        seed=0,
        as_of="2026-06-01",
        hops={
            c: [(known.facts[c, "capital", lang], known.facts[c, "calling_code", lang]) for lang in ("en", "zh")]
            for c in known.countries
        },
        walks={},
    )
    return known, tasks.draw_tasks(known, **(settings | changes))


def test_tasks_are_drawn_reproducibly_and_without_repetition():
    known, drawn = draw()
    assert [d.task for d in drawn] == [d.task for d in draw()[1]]
    assert len({d.task.id for d in drawn}) == len({d.task.query for d in drawn}) == len(drawn)
    assert [d.task for d in draw(seed=1)[1]] != [d.task for d in drawn]
    for item in drawn:
        assert (item.task.split == "heldout") == (item.task.entity in known.heldout)
        assert item.task.rubric_set_id == item.rubric_set.id
    kinds = {d.task.kind for d in drawn}
    assert kinds == {"fact", "deep_search", "verification", "report"}


def test_no_training_question_names_a_held_out_country():
    known, drawn = draw()
    for item in drawn:
        if item.task.split == "train":
            assert not any(states_value(item.task.query, name) for name in known.private)


def test_a_walk_ends_at_a_page_that_an_episode_can_hold():
    documents = small_world.documents()
    by_url = {document.url: document for document in documents}
    austria, hungary = "http://atlas.test/en/austria", "http://atlas.test/en/hungary"
    by_url[austria].links.append(Link(anchor="Hungary", url=hungary))
    found = deep_search.link_walks(KNOWN, documents, max_chars=2000, page_chars=700, seed=0)
    every = [walk for walks in found.values() for walk in walks]
    assert every
    for walk in every:
        assert walk.urls in {(u,) for u in by_url} | {(austria, hungary)}
        task, _ = deep_search.walk_task(KNOWN, walk, random.Random(0), "")
        assert walk.urls[0] in task.query and task.kind == "doc_walk"
        assert walk.fact.sentence in by_url[walk.urls[-1]].text
    assert deep_search.link_walks(KNOWN, documents, max_chars=50, page_chars=700, seed=0) == {}


def test_a_question_that_holds_its_answer_is_not_asked():
    named = KNOWN.facts["aut", "capital", "en"]

    facts = KNOWN.facts | {("aut", "capital", "en"): dataclasses.replace(named, value="Austria", values=("Austria",))}
    known = dataclasses.replace(KNOWN, facts=facts)
    assert deep_search.fact_task(known, "aut", "capital", "en", random.Random(0), "") is None
