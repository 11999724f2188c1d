"""A world on disk: complete, the same for the same seed, whole or absent."""

import collections
import json
import re
import shutil
from urllib.parse import urlsplit

import pytest

from stepdr_jax.synthesis import corpora
from tools_env.errors import ToolHostError
from tools_env.offline_web.build import build_offline_web
from tools_env.offline_web.pages import HOSTS

AUSTRIA_EN = """# Austria
The capital of Austria is Vienna.
The currency of Austria is the euro.
The language of Austria is German.
The region of Austria is Western Europe.
The population of Austria is 8527230.
The area of Austria is 83871 square kilometres.
The neighbours of Austria are Czechia, Germany, Hungary, Italy, Liechtenstein, Slovakia, Slovenia and Switzerland.
The calling code of Austria is 43.
The demonym of Austria is Austrian."""
AUSTRIA_ZH = """# 奥地利
奥地利的首都是维也纳。
奥地利的货币是欧元。
奥地利的语言是德语。
奥地利的地区是西欧。
奥地利的人口是8527230。
奥地利的面积是83871平方公里。
奥地利的邻国是捷克、德国、匈牙利、意大利、列支敦士登、斯洛伐克、斯洛文尼亚和瑞士。
奥地利的区号是43。"""
PLAIN = re.compile(r"The [a-z ]+ of .+ (is|are) .+\.|.+的(首都|货币|人口|面积|语言|地区|邻国|区号)是.+。")


def passages(row: dict) -> list[str]:
    return row["text"].splitlines()[1:]


def on(documents: dict, host: str) -> list[dict]:
    return [row for url, row in documents.items() if urlsplit(url).hostname == host]


def test_reference_pages_state_one_fact_a_passage(documents):
    assert documents["http://atlas.test/en/austria"]["text"] == AUSTRIA_EN
    assert documents["http://atlas.test/zh/austria"]["text"] == AUSTRIA_ZH


def test_every_host_has_pages_of_its_authority(documents):
    assert {urlsplit(url).hostname for url in documents} == set(HOSTS)
    for name, site in HOSTS.items():
        assert {row["authority"] for row in on(documents, name)} == {site["authority"]}


def test_pages_are_dated_before_the_agents_day(documents):
    assert all("2000" < row["published_at"] < "2026-06-01" for row in documents.values())


def test_no_page_repeats_a_passage_or_is_empty(documents):
    for url, row in documents.items():
        assert row["text"].startswith(f"# {row['title']}\n")
        assert passages(row) and len(set(passages(row))) == len(passages(row)), url


def test_only_reference_copies_and_quickfacts_use_the_plain_sentences(documents):
    plain = {urlsplit(url).hostname for url, row in documents.items() if any(map(PLAIN.fullmatch, passages(row)))}
    assert plain == {"atlas.test", "mirror.test", "quickfacts.test"}
    assert {url.count("/") for url, row in documents.items() if any(map(PLAIN.fullmatch, passages(row)))} == {4}


def test_some_pages_are_very_long(documents):
    assert len(passages(documents["http://atlas.test/en/almanac/population"])) > 200
    assert len(passages(documents["http://atlas.test/zh/currency/euro"])) > 30


def test_links_lead_to_pages_except_the_dead_ones(documents, offline_web_dir):
    moved = json.loads((offline_web_dir / "sites.json").read_text())["hosts"]["atlas.test"]["redirects"]
    dead = collections.Counter()
    for url, row in documents.items():
        for link in row["links"]:
            assert urlsplit(link["url"]).hostname in HOSTS
            dead[urlsplit(url).hostname] += link["url"] not in documents and urlsplit(link["url"]).path not in moved
    assert 0 < dead["atlas.test"] < 100
    assert dead["quickfacts.test"] == dead["gazette.test"] == 0
    assert dead["mirror.test"] > 0, "a copy's links lead to what was not copied"


