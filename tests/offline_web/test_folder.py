"""A person's own folder becomes pages; what cannot be read is named."""

import json

import pytest

from stepdr_jax.records import Document
from tools_env.errors import ToolHostError
from tools_env.offline_web.build import build_offline_web
from tools_env.offline_web.folder import MAX_PASSAGE, detect_language, read_folder
from tools_env.offline_web.server import render_page
from tools_env.search import text
from tools_env.web.fetch import FetchedPage
from tools_env.web.page import extract_page

NOTES = """---
title: "Heat pumps"
date: 2025-02-03
---
# Heat pumps

A heat pump moves heat
instead of making it. See [the costs](costs%20of%20heat.txt#prices) and
[the physics](deep/physics.html), or [a standard](https://example.org/std).

- Air source units are common.
- Ground source units are steady.

Setext
------
| kind | efficiency |
|------|------------|
| air  | 3.1 |

![a picture](pump.png) [nothing](missing.md)
"""
PHYSICS = """<html><head><title>Physics of heat</title></head><body><nav><a href="/x">Home</a></nav><main>
<h1>Physics</h1>
<p>Heat flows from warm to cold, as <a href="../notes.md">the notes</a> say.</p></main></body></html>"""
PDF = b"""%PDF-1.4
1 0 obj<</Type/Catalog/Pages 2 0 R>>endobj
2 0 obj<</Type/Pages/Kids[3 0 R]/Count 1>>endobj
3 0 obj<</Type/Page/Parent 2 0 R/MediaBox[0 0 300 200]/Contents 4 0 R/Resources<</Font<</F1 5 0 R>>>>>>endobj
4 0 obj<</Length 60>>stream
BT /F1 12 Tf 20 150 Td (The boiler was replaced in 2024.) Tj ET
endstream endobj
5 0 obj<</Type/Font/Subtype/Type1/BaseFont/Helvetica>>endobj
trailer<</Root 1 0 R>>
"""


@pytest.fixture
def library(tmp_path):
    folder = tmp_path / "library"
    (folder / "deep").mkdir(parents=True)
    (folder / "notes.md").write_text(NOTES)
    (folder / "costs of heat.txt").write_text("热泵的价格\n\n一台热泵的价格是一万元，\n安装费另计。\n")
    (folder / "deep" / "physics.html").write_text(PHYSICS)
    (folder / "report.pdf").write_bytes(PDF)
    (folder / "pump.png").write_bytes(b"\x89PNG")
    (folder / ".hidden.md").write_text("secret")
    return folder


def rows(folder) -> dict[str, dict]:
    return {row["id"].removeprefix("library.test/"): row for row in read_folder(folder)}


def test_every_document_becomes_a_page_and_other_files_are_passed_over(library):
    found = rows(library)
    assert sorted(found) == ["costs of heat.txt", "deep/physics.html", "notes.md", "report.pdf"]
    for row in found.values():
        document = Document.model_validate(row)
        assert (document.source, document.authority) == ("folder", 1)


def test_markdown_paragraphs_lists_tables_and_front_matter(library):
    row = rows(library)["notes.md"]
    assert (row["title"], row["published_at"], row["lang"]) == ("Heat pumps", "2025-02-03", "en")
    assert text.passages(row["text"]) == [
        "A heat pump moves heat instead of making it. See the costs and the physics, or a standard.",
        "Air source units are common.",
        "Ground source units are steady.",
        "kind | efficiency",
        "air | 3.1",
        "a picture nothing",
    ]
    assert "## Setext" in row["text"].splitlines()
    assert row["text"].splitlines()[1] == text.passages(row["text"])[0], "links and marks are not in the text"


def test_links_between_documents_form_a_graph(library):
    found = rows(library)
    links = {link["anchor"]: link["url"] for link in found["notes.md"]["links"]}
    assert links == {
        "the costs": "http://library.test/costs%20of%20heat.txt",
        "the physics": "http://library.test/deep/physics.html",
        "a standard": "https://example.org/std",
    }
    assert found["deep/physics.html"]["links"] == [{"anchor": "the notes", "url": "http://library.test/notes.md"}]


