"""Facts about synthetic documents: it can be read, it is copying, and it says nothing about held-out countries."""

import re

from stepdr_jax.synthesis.scripted import synthetic_documents
from stepdr_jax.text.citations import cited_ids
from stepdr_jax.text.matching import states_value
from tests.synthesis import small_world

KNOWN = small_world.known(0.2)
ROWS = list(synthetic_documents.document_rows(KNOWN, copies=3, chinese_share=0.25, seed=0))


def test_every_component_is_there_in_its_proportion():
    countries = len(KNOWN.countries) - len(KNOWN.heldout)
    for component, count in synthetic_documents.ROWS.items():
        assert sum(row["component"] == component for row in ROWS) == countries * 4 * count
    assert len({row["id"] for row in ROWS}) == len(ROWS)
    share = sum(row["lang"] == "zh" for row in ROWS) / len(ROWS)
    assert 0.18 < share < 0.32


def test_rows_are_reproducible():
    assert list(synthetic_documents.document_rows(KNOWN, copies=1, chinese_share=0.25, seed=0)) == list(
        synthetic_documents.document_rows(KNOWN, copies=1, chinese_share=0.25, seed=0)
    )
    assert ROWS[0] != next(synthetic_documents.document_rows(KNOWN, copies=1, chinese_share=0.25, seed=1))


def test_nothing_private_to_held_out_countries_is_read():
    for row in ROWS:
        text = row["prompt"] + row["completion"]
        assert not any(states_value(text, name) for name in KNOWN.private), row


def test_citations_and_figures_of_a_completion_stand_in_its_prompt():
    for row in ROWS:
        assert set(cited_ids(row["completion"])) <= set(cited_ids(row["prompt"])), row
        if row["component"] != "dialogue":
            assert all(number in row["prompt"] for number in re.findall(r"\d{3,}", row["completion"])), row


def test_rows_are_short_and_formed_as_the_mixtures_expect():
    for row in ROWS:
        assert set(row) - {"chat"} == {"id", "component", "capability", "lang", "loss", "prompt", "completion"}
        assert row["loss"] in ("all", "completion") and row["prompt"] and row["completion"]
        assert len(row["prompt"] + row["completion"]) < 1500


def test_real_facts_are_read_once_and_invented_entities_elsewhere():
    real = {KNOWN.facts["aut", "capital", "en"].sentence, KNOWN.facts["aut", "currency", "en"].sentence}
    about = [row for row in ROWS if any(sentence in row["prompt"] for sentence in real)]
    assert about and {row["component"] for row in about} & {"synthetic_knowledge"} == set()
