"""Text of documents: PDF, Word, Excel, PowerPoint, EPUB, HTML, CSV, plain text. Files are untrusted.

python -m tools_env.tools.documents NAME < FILE

prints a JSON object with the blocks (pages, sheets, slides, chapters) in a process with limits on memory and time, so
that a hostile file does not affect the host. Archives that would unpack to too much are refused before they are
unpacked.
"""

import csv
import io
import json
import posixpath
import resource
import sys
import zipfile
from urllib.parse import unquote

from tools_env.errors import ToolError

MAX_UNPACKED = 64 << 20  # bytes that an archive may unpack to
MAX_ENTRIES = 5_000
MAX_RATIO = 300  # unpacked to packed bytes of one entry above a megabyte
MAX_ROWS = 20_000  # of one table
MAX_PAGES = 2_000
MEMORY_BYTES = 2 << 30  # of the parsing process
CPU_SECONDS = 30

_W = "{http://schemas.openxmlformats.org/wordprocessingml/2006/main}"
_A = "{http://schemas.openxmlformats.org/drawingml/2006/main}"
_ZIPPED = ("docx", "xlsx", "pptx", "epub")


def read_document(name: str, content: bytes) -> list[str]:
    """Returns the blocks of a document as Markdown. The content takes precedence over the name. Raises ToolError."""
    if content.startswith(b"%PDF-"):
        return _pdf(content)
    if content.startswith(b"PK\x03\x04"):
        return _archive(content)
    if content.startswith(b"\xd0\xcf\x11\xe0"):
        raise ToolError("an old Office file (doc, xls, ppt) or an encrypted one; save it as docx, xlsx or pptx")
    ending = name.rpartition(".")[2].lower()
    if b"\0" in content[:4096] and not content.startswith((b"\xff\xfe", b"\xfe\xff")):
        raise ToolError(f"{name} is no document; known are PDF, docx, xlsx, pptx, epub, html, csv, tsv and text")
    text = _decoded(content)
    if ending in ("csv", "tsv"):
        return [_csv(text, "\t" if ending == "tsv" else None)]
    if ending in ("html", "htm", "xhtml") or text[:500].lstrip().lower().startswith(("<!doctype html", "<html")):
        return [_html(content)]
    return [text]


def _decoded(content: bytes) -> str:
    for encoding in ("utf-16",) if content.startswith((b"\xff\xfe", b"\xfe\xff")) else ("utf-8-sig", "gb18030"):
        try:
            return content.decode(encoding)
        except UnicodeDecodeError:
            continue
    return content.decode("latin-1")


def _pdf(content: bytes) -> list[str]:
    import pypdfium2

    try:
        document = pypdfium2.PdfDocument(content)
        count = len(document)
        pages = [document[i].get_textpage().get_text_bounded() for i in range(min(count, MAX_PAGES))]
    except pypdfium2.PdfiumError:
        raise ToolError("the PDF is damaged or needs a password") from None
    if not any(page.strip() for page in pages):
        raise ToolError(f"the PDF has {count} pages and no text; it may be scanned")
    blocks = [f"## page {i}\n{page.replace(chr(13), '').strip()}" for i, page in enumerate(pages, 1)]
    return blocks + ([f"... {count - MAX_PAGES} pages more"] if count > MAX_PAGES else [])


def _archive(content: bytes) -> list[str]:
    try:
        archive = zipfile.ZipFile(io.BytesIO(content))
        entries = archive.infolist()
    except (zipfile.BadZipFile, ValueError, NotImplementedError):
        raise ToolError("the archive is damaged") from None
    check_sizes(entries)
    names = {entry.filename for entry in entries}
    try:
        if "word/document.xml" in names:
            return [_docx(archive)]
        if "ppt/presentation.xml" in names:
            return _pptx(archive, names)
        if "xl/workbook.xml" in names:
            return _xlsx(content)
        if "META-INF/container.xml" in names:
            return _epub(archive)
    except (KeyError, zipfile.BadZipFile, RuntimeError, NotImplementedError, EOFError) as error:
        raise ToolError(f"the document is damaged ({type(error).__name__})") from None
    raise ToolError(f"an archive that is no document; known are {', '.join(_ZIPPED)}; unpack it with shell")


def check_sizes(entries: list[zipfile.ZipInfo]) -> None:
    """Raises ToolError for an archive that would unpack to too much."""
    if len(entries) > MAX_ENTRIES:
        raise ToolError(f"the archive has {len(entries)} entries, at most {MAX_ENTRIES} are read")
    total = sum(entry.file_size for entry in entries)
    if total > MAX_UNPACKED:
        raise ToolError(f"the archive unpacks to {total >> 20} MB, at most {MAX_UNPACKED >> 20} MB are read")
    for entry in entries:
        if entry.file_size > 1 << 20 and entry.file_size > MAX_RATIO * max(entry.compress_size, 1):
            raise ToolError(f"the archive is packed more than {MAX_RATIO} to 1, as no document is")


def _xml(content: bytes):
    from lxml import etree

    # No entities, network or external DTD: documents may refer to /etc/passwd or expand exponentially.
    parser = etree.XMLParser(resolve_entities=False, no_network=True, load_dtd=False, huge_tree=False)
    try:
        return etree.fromstring(content, parser)
    except etree.XMLSyntaxError as error:
        raise ToolError(f"the document's XML is damaged ({str(error)[:80]})") from None


