"""Facts about the embedded search's rankings and filters, and about the index command."""

import asyncio
import bz2
import io
import itertools
import json
import signal
import subprocess
import sys
import tarfile
import time
from pathlib import Path

import pytest

from tools_env import index as command
from tools_env.check import search_bench as bench
from tools_env.client import ToolsClient
from tools_env.errors import BadArguments, ToolHostError
from tools_env.search import ranking, store
from tools_env.search.backend import Filters
from tools_env.search.citations import Citations
from tools_env.search.index import PassageIndex
from tools_env.search.wikitext import dump_pages, plain_text
from tools_env.service.host import start_host
from tools_env.service.settings import HostSettings


def write(path, rows):
    path.mkdir(parents=True, exist_ok=True)
    whole = [{"id": row["url"], "lang": "en", "authority": 1, **row} for row in rows]
    (path / "documents.jsonl").write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in whole))
    return path


def page(number, text, **more):
    return {"url": f"http://site{number}.test/page", "title": f"Page {number}", "text": text, **more}


FILLER = [
    page(100 + i, f"Notice {i} of the {name} office on matter {i * 7}.") for i, name in enumerate("abcdefghij" * 4)
]


@pytest.fixture(scope="module")
def library(tmp_path_factory):
    rows = [
        page(1, "Solar panels turn sunlight into electricity on roofs.", published_at="2024-06-01"),
        page(2, "Solar panels on roofs are cleaned by rain.", published_at="2025-03-01", authority=2),
        page(3, "屋顶上的太阳能板把阳光变成电。", lang="zh", published_at="2025-01-15"),
        {**page(4, "Solar panels lose output with age."), "url": "http://deep.site1.test/more"},
        *FILLER,
    ]
    return write(tmp_path_factory.mktemp("library"), rows)


def hosts(index, query, topk=10, **filters):
    found = index.search(query, topk, Filters(**filters))
    return [index.passages[i].url.split("/")[2].removesuffix(".test") for i in found]


@pytest.fixture(scope="module", params=["bm25", "dense", "hybrid"])
def any_mode(request, library):
    return PassageIndex(library, request.param)


def test_filters_narrow_in_every_ranking(any_mode):
    assert set(hosts(any_mode, "solar panels", site="site1.test")) == {"site1", "deep.site1"}
    assert set(hosts(any_mode, "solar panels", site="http://deep.site1.test/x")) == {"deep.site1"}
    assert hosts(any_mode, "solar panels roofs", since="2025-01-01")[0] == "site2"
    assert "site1" not in hosts(any_mode, "solar panels roofs", since="2025-01-01")
    assert hosts(any_mode, "solar panels roofs", until="2024-12-31") == ["site1"]
    assert set(hosts(any_mode, "太阳能板", language="zh")) == {"site3"}
    assert hosts(any_mode, "solar panels", language="zh", site="site1.test") == []
    assert len(hosts(any_mode, "solar panels", topk=1)) == 1


def test_equal_queries_give_equal_results_in_every_ranking(any_mode, library):
    again = PassageIndex(library, any_mode.mode)
    for query in ("solar panels", "notice of the office", "太阳能"):
        assert any_mode.search(query, 10) == again.search(query, 10) == any_mode.search(query, 10)


@pytest.mark.parametrize(
    "wrong, message",
    [
        ({"since": "March"}, "since must be a date"),
        ({"until": "2025-13-01"}, "until must be a date"),
        ({"site": "//"}, "site must be a host"),
    ],
)
def test_wrong_filter_is_named(wrong, message):
    with pytest.raises(BadArguments, match=message):
        Filters(**wrong)


def authority_case(tmp_path, mode):
    rows = [
        page(1, "The harbour of Alpha was opened by the queen in 1871."),
        page(2, "The harbour of Alpha was opened by the queen in 1871, they say.", authority=2),
        page(3, "A harbour was opened.", authority=2),
        page(4, "The queen of 1871 has a harbour at Beta which was opened late.", authority=2),
        *FILLER,
    ]
    return PassageIndex(write(tmp_path, [{**r, "authority": r.get("authority", 0)} for r in rows]), mode)


