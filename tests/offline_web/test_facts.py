"""What the offline web states is real, complete and consistent."""

import collections

import pytest

from tools_env.offline_web.facts import RELATIONS, slug


def value(facts, country: str, relation: str, lang: str = "en"):
    return facts.entities[country].values[relation].items(lang)


def test_a_known_country_has_its_facts_in_both_languages(facts):
    austria = facts.entities["aut"]
    assert (austria.en, austria.zh) == ("Austria", "奥地利")
    assert {r: v.en for r, v in austria.values.items()} == {
        "capital": ("Vienna",),
        "currency": ("euro",),
        "language": ("German",),
        "region": ("Western Europe",),
        "population": ("8527230",),
        "area": ("83871",),
        "neighbour": (
            "Czechia",
            "Germany",
            "Hungary",
            "Italy",
            "Liechtenstein",
            "Slovakia",
            "Slovenia",
            "Switzerland",
        ),
        "calling_code": ("43",),
        "demonym": ("Austrian",),
    }
    assert austria.values["capital"].zh == ("维也纳",)
    assert austria.values["capital"].ids == ("city:vienna",)
    assert austria.values["currency"].ids == ("currency:eur",)
    assert austria.values["language"].ids == ("language:de",)
    assert austria.values["region"].ids == ("region:western_europe",)


@pytest.mark.parametrize(
    ("country", "relation", "lang", "expected"),
    [
        ("che", "currency", "en", ("Swiss franc",)),
        ("che", "currency", "zh", ("瑞士法郎",)),
        ("bgr", "currency", "en", ("euro",)),
        ("hrv", "currency", "en", ("euro",)),
        ("kaz", "capital", "en", ("Astana",)),
        ("bra", "capital", "zh", ("巴西利亚",)),
        ("usa", "capital", "en", ("Washington",)),
        ("srb", "language", "en", ("Serbian",)),
        ("abw", "language", "en", ("Dutch", "Papiamento")),
        ("vat", "area", "en", ("0.49",)),
        ("kwt", "neighbour", "en", ("Iraq", "Saudi Arabia")),
    ],
)
def test_spot_checks(facts, country, relation, lang, expected):
    assert value(facts, country, relation, lang) == expected


def test_former_states_and_uninhabited_places_are_absent(facts):
    assert not {"scg", "ant", "ata", "hmd", "bvt"} & set(facts.entities)
    assert 200 <= len(facts.of_kind("country")) <= 240


def test_every_country_has_what_questions_need(facts):
    for country in facts.of_kind("country"):
        assert {"currency", "language", "region", "population", "calling_code"} <= set(country.values), country.id
        assert set(country.values) <= set(RELATIONS)
        assert country.zh and not country.zh.isascii(), country.id


def test_values_are_clean_text(facts):
    for country in facts.of_kind("country"):
        for relation, held in country.values.items():
            assert len(held.en) == len(held.zh) and len(held.ids) in (0, len(held.en))
            for item in (*held.en, *held.zh):
                assert item == item.strip() and item and "(2" not in item and not item.endswith("."), (
                    country.id,
                    relation,
                )


def test_neighbours_are_mutual(facts):
    near = {c.id: set(c.values["neighbour"].ids) for c in facts.of_kind("country") if "neighbour" in c.values}
    assert all(country in near[other] for country, others in near.items() for other in others)


def test_slugs_are_unique_within_a_kind(facts):
    slugs = collections.Counter((entity.kind, entity.slug) for entity in facts.entities.values())
    assert [key for key, count in slugs.items() if count > 1] == []
    assert slug("São Tomé & Príncipe") == "sao_tome_and_principe"


def test_two_cities_of_one_name_are_two_entities(facts):
    kingstons = [city.id for city in facts.of_kind("city") if city.en == "Kingston"]
    assert kingstons == ["city:kingston_jamaica", "city:kingston_norfolk_island"]


def test_triples_name_existing_entities_and_are_unique(facts):
    triples = list(facts.triples())
    keys = {(t["head"], t["relation"], t["tail"]) for t in triples}
    assert len(keys) == len(triples)
    assert all(t["head"] in facts.entities for t in triples)
    assert all(t["tail"] in facts.entities for t in triples if t["tail_is_entity"])
    assert ("aut", "population", "8527230") in keys and ("aut", "neighbour", "hun") in keys


def test_a_former_value_is_not_the_present_one(facts):
    assert facts.former["kaz", "capital"].en == ("Nur-Sultan",)
    for (country, relation), former in facts.former.items():
        assert not set(former.en) & set(value(facts, country, relation))