def _docx(archive: zipfile.ZipFile) -> str:
    body = _xml(archive.read("word/document.xml")).find(f"{_W}body")
    lines = []
    for part in body if body is not None else ():
        if part.tag == f"{_W}p":
            text = _word_text(part)
            style = part.find(f"{_W}pPr/{_W}pStyle")
            name = "" if style is None else style.get(f"{_W}val", "")
            if text and (name.startswith("Heading") and name[7:].isdecimal() or name == "Title"):
                text = "#" * (1 if name == "Title" else min(int(name[7:]), 6)) + " " + text
            lines.append(text)
        elif part.tag == f"{_W}tbl":
            rows = [[_word_text(cell) for cell in row.iter(f"{_W}tc")] for row in part.iter(f"{_W}tr")]
            lines.append(_table(rows))
    return "\n".join(line for line in lines if line)


def _word_text(part) -> str:
    words = []
    for node in part.iter(f"{_W}t", f"{_W}tab", f"{_W}br"):
        words.append((node.text or "") if node.tag == f"{_W}t" else " ")
    return "".join(words).strip()


def _pptx(archive: zipfile.ZipFile, names: set[str]) -> list[str]:
    numbers = sorted(
        int(name[16:-4]) for name in names if name.startswith("ppt/slides/slide") and name[16:-4].isdecimal()
    )
    blocks = []
    for number in numbers:
        slide = _xml(archive.read(f"ppt/slides/slide{number}.xml"))
        lines = ["".join(node.text or "" for node in part.iter(f"{_A}t")) for part in slide.iter(f"{_A}p")]
        blocks.append("\n".join([f"## slide {number}", *(line for line in lines if line.strip())]))
    return blocks


def _xlsx(content: bytes) -> list[str]:
    try:
        import openpyxl
    except ImportError:
        raise ToolError("reading xlsx needs the package openpyxl on the tool host (pip install openpyxl)") from None
    try:
        book = openpyxl.load_workbook(io.BytesIO(content), read_only=True, data_only=True)
        blocks = []
        for sheet in book.worksheets:
            rows = []
            for row in sheet.iter_rows(values_only=True, max_row=MAX_ROWS):
                cells = ["" if value is None else str(value) for value in row]
                if any(cells):
                    rows.append(cells)
            blocks.append(f"## sheet {sheet.title}\n{_table(rows)}")
        return blocks
    except (ValueError, TypeError, AttributeError, IndexError, SyntaxError) as error:
        raise ToolError(f"the workbook is damaged ({type(error).__name__})") from None


def _epub(archive: zipfile.ZipFile) -> list[str]:
    container = _xml(archive.read("META-INF/container.xml"))
    package_path = next(node.get("full-path") for node in container.iter("{*}rootfile"))
    package = _xml(archive.read(package_path))
    items = {node.get("id"): node.get("href") for node in package.iter("{*}item")}
    folder = posixpath.dirname(package_path)
    blocks = []
    for reference in package.iter("{*}itemref"):
        href = items.get(reference.get("idref"))
        if href:
            path = posixpath.normpath(posixpath.join(folder, unquote(href)))
            blocks.append(_html(archive.read(path)))
    return [block for block in blocks if block.strip()]


def _html(content: bytes) -> str:
    from tools_env.web import page
    from tools_env.web.fetch import FetchedPage

    found = page.extract_page(FetchedPage("file", "text/html", None, content))
    return "\n".join([f"# {found.title}"] * bool(found.title) + found.passages)


def _csv(text: str, delimiter: str | None) -> str:
    if delimiter is None:
        try:
            delimiter = csv.Sniffer().sniff(text[:4096], ",;\t|").delimiter
        except csv.Error:
            delimiter = ","
    rows = []
    try:
        for row in csv.reader(io.StringIO(text), delimiter=delimiter):
            rows.append(row)
            if len(rows) == MAX_ROWS:
                break
    except csv.Error as error:
        raise ToolError(f"the table is damaged ({error})") from None
    return _table([row for row in rows if row])


def _table(rows: list[list[str]]) -> str:
    width = max(map(len, rows), default=0)
    lines = []
    for number, row in enumerate(rows):
        cells = [cell.replace("|", "\\|").replace("\n", " ").strip() for cell in row] + [""] * (width - len(row))
        lines.append("| " + " | ".join(cells) + " |")
        if number == 0:
            lines.append("|" + "---|" * width)
    return "\n".join(lines)


def main() -> int:
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY_BYTES, MEMORY_BYTES))
    resource.setrlimit(resource.RLIMIT_CPU, (CPU_SECONDS, CPU_SECONDS))
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0))
    try:
        answer = {"blocks": read_document(sys.argv[1], sys.stdin.buffer.read())}
    except ToolError as error:
        answer = {"error": str(error)}
    except (MemoryError, RecursionError):
        answer = {"error": "the document is too large or too deeply nested"}
    except Exception as error:  # a parser's exception means a broken file
        answer = {"error": f"the document is damaged ({type(error).__name__})"}
    sys.stdout.write(json.dumps(answer))
    return 0


if __name__ == "__main__":
    sys.exit(main())
