"""The user's own documents as pages of the host library.test.

Markdown, HTML, plain text and PDF become passages, one per paragraph. Links between the documents are kept, so that
they form a graph like the built-in pages. A file that cannot be read stops the build with an error that names it: a
silently omitted document would be noticed much later.
"""

import html.parser
import os
import re
import unicodedata
from collections.abc import Iterable, Iterator
from pathlib import Path
from urllib.parse import quote, unquote, urljoin, urlsplit

from tools_env.errors import ToolError, ToolHostError
from tools_env.search import text
from tools_env.web.charset import decode_body
from tools_env.web.fetch import FetchedPage
from tools_env.web.page import extract_page

HOST = "library.test"
SITE = {"authority": 1, "behaviour": "normal", "about": "your own documents"}
MAX_PASSAGE = 400  # characters; a longer paragraph is cut between sentences
TYPES = {
    ".md": "text/markdown",
    ".markdown": "text/markdown",
    ".txt": "text/plain",
    ".html": "text/html",
    ".htm": "text/html",
    ".pdf": "application/pdf",
}
_LINK = re.compile(r"(?<!!)\[([^\]\n]+)\]\(\s*<?([^()\s<>]*(?:\([^()\s]*\)[^()\s<>]*)*)>?(?:\s+\"[^\"\n]*\")?\s*\)")
_BLOCK = re.compile(r"\s*(?:#|>|\||```|~~~|[-*+]\s|\d{1,3}[.)]\s)")
_SETEXT = re.compile(r"\s*(=+|-{3,})\s*$")
_FENCE = re.compile(r"\s*(```|~~~)")
_FRONT_MATTER = re.compile(r"\A---\r?\n(.*?)\r?\n---[ \t]*(?:\r?\n|\Z)", re.DOTALL)
_FIELD = re.compile(r"^(title|date):\s*[\"']?(.*?)[\"']?\s*$", re.MULTILINE | re.IGNORECASE)
_DATE = re.compile(r"\d{4}-\d{2}-\d{2}")
_SENTENCES = re.compile(r"(?<=[.!?])\s+|(?<=[。！？])")
_HAN = re.compile(r"[\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff]")
_LETTER = re.compile(r"[^\W\d_]")


def read_folder(documents: str | os.PathLike) -> list[dict]:
    """Returns a row of documents.jsonl per file, in order of their paths; hidden files and other types are skipped.

    Raises:
        ToolHostError: the folder is missing or has no document, or a document cannot be read or has no text.
    """
    root = Path(documents).expanduser()
    if not root.is_dir():
        raise ToolHostError(
            f"expected a folder of documents, got {root}, which is not one; correct config.offline_web.documents"
        )
    try:
        paths = sorted(document_files(root))
    except OSError as error:
        raise ToolHostError(
            f"cannot read the folder {error.filename or root}: {error.strerror}; change its permissions"
        ) from None
    if not paths:
        kinds = ", ".join(sorted(suffix[1:] for suffix in TYPES))
        raise ToolHostError(
            f"expected documents ({kinds}) in {root}, found none; correct config.offline_web.documents or add some"
        )
    urls = {path.resolve(): _url(path.relative_to(root)) for path in paths}
    return [_document(path, root, urls) for path in paths]


def document_files(root: Path) -> Iterator[Path]:
    def fail(error: OSError):
        raise error

    for folder, subfolders, names in os.walk(root, onerror=fail, followlinks=False):
        subfolders[:] = [name for name in subfolders if not name.startswith(".")]
        for name in names:
            if not name.startswith(".") and Path(name).suffix.lower() in TYPES:
                yield Path(folder) / name


def _url(relative: Path, host: str = HOST) -> str:
    return f"http://{host}/{quote(relative.as_posix())}"


def _document(path: Path, root: Path, urls: dict[Path, str]) -> dict:
    try:
        body = path.read_bytes()
    except OSError as error:
        raise ToolHostError(
            f"cannot read the document {path}: {error.strerror}; change its permissions or remove it"
        ) from None
    relative = path.relative_to(root)
    row, links = _read(body, relative, HOST, SITE["authority"], str(path))
    return row | {"links": _resolved(links, path, row["url"], urls)}


def read_document_file(body: bytes, relative: Path, host: str, authority: int, shown: str) -> dict:
    """Returns the row of one document, without its links.

    Args:
        body: the file's bytes; their type follows from the extension in `relative`.
        relative: path below the folder, which becomes the address on `host`.
        shown: the file's name in errors.

    Raises:
        ToolHostError: it cannot be read or has no text.
    """
    return _read(body, relative, host, authority, shown)[0]


