"""Facts about passages, citation ids, the index and its ranking."""

import json
import re

import pytest

from tools_env.errors import ToolHostError
from tools_env.search import text
from tools_env.search.citations import Citations, canonical_url
from tools_env.search.index import PassageIndex


@pytest.fixture(scope="module")
def index(offline_web):
    return PassageIndex(offline_web)


def found(index, query, topk=3):
    return [(p.text, p.url) for p in (index.passages[i] for i in index.search(query, topk))]


def test_authoritative_exact_fact_comes_first(index):
    assert found(index, "capital of Austria")[0] == (
        "The capital of Austria is Vienna.",
        "http://atlas.test/en/austria",
    )


def test_unreliable_passage_takes_second_place_after_duplicates_are_merged(index):
    assert found(index, "capital of Austria")[1][0] == "The capital of Austria is Salzburg."


@pytest.mark.parametrize("query", ["奥地利的首都", "奥地利首都", "奥地利的首都是哪里"])
def test_chinese_fact_is_found_with_or_without_particles(index, query):
    assert found(index, query)[0][0] == "奥地利的首都是维也纳。"


@pytest.mark.parametrize(
    "query, fact",
    [
        ("capital of Guinea", "The capital of Guinea is Conakry."),
        ("capital of Papua New Guinea", "The capital of Papua New Guinea is Port Moresby."),
        ("What is the capital of Guinea-Bissau?", "The capital of Guinea-Bissau is Bissau."),
        ("几内亚的首都", "几内亚的首都是科纳克里。"),
        ("几内亚比绍的首都", "几内亚比绍的首都是比绍。"),
        ("currency Hungary", "The currency of Hungary is the forint."),
        ("Which country has the capital Budapest", "The capital of Hungary is Budapest."),
    ],
)
def test_entity_and_attribute_together_win_over_same_shaped_passages(index, query, fact):
    assert found(index, query)[0][0] == fact


@pytest.mark.parametrize("query", ["capital of Wakanda", "瓦坎达的首都", "", "the of is", "?!", '"(AND *:^'])
def test_query_about_nothing_known_finds_nothing(index, query):
    assert found(index, query) == []


def test_equal_queries_give_equal_order_also_from_a_rebuilt_index(index, tmp_path, offline_web):
    for name in ("documents.jsonl", "sites.json"):
        (tmp_path / name).write_bytes((offline_web / name).read_bytes())
    again = PassageIndex(tmp_path)
    for query in ("capital", "coin", "首都", "neighbours of Land7"):
        assert index.search(query, 10) == again.search(query, 10)
        assert [index.passages[i].id for i in index.search(query, 10)] == [
            again.passages[i].id for i in again.search(query, 10)
        ]


def test_index_is_built_once_and_rebuilt_when_the_documents_change(tmp_path, offline_web):
    for name in ("documents.jsonl", "sites.json"):
        (tmp_path / name).write_bytes((offline_web / name).read_bytes())
    first = PassageIndex(tmp_path)
    made = (tmp_path / "index" / "index.json").stat().st_mtime_ns
    PassageIndex(tmp_path)
    assert (tmp_path / "index" / "index.json").stat().st_mtime_ns == made
    row = {"id": "x", "url": "http://atlas.test/x", "title": "Narnia", "text": "The capital of Narnia is Cair Paravel."}
    with open(tmp_path / "documents.jsonl", "a") as out:
        out.write(json.dumps(row) + "\n")
    second = PassageIndex(tmp_path)
    assert second.fingerprint != first.fingerprint
    assert found(second, "capital of Narnia")[0][0] == row["text"]
    assert not list(tmp_path.glob(".index*"))


def test_missing_or_damaged_documents_are_named(tmp_path):
    with pytest.raises(ToolHostError, match="documents.jsonl does not exist"):
        PassageIndex(tmp_path)
    (tmp_path / "documents.jsonl").write_text('{"id": "a"}\n')
    with pytest.raises(ToolHostError, match="line 1 is not a document"):
        PassageIndex(tmp_path)


def test_citation_id_is_four_syllables_and_depends_on_url_and_text_only():
    one, two = Citations().id("http://a.test/", "x"), Citations().id("http://a.test/", "x")
    assert one == two and re.fullmatch(r"web_([bdfghjklmnprstvz][aeiou]){4}", one)
    assert Citations().id("http://b.test/", "x") != one


def test_spellings_of_an_address_give_one_citation_id():
    spellings = ("http://a.test/zh/奥地利", "http://A.test:80/zh/%E5%A5%A5%E5%9C%B0%E5%88%A9#top")
    assert len({Citations().id(url, "x") for url in spellings}) == 1
    assert canonical_url("http://a.test/x%2Fy?q=a%26b") == "http://a.test/x%2Fy?q=a%26b"


def test_damaged_index_is_rebuilt(tmp_path, offline_web):
    for name in ("documents.jsonl", "sites.json"):
        (tmp_path / name).write_bytes((offline_web / name).read_bytes())
    PassageIndex(tmp_path)
    (tmp_path / "index" / "passages.jsonl").write_text('{"id": "web_')
    for part in (tmp_path / "index" / "tantivy").iterdir():
        part.write_bytes(b"damaged")
    assert found(PassageIndex(tmp_path), "capital of Austria")[0][0] == "The capital of Austria is Vienna."


def test_colliding_citations_get_different_stable_ids():
    citations = Citations()
    first = citations.id("http://a.test/", "x")
    citations._owner[first] = b"another passage has this id"
    moved = citations.id("http://a.test/", "x")
    assert moved != first and citations.id("http://a.test/", "x") == moved


def test_markdown_line_and_its_plain_text_are_the_same_passage():
    assert (
        text.passage("- The **capital** of [Austria](http://a.test/x_(y)) is  Vienna.")
        == "The capital of Austria is Vienna."
    )
    assert text.passage("## Heading") == "" == text.passage("---") == text.passage("|---|---|")


def test_tokens_fold_case_accents_and_plurals():
    assert text.tokens("Côte d'Ivoire LANGUAGES") == ("cote", "d", "ivoire", "language")
