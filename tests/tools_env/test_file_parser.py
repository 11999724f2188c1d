"""Facts about reading documents: real small files of every kind, and files that want to hurt the host."""

import asyncio
import io
import time
import zipfile

import pytest

from tools_env.errors import ToolError, ToolHostError
from tools_env.tools import arguments, file_parser, implicit_context
from tools_env.tools.base import CallContext

TOOL = file_parser.build_tool({}, None)


@pytest.fixture
def parse(tmp_path):
    """Puts a file into a workspace and returns the tool's text on it."""
    (tmp_path / "workspace").mkdir()

    def run(name: str, content: bytes, seconds: float = 60, **given) -> str:
        (tmp_path / "workspace" / name).write_bytes(content)
        given = {"path": name} | given
        arguments.check_arguments(TOOL.schema, given)
        return asyncio.run(TOOL.run(CallContext(tmp_path, {}, time.monotonic() + seconds, 700), given)).text

    return run


def pdf(*pages: str) -> bytes:
    """A PDF of these lines, one page each."""
    objects = ["<</Type/Catalog/Pages 2 0 R>>", ""]
    kids = []
    for text in pages:
        stream = f"BT /F1 12 Tf 50 700 Td ({text}) Tj ET"
        kids.append(f"{len(objects) + 1} 0 R")
        objects.append(
            f"<</Type/Page/Parent 2 0 R/MediaBox[0 0 600 800]/Contents {len(objects) + 2} 0 R"
            "/Resources<</Font<</F1<</Type/Font/Subtype/Type1/BaseFont/Helvetica>>>>>>>>"
        )
        objects.append(f"<</Length {len(stream)}>>stream\n{stream}\nendstream")
    objects[1] = f"<</Type/Pages/Kids[{' '.join(kids)}]/Count {len(kids)}>>"
    out = b"%PDF-1.4\n"
    places = []
    for number, body in enumerate(objects, 1):
        places.append(len(out))
        out += f"{number} 0 obj{body}endobj\n".encode()
    table = "".join(f"{place:010d} 00000 n \n" for place in places)
    return (
        out
        + f"xref\n0 {len(objects) + 1}\n0000000000 65535 f \n{table}trailer<</Size {len(objects) + 1}/Root 1 0 R>>\nstartxref\n{len(out)}\n%%EOF".encode()
    )


def zipped(files: dict[str, str | bytes]) -> bytes:
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in files.items():
            archive.writestr(name, content)
    return out.getvalue()


W = 'xmlns:w="http://schemas.openxmlformats.org/wordprocessingml/2006/main"'


def docx(body: str, head: str = "") -> bytes:
    return zipped(
        {"word/document.xml": f"<?xml version='1.0'?>{head}<w:document {W}><w:body>{body}</w:body></w:document>"}
    )


def test_pdf_pages_and_a_range_of_them(parse):
    document = pdf("The first page.", "The second page.", "The third page.")
    assert (
        parse("a.pdf", document)
        == "## page 1\nThe first page.\n\n## page 2\nThe second page.\n\n## page 3\nThe third page."
    )
    assert parse("a.pdf", document, first=2, last=2) == "## page 2\nThe second page."
    with pytest.raises(ToolError, match="has 3 parts"):
        parse("a.pdf", document, first=4)


def test_docx_headings_paragraphs_and_tables(parse):
    body = (
        '<w:p><w:pPr><w:pStyle w:val="Heading2"/></w:pPr><w:r><w:t>Trade</w:t></w:r></w:p>'
        "<w:p><w:r><w:t>Salt and </w:t></w:r><w:r><w:t>茶叶.</w:t></w:r></w:p>"
        "<w:tbl><w:tr><w:tc><w:p><w:r><w:t>good</w:t></w:r></w:p></w:tc><w:tc><w:p><w:r><w:t>price</w:t></w:r></w:p></w:tc></w:tr>"
        "<w:tr><w:tc><w:p><w:r><w:t>salt</w:t></w:r></w:p></w:tc><w:tc><w:p><w:r><w:t>3</w:t></w:r></w:p></w:tc></w:tr></w:tbl>"
    )
    assert parse("a.docx", docx(body)) == "## Trade\nSalt and 茶叶.\n| good | price |\n|---|---|\n| salt | 3 |"


def test_docx_of_a_word_processor(parse):
    library = pytest.importorskip("docx", reason="python-docx is not installed")
    document = library.Document()
    document.add_heading("Rivers", 1)
    document.add_paragraph("The Danube is long.")
    out = io.BytesIO()
    document.save(out)
    assert parse("a.docx", out.getvalue()) == "# Rivers\nThe Danube is long."


def test_xlsx_sheets(parse):
    openpyxl = pytest.importorskip("openpyxl", reason="openpyxl is not installed")
    book = openpyxl.Workbook()
    book.active.title = "Prices"
    for row in (["good", "price"], ["tea", 2.5], ["茶", None]):
        book.active.append(row)
    out = io.BytesIO()
    book.save(out)
    assert parse("a.xlsx", out.getvalue()) == "## sheet Prices\n| good | price |\n|---|---|\n| tea | 2.5 |\n| 茶 |  |"


def test_pptx_slides_in_order(parse):
    library = pytest.importorskip("pptx", reason="python-pptx is not installed")
    deck = library.Presentation()
    for i in range(11):
        slide = deck.slides.add_slide(deck.slide_layouts[1])
        slide.shapes.title.text = f"Title {i}"
        slide.placeholders[1].text = "one\ntwo"
    out = io.BytesIO()
    deck.save(out)
    assert (
        parse("a.pptx", out.getvalue(), first=10, last=11)
        == "## slide 10\nTitle 9\none\ntwo\n\n## slide 11\nTitle 10\none\ntwo"
    )