@pytest.mark.parametrize("mode", ["bm25", "dense", "hybrid"])
def test_authority_lifts_a_comparable_result_and_never_a_clearly_less_relevant_one(tmp_path, mode):
    index = authority_case(tmp_path, mode)
    query = "harbour of Alpha opened by the queen in 1871"
    found = hosts(index, query)
    assert found[:2] == ["site2", "site1"], "comparable: the authoritative page comes first"
    without = PassageIndex(tmp_path, mode, authority=False)
    assert hosts(without, query)[0] == "site1"


@pytest.mark.parametrize("mode", ["bm25", "dense", "hybrid"])
def test_without_its_guard_authority_would_lift_the_less_relevant_result(tmp_path, mode, monkeypatch):
    """What the test above relies on: with a boost that knows no measure, another page is first."""
    index = authority_case(tmp_path, mode)
    monkeypatch.setattr(ranking, "AUTHORITY", 5.0)
    found = hosts(index, "harbour of Alpha opened by the queen in 1871")
    assert found.index("site1") > 1


def test_promotion_asks_every_measure():
    measures = {"a": (1.0, 0.5), "b": (0.99, 0.5), "c": (0.99, 0.1), "d": (0.2, 0.5)}
    authority = {"a": 0, "b": 2, "c": 2, "d": 2}
    for order in itertools.permutations("bcd"):
        moved = ranking.promoted(["a", *order], measures.__getitem__, authority.__getitem__)
        assert moved.index("a") < moved.index("c") and moved.index("a") < moved.index("d")
    assert ranking.promoted("ab", measures.__getitem__, authority.__getitem__) == ["b", "a"]


def test_passages_that_only_their_vectors_find_are_found(tmp_path):
    rows = [page(1, "Photosynthesising organisms absorb carbon."), *FILLER]
    write(tmp_path, rows)
    assert hosts(PassageIndex(tmp_path), "photosynthesis organism") != []
    assert hosts(PassageIndex(tmp_path), "photosynthetic") == []
    assert hosts(PassageIndex(tmp_path, "hybrid"), "photosynthetic")[0] == "site1"


# The index command


def run(out, *sources, **how):
    arguments = [f"--out={out}", *map(str, sources), *(f"--{name}={value}" for name, value in how.items())]
    return command.main(arguments)


def texts(out, mode="bm25"):
    index = PassageIndex(out, mode)
    return {index.passages[int(i)].text: index.passages[int(i)] for i in store.alive(out / "index")}


def test_repeated_command_replaces_adds_and_drops_only_what_changed(tmp_path, capsys):
    notes, out = tmp_path / "notes", tmp_path / "out"
    notes.mkdir()
    for name in "abc":
        (notes / f"{name}.md").write_text(f"# Note {name}\n\nThe {name} stays as it was written.\n")
    assert run(out, f"{notes},site=notes.example,authority=2") == 0
    assert "(3 added, 0 changed, 0 unchanged, 0 removed, 0 unreadable)" in capsys.readouterr().out
    before = texts(out)
    size = (out / "index" / "passages.jsonl").stat().st_size
    assert run(out, f"{notes},site=notes.example,authority=2") == 0
    assert "(0 added, 0 changed, 3 unchanged, 0 removed, 0 unreadable)" in capsys.readouterr().out
    assert (out / "index" / "passages.jsonl").stat().st_size == size
    (notes / "a.md").write_text("# Note a\n\nIt says something else today.\n")
    (notes / "b.md").unlink()
    (notes / "d.txt").write_text("A fourth text came.\n")
    (notes / "broken.pdf").write_bytes(b"no pdf")
    assert run(out, f"{notes},site=notes.example,authority=2") == 1
    told = capsys.readouterr()
    assert "(1 added, 1 changed, 1 unchanged, 1 removed, 1 unreadable)" in told.out and "broken.pdf" in told.err
    after = texts(out)
    assert set(after) == {"It says something else today.", "The c stays as it was written.", "A fourth text came."}
    kept = "The c stays as it was written."
    assert after[kept] == before[kept] and after[kept].authority == 2
    index = PassageIndex(out)
    assert hosts(index, "stays as it was written") == ["notes.example"]
    assert index.citations.id(after[kept].url, kept) == after[kept].id
    assert Citations().id(after[kept].url, kept) == after[kept].id