def test_text_html_and_pdf_are_read(library):
    found = rows(library)
    assert text.passages(found["costs of heat.txt"]["text"]) == ["热泵的价格", "一台热泵的价格是一万元，安装费另计。"]
    assert found["costs of heat.txt"]["lang"] == "zh"
    assert found["deep/physics.html"]["title"] == "Physics of heat"
    assert text.passages(found["deep/physics.html"]["text"]) == ["Heat flows from warm to cold, as the notes say."]
    assert "The boiler was replaced in 2024." in found["report.pdf"]["text"]


def test_a_long_paragraph_is_cut_between_sentences(tmp_path):
    sentences = [f"Sentence number {i} says something about topic {i}." for i in range(40)]
    (tmp_path / "long.txt").write_text("Title\n\n" + " ".join(sentences))
    found = text.passages(rows(tmp_path)["long.txt"]["text"])[1:]
    assert len(found) > 3 and max(map(len, found)) <= MAX_PASSAGE
    assert " ".join(found) == " ".join(sentences)


def test_a_reader_of_the_served_page_gets_the_same_passages(library):
    for row in read_folder(library):
        page = extract_page(FetchedPage(row["url"], "text/html", "utf-8", render_page(row).encode()))
        assert page.passages == text.passages(row["text"])


@pytest.fixture
def no_other_pages(monkeypatch):
    """Leaves the built-in pages out, which takes most of the time of a build."""
    monkeypatch.setattr("tools_env.offline_web.build.pages.all_pages", lambda facts, seed: iter(()))


def test_a_built_offline_web_has_the_documents_and_their_host(library, tmp_path, no_other_pages):
    build_offline_web(tmp_path / "world", seed=0, documents=str(library))
    lines = (tmp_path / "world" / "documents.jsonl").read_text().splitlines()
    assert sum(json.loads(line)["url"].startswith("http://library.test/") for line in lines) == 4
    sites = json.loads((tmp_path / "world" / "sites.json").read_text())
    assert sites["hosts"]["library.test"]["authority"] == 1


def test_changed_documents_give_a_new_offline_web(tmp_path, no_other_pages):
    (tmp_path / "docs").mkdir()
    (tmp_path / "docs" / "a.txt").write_text("First version.")
    build_offline_web(tmp_path / "world", seed=0, documents=str(tmp_path / "docs"))
    (tmp_path / "docs" / "a.txt").write_text("Second version.")
    build_offline_web(tmp_path / "world", seed=0, documents=str(tmp_path / "docs"))
    assert "Second version." in (tmp_path / "world" / "documents.jsonl").read_text()


def test_scripts_decide_the_language():
    assert detect_language("奥地利的首都是维也纳 (Vienna)。") == "zh"
    assert detect_language("The capital is 维也纳 in Chinese, a word in an English text.") == "en"
    assert detect_language("1 2 3") == "en"


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("broken.pdf", b"not a pdf", r"cannot read the document .*broken\.pdf: unreadable PDF; repair or remove it"),
        ("empty.md", b"# Only a heading\n", r"the document .*empty\.md has no text"),
        ("binary.txt", b"\x00\x01\x02", r"the document .*binary\.txt is not text"),
    ],
)
def test_a_file_that_cannot_be_read_is_named(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ToolHostError, match=message):
        read_folder(tmp_path)


def test_a_missing_folder_and_a_folder_without_documents_are_named(tmp_path):
    with pytest.raises(ToolHostError, match="expected a folder of documents, got .*absent"):
        read_folder(tmp_path / "absent")
    (tmp_path / "picture.png").write_bytes(b"")
    with pytest.raises(ToolHostError, match=r"expected documents \(.*pdf.*\) in .*, found none"):
        read_folder(tmp_path)