def test_epub_chapters_in_reading_order(parse):
    chapter = "<html><head><title>{0}</title></head><body><main><p>{0} tells of the sea.</p></main></body></html>"
    book = zipped(
        {
            "META-INF/container.xml": "<container><rootfiles><rootfile full-path='O/p.opf'/></rootfiles></container>",
            "O/p.opf": "<package><manifest><item id='a' href='one.xhtml'/><item id='b' href='t%20wo.xhtml'/></manifest>"
            "<spine><itemref idref='b'/><itemref idref='a'/></spine></package>",
            "O/one.xhtml": chapter.format("Alpha"),
            "O/t wo.xhtml": chapter.format("Beta"),
        }
    )
    text = parse("a.epub", book)
    assert text.index("Beta tells of the sea.") < text.index("Alpha tells of the sea.")


def test_html_csv_and_text(parse):
    html = (
        b"<html><head><title>T</title></head><body><nav>menu</nav><main><p>Body of the page.</p></main></body></html>"
    )
    assert parse("a.html", html) == "# T\nBody of the page."
    assert (
        parse("a.csv", 'name;note\nx;"a|b; c"\n'.encode("utf-8-sig")) == "| name | note |\n|---|---|\n| x | a\\|b; c |"
    )
    assert parse("a.tsv", b"a\tb\n1\t2\n") == "| a | b |\n|---|---|\n| 1 | 2 |"
    assert parse("a.txt", "北京".encode("gb18030")) == "北京"


def test_long_documents_are_paged_by_the_rule_of_all_tools(parse, tmp_path):
    text = parse("a.pdf", pdf(*(f"Page number {i} says something of its own." for i in range(60))))
    path = implicit_context.store_result(tmp_path / "workspace", text)
    assert (tmp_path / "workspace" / path).read_text() == text
    assert len(implicit_context.shorten_result(text, text.split("\n\n"), path, 700)) <= 700


def test_a_zip_bomb_is_refused_before_it_is_unpacked(parse, monkeypatch):
    bomb = zipped({"word/document.xml": b"0" * (40 << 20)})
    assert len(bomb) < 100_000
    with pytest.raises(ToolError, match="more than 300 to 1"):
        parse("bomb.docx", bomb)
    with pytest.raises(ToolError, match="unpacks to 80 MB, at most 64 MB"):
        parse("bomb.docx", zipped({"word/document.xml": b"0" * (40 << 20), "x": b"0" * (40 << 20)}))
    with pytest.raises(ToolError, match="entries, at most 5000"):
        parse("many.docx", zipped({f"{i}": b"" for i in range(5_001)}))


def test_entities_are_not_expanded_and_no_file_is_read(parse, tmp_path):
    (tmp_path / "secret").write_text("secret")
    head = f"<!DOCTYPE d [<!ENTITY s SYSTEM 'file://{tmp_path}/secret'>]>"
    assert "secret" not in parse("a.docx", docx("<w:p><w:r><w:t>a&s;b</w:t></w:r></w:p>", head))
    laughs = "".join(f"<!ENTITY l{i} '{f'&l{i - 1};' * 10 if i else 'ha' * 10}'>" for i in range(10))
    try:
        text = parse("b.docx", docx("<w:p><w:r><w:t>x&l9;</w:t></w:r></w:p>", f"<!DOCTYPE d [{laughs}]>"))
    except ToolError as error:
        text = str(error)
    assert len(text) < 1_000


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.pdf", b"%PDF-1.4 nothing", "damaged or needs a password"),
        ("a.docx", b"PK\x03\x04 nothing", "damaged"),
        ("a.docx", docx("<w:p>")[:-40], "damaged"),
        ("a.docx", docx("<w:p>"), "XML is damaged"),
        ("a.zip", zipped({"a": "b"}), "no document"),
        ("a.doc", b"\xd0\xcf\x11\xe0" + b"x" * 100, "old Office file"),
        ("a.bin", b"\0\1\2", "no document"),
        ("scan.pdf", pdf(""), "may be scanned"),
    ],
)
def test_what_cannot_be_read_is_told(parse, name, content, message):
    with pytest.raises(ToolError, match=message):
        parse(name, content)


def test_a_parser_that_takes_too_much_ends_alone(parse, tmp_path, monkeypatch):
    slow = tmp_path / "slow"
    slow.write_text("#!/bin/sh\nexec sleep 30\n")
    slow.chmod(0o755)
    monkeypatch.setattr(file_parser.sys, "executable", str(slow))
    with pytest.raises(ToolError, match="takes too long"):
        parse("a.pdf", pdf("x"), seconds=0.7)
    monkeypatch.setattr(file_parser.sys, "executable", "/bin/false")
    with pytest.raises(ToolError, match="too much memory or time"):
        parse("a.pdf", pdf("x"))


def test_size_and_place_of_the_file_are_limited(parse, tmp_path, monkeypatch):
    monkeypatch.setattr(file_parser, "MAX_FILE_BYTES", 10)
    with pytest.raises(ToolError, match="at most 10 can be read"):
        parse("a.txt", b"x" * 11)
    (tmp_path / "workspace" / "link").symlink_to("/etc/passwd")
    with pytest.raises(ToolError, match="symbolic link"):
        parse("b.txt", b"", path="link")


def test_an_unknown_option_is_refused():
    with pytest.raises(ToolHostError, match="no option x"):
        file_parser.build_tool({"x": 1}, None)