def test_vectors_follow_the_index(tmp_path):
    notes, out = tmp_path / "notes", tmp_path / "out"
    notes.mkdir()
    for i in range(30):
        (notes / f"{i}.txt").write_text(f"Entry {i} speaks of topic number {i * 13}.\n")
    (notes / "x.txt").write_text("Glaciers carve valleys.\n")
    assert run(out, notes, vectors="lsa") == 0
    assert hosts(PassageIndex(out, "dense"), "glacier valley", 1) == ["notes"]
    (notes / "x.txt").write_text("Glaciers build islands.\n")
    assert run(out, notes, vectors="lsa") == 0
    index = PassageIndex(out, "dense")
    assert index.passages[index.search("glacier", 1)[0]].text == "Glaciers build islands."
    assert "Glaciers carve valleys." not in [index.passages[i].text for i in index.search("glaciers carve valleys", 10)]


def test_command_killed_at_any_moment_goes_on_and_ends_as_if_never_killed(tmp_path):
    rows = [
        {"url": f"http://a.example/{i}", "title": f"Title {i}", "text": f"Text {i} of many.\nLine two of {i}."}
        for i in range(1500)
    ]
    source = tmp_path / "rows.jsonl"
    source.write_text("".join(json.dumps(row) + "\n" for row in rows))
    out, whole = tmp_path / "out", tmp_path / "whole"
    program = "import sys; from tools_env import index; index.COMMIT_SECONDS = 0.02; sys.exit(index.main(sys.argv[1:]))"
    killed = 0
    for pause in (0.0, 0.1, 0.3, 0.2):
        process = subprocess.Popen(
            [sys.executable, "-c", program, f"--out={out}", str(source)],
            stderr=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
        )
        began = time.monotonic()
        while not (out / "sites.json").exists() and process.poll() is None and time.monotonic() - began < 60:
            time.sleep(0.01)
        time.sleep(pause)
        if process.poll() is None:
            process.send_signal(signal.SIGKILL)
            killed += 1
        process.wait()
        if (out / "index" / "index.json").exists():
            PassageIndex(out).search("text of many", 3)
    assert killed
    assert run(out, source) == 0 and run(whole, source) == 0
    assert texts(out) == texts(whole) and len(texts(out)) == 3000
    index = PassageIndex(out)
    assert index._searcher.num_docs == 3000
    assert [index.passages[i].title for i in index.search("Line two of 77", 1)] == ["Title 77"]


def test_two_writers_do_not_meet(tmp_path):
    writer = store.Writer(tmp_path / "index")
    with pytest.raises(ToolHostError, match="another process writes"):
        store.Writer(tmp_path / "index")
    writer.close()
    store.Writer(tmp_path / "index").close()


DUMP = """<mediawiki xmlns="http://www.mediawiki.org/xml/export-0.11/" xml:lang="{lang}"><siteinfo>
<base>https://{lang}.wikipedia.org/wiki/Main_Page</base></siteinfo>{pages}</mediawiki>"""
PAGE = "<page><title>{0}</title><ns>{1}</ns>{2}<revision><id>{3}</id><timestamp>2024-05-06T01:02:03Z</timestamp><text>{4}</text></revision></page>"
WIKITEXT = """{{Infobox country|name={{nowrap|Austria}}|x=[[a|b]]}}
'''Austria''' is a [[landlocked country|landlocked]] [[country]] in [[Central Europe]].&lt;ref name="a"&gt;Who, {{cite|x}}&lt;/ref&gt;&lt;ref name=b/&gt;
[[File:Flag.svg|thumb|The [[flag]] of Austria]]
{| class="wikitable"
! a !! b
|-
| 1 || {{x}}
|}
== History ==
* It became a ''republic'' in 1918 &amp;ndash; see [https://a.example the text].
&lt;!-- hidden --&gt;&lt;math&gt;x^2&lt;/math&gt;
== References ==
{{reflist}}
* Some book.
[[Category:Countries]]"""


def dump(path, lang="en", *pages):
    data = DUMP.format(lang=lang, pages="".join(PAGE.format(*page) for page in pages)).encode()
    path.write_bytes(bz2.compress(data) if path.suffix == ".bz2" else data)
    return path