def _read(body: bytes, relative: Path, host: str, authority: int, shown: str) -> tuple[dict, list[tuple[str, str]]]:
    url, kind = _url(relative, host), TYPES[relative.suffix.lower()]
    links: list[tuple[str, str]] = []
    if kind in ("text/markdown", "text/plain"):
        if b"\x00" in body and not body.startswith((b"\xff\xfe", b"\xfe\xff")):
            raise ToolHostError(f"the document {shown} is not text; give it its true extension or remove it")
        content = (
            body.decode("utf-16") if body.startswith((b"\xff\xfe", b"\xfe\xff")) else decode_body(body, "utf-8-sig")
        )
        title, date, lines = _markdown(content)
        if kind == "text/markdown":
            links = [(anchor, target) for anchor, target in _LINK.findall(content)]
    else:
        try:
            page = extract_page(FetchedPage(url, kind, None, body))
        except ToolError as error:
            raise ToolHostError(f"cannot read the document {shown}: {error}; repair or remove it") from None
        title, date, lines = page.title, page.published_at, page.passages
        if kind == "text/html":
            links = _html_links(decode_body(body, None))
    # Links are stored beside the text; inside it they would separate its words.
    lines = split_paragraphs(line if line.startswith("#") else text.passage(line) for line in lines)
    if not any(text.passage(line) for line in lines):
        raise ToolHostError(
            f"the document {shown} has no text (a scan needs text recognition first); convert or remove it"
        )
    title = " ".join((title or relative.stem.replace("_", " ")).split())[:120]
    content = "\n".join(line for line in lines if line and (line.lstrip("# ") != title or not line.startswith("#")))
    row = {
        "id": f"{host}/{relative.as_posix()}",
        "url": url,
        "title": title,
        "text": f"# {title}\n{content}",
        "lang": detect_language(content),
        "source": "folder",
        "authority": authority,
        "published_at": date,
    }
    return row, links


def split_paragraphs(lines: Iterable[str]) -> list[str]:
    """Returns the lines with long paragraphs cut between sentences."""
    return [piece for line in lines for piece in _pieces(line)]


def detect_language(content: str) -> str:
    """Returns "zh" when Chinese characters make up at least a fifth of the letters, else "en"."""
    letters = len(_LETTER.findall(content))
    return "zh" if letters and len(_HAN.findall(content)) >= 0.2 * letters else "en"


def _markdown(content: str) -> tuple[str, str | None, list[str]]:
    """Returns title, date and lines: a wrapped paragraph becomes one line; headings keep their mark."""
    title, date = "", None
    if matter := _FRONT_MATTER.match(content):
        fields = {name.lower(): value for name, value in _FIELD.findall(matter.group(1))}
        title, found = fields.get("title", ""), _DATE.match(fields.get("date", ""))
        date, content = found.group() if found else None, content[matter.end() :]
    lines: list[str] = []
    continues, fenced = False, False
    for raw in content.splitlines():
        line = raw.strip()
        if _FENCE.match(raw):
            fenced, continues = not fenced, False
        elif fenced:
            lines.append(line.lstrip("#"))
        elif not line:
            continues = False
        elif continues and (rule := _SETEXT.match(raw)):
            lines[-1] = ("# " if rule.group(1)[0] == "=" else "## ") + lines[-1]
            continues = False
        elif continues and not _BLOCK.match(raw):
            lines[-1] += ("" if _wide(lines[-1][-1]) and _wide(line[0]) else " ") + line
        else:
            lines.append(line)
            continues = not line.startswith(("#", "|"))
    headings = [line.lstrip("#").strip() for line in lines if line.startswith("#")]
    first = next((text.passage(line) for line in lines if text.passage(line)), "")
    return title or (headings[0] if headings else first), date, lines


def _wide(character: str) -> bool:
    """Returns whether no space is written beside it, as for Chinese characters and punctuation."""
    return unicodedata.east_asian_width(character) in "WF"


def _pieces(line: str) -> Iterator[str]:
    """Cuts a long paragraph between sentences; a sentence is never cut."""
    if len(line) <= MAX_PASSAGE or line.startswith(("#", "|")):
        yield line
        return
    piece = ""
    for sentence in filter(None, _SENTENCES.split(line)):
        if piece and len(piece) + len(sentence) >= MAX_PASSAGE:
            yield piece
            piece = ""
        piece += (" " if piece and not _wide(piece[-1]) else "") + sentence
    if piece:
        yield piece


class _Anchors(html.parser.HTMLParser):
    """Collects the links of a page with their texts."""

    def __init__(self):
        super().__init__()
        self.found: list[tuple[str, str]] = []
        self._href: str | None = None
        self._text: list[str] = []

    def handle_starttag(self, tag, attrs):
        if tag == "a":
            self._href, self._text = dict(attrs).get("href"), []

    def handle_data(self, data):
        self._text.append(data)

    def handle_endtag(self, tag):
        if tag == "a" and self._href:
            self.found.append((" ".join("".join(self._text).split()), self._href))
            self._href = None


def _html_links(content: str) -> list[tuple[str, str]]:
    anchors = _Anchors()
    anchors.feed(content)
    return anchors.found


def _resolved(links: list[tuple[str, str]], path: Path, url: str, urls: dict[Path, str]) -> list[dict]:
    """Returns links to other documents, with their addresses here, and links to the web; other links are dropped."""
    found = {}
    for anchor, target in links:
        parts = urlsplit(target)
        if parts.scheme in ("http", "https"):
            address = target
        elif parts.scheme or parts.netloc or not parts.path:
            continue
        else:
            address = urljoin(url, parts.path)
            file = Path(os.path.normpath(path.parent / unquote(parts.path)))
            address = urls.get(file.resolve(), address)
            if address not in urls.values():
                continue
        if anchor.strip() and address != url:
            found.setdefault((anchor.strip(), address), {"anchor": anchor.strip(), "url": address})
    return list(found.values())