def test_authoritative_pages_never_err_and_errors_are_listed(documents, offline_web_dir, facts):
    errors = corpora.read_planted_errors(offline_web_dir)
    assert {urlsplit(error.url).hostname for error in errors} == {"quickfacts.test"}
    listed = {(error.url, error.passage) for error in errors}
    truths = {line for row in on(documents, "atlas.test") for line in passages(row)}
    for row in on(documents, "quickfacts.test"):
        for line in passages(row):
            assert ((row["url"], line) in listed) != (line in truths), (row["url"], line)
    total = sum(len(passages(row)) for row in on(documents, "quickfacts.test"))
    assert 0.25 < len(errors) / total < 0.45
    assert {error.reason for error in errors} == {"swapped", "outdated"}


def test_what_was_true_once_is_stated_as_outdated(offline_web_dir):
    found = [
        e
        for e in corpora.read_planted_errors(offline_web_dir)
        if (e.entity, e.relation, e.lang) == ("kaz", "capital", "en")
    ]
    assert [(e.stated, e.true, e.reason) for e in found] == [("Nur-Sultan", "Astana", "outdated")]


def test_mirrors_are_near_duplicates(documents):
    for row in on(documents, "mirror.test"):
        original = set(passages(documents[row["url"].replace("//mirror.test", "//atlas.test")]))
        assert len(set(passages(row)) - original) == 1
        assert len(original & set(passages(row))) >= len(original) - 1


def test_records_of_the_training_side_read_every_file(offline_web_dir, documents):
    assert [document.url for document in corpora.read_documents(offline_web_dir)] == list(documents)
    entities, triples = corpora.read_entities(offline_web_dir), corpora.read_triples(offline_web_dir)
    assert entities["city:vienna"].zh == "维也纳"
    assert entities["aut"].attributes["language"] == {"en": "German", "zh": "德语"}
    assert {t.relation for t in triples} == {*entities["aut"].attributes}


def test_equal_inputs_give_equal_bytes_and_another_seed_another_world(tmp_path, offline_web_dir):
    build_offline_web(tmp_path / "same", seed=0)
    build_offline_web(tmp_path / "other", seed=1)
    for name in ("documents.jsonl", "entities.jsonl", "triples.jsonl", "errors.jsonl", "sites.json"):
        assert (tmp_path / "same" / name).read_bytes() == (offline_web_dir / name).read_bytes()
    assert (tmp_path / "other" / "documents.jsonl").read_bytes() != (offline_web_dir / "documents.jsonl").read_bytes()


def test_a_world_of_the_same_inputs_is_left_alone(offline_web_dir, tmp_path):
    shutil.copytree(offline_web_dir, tmp_path / "world")
    (tmp_path / "world" / "index").mkdir()
    before = (tmp_path / "world" / "documents.jsonl").stat().st_mtime_ns
    build_offline_web(tmp_path / "world", seed=0)
    assert (tmp_path / "world" / "documents.jsonl").stat().st_mtime_ns == before
    assert (tmp_path / "world" / "index").exists()


def test_a_build_that_fails_leaves_the_old_world_and_no_litter(offline_web_dir, tmp_path, monkeypatch):
    shutil.copytree(offline_web_dir, tmp_path / "world")
    before = (tmp_path / "world" / "sites.json").read_bytes()
    monkeypatch.setattr("tools_env.offline_web.build.pages.redirects", lambda facts: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        build_offline_web(tmp_path / "world", seed=2)
    assert (tmp_path / "world" / "sites.json").read_bytes() == before
    assert [path.name for path in tmp_path.iterdir()] == ["world"]


def test_a_directory_with_other_things_is_never_replaced(tmp_path):
    (tmp_path / "thesis.md").write_text("years of work")
    with pytest.raises(ToolHostError, match="to be absent, empty or a built offline web"):
        build_offline_web(tmp_path, seed=0)
    assert (tmp_path / "thesis.md").read_text() == "years of work"