def test_dump_gives_articles_as_prose(tmp_path):
    path = dump(
        tmp_path / "wiki.xml.bz2",
        "en",
        ("Austria", 0, "", 7, WIKITEXT),
        ("Österreich", 0, '<redirect title="Austria"/>', 8, "#REDIRECT [[Austria]]"),
        ("Talk:Austria", 1, "", 9, "Talk."),
    )
    (found,) = dump_pages(path)
    assert (found.title, found.url) == ("Austria", "http://en.wikipedia.org/wiki/Austria")
    assert (found.revision, found.published_at) == ("7", "2024-05-06")
    assert plain_text(found.wikitext).splitlines() == [
        "Austria is a landlocked country in Central Europe.",
        "## History",
        "It became a republic in 1918 – see the text.",
    ]
    assert plain_text("-{zh-hans:计算机; zh-hant:電腦}-的[[文件:a.jpg|图]]历史") == "计算机的历史"
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(ToolHostError, match="cannot read the dump"):
        list(dump_pages(path))


def test_index_without_a_world_is_served_and_its_pages_open(tmp_path):
    chinese = "'''奥地利'''的首都是[[维也纳]]。"
    wiki = dump(tmp_path / "wiki.xml", "zh", ("奥地利", 0, "", 1, chinese))
    archive = tmp_path / "texts.tar.xz"
    with tarfile.open(archive, "w:xz") as out:
        body = b"The harbour was opened in 1871.\n"
        info = tarfile.TarInfo("texts/harbours.txt")
        info.size = len(body)
        out.addfile(info, io.BytesIO(body))
    assert run(tmp_path / "out", wiki, f"{archive},authority=2") == 0
    assert "CC BY-SA" in (tmp_path / "out" / "LICENSE").read_text()

    async def main():
        host = await start_host(HostSettings(offline_web=str(tmp_path / "out")))
        client = ToolsClient(host.address)
        try:
            session = await client.open_session("e")
            asked = [{"query": "奥地利的首都", "language": "zh"}, {"query": "harbour", "site": "texts.test", "topk": 1}]
            found = await session.call("batch_web_surfer", {"queries": asked}, call_id="0")
            assert [source.text for source in found.sources] == [
                "奥地利的首都是维也纳。",
                "The harbour was opened in 1871.",
            ]
            assert [source.authority for source in found.sources] == [1, 2]
            for i, source in enumerate(found.sources):
                for wanted in (source.id, source.url):
                    opened = await session.call("batch_web_surfer", {"urls": [wanted]}, call_id=f"{i} {wanted}")
                    assert opened.outcome == "ok" and source.id in [s.id for s in opened.sources]
            wrong = await session.call(
                "batch_web_surfer", {"queries": [{"query": "x", "since": "soon"}]}, call_id="wrong"
            )
            assert (wrong.outcome, wrong.text) == ("bad_arguments", "since must be a date as 2025-03-01, got soon")
        finally:
            await client.close()
            await host.stop()

    asyncio.run(main())


@pytest.mark.parametrize(
    "source, message",
    [
        ("nowhere", "there is no nowhere"),
        ("{tmp}/a.doc", "expected a folder, .xml"),
        ("{tmp}/a.jsonl", "line 2: expected an object with url, title and text"),
        ("{tmp}/a.xml", "expected a MediaWiki export"),
        ("{tmp},colour=red", "expected SOURCE as PATH,site=HOST"),
        ("{tmp},authority=9", "expected authority as 0, 1 or 2"),
    ],
)
def test_wrong_source_is_named(tmp_path, capsys, source, message):
    (tmp_path / "a.doc").write_text("x")
    (tmp_path / "a.jsonl").write_text('{"url": "http://a.example/", "title": "a", "text": "b"}\n{"url": 3}\n')
    (tmp_path / "a.xml").write_text("<html></html>")
    assert run(tmp_path / "out", source.replace("{tmp}", str(tmp_path))) == 2
    assert message in capsys.readouterr().err


def test_known_sentences_of_real_articles_are_found(tmp_path):
    archive = Path(__file__).parents[2].parent / "shared/data/wikispeedia/plaintext_articles.tar.xz"
    if not archive.exists():
        pytest.skip("the wikispeedia articles are not here")
    writer = store.Writer(tmp_path / "index")
    for title, body in itertools.islice(bench.articles(archive), 150):
        url = f"http://articles.example/{title}"
        writer.add({"id": url, "url": url, "title": title, "text": "\n".join(bench.paragraphs(body)) + "\n."})
    writer.commit()
    writer.close()
    asked = bench.queries(store.Passages(tmp_path / "index"), 100)
    found = bench.measure(str(tmp_path), "bm25", True, asked)["found"]
    assert found["known item"][0] >= 0.95 and found["paraphrase"][0] >= 0.85
