"""Extracts title, date and passages of a fetched page: HTML, plain text and PDF.

The main content is what <main> or <article> declares, else what trafilatura finds, else all visible text. Heavy parsers
are imported on first use.
"""

import dataclasses
import json
import re
import resource
import subprocess
import sys

from tools_env.errors import ToolError
from tools_env.search import text
from tools_env.web.charset import decode_body
from tools_env.web.fetch import FetchedPage

VERSION = "2"  # part of the cache key; raise when the same bytes give another result

_DATE = re.compile(r"\d{4}-\d{2}-\d{2}")
_DATE_NAMES = ("article:published_time", "date", "dc.date", "dcterms.date", "datepublished", "last-modified")
_HEADINGS = frozenset({"h1", "h2", "h3", "h4", "h5", "h6"})
_BLOCKS = frozenset(
    "address article aside blockquote body dd details div dl dt fieldset figcaption figure "
    "footer form header hr li main "
    "nav ol p pre section summary table tbody tfoot thead ul".split()
)
_HIDDEN = frozenset("aside button footer form head header nav noscript script select style svg template".split())
_SENTENCE_END = (".", "!", "?", "。", "！", "？", ":", "：")
_MAX_EXTRACTED = 500_000  # characters; larger pages skip trafilatura, which took 18 s on 4 million characters of links
# For pages that no parser handles, such as deeply nested ones.
_UNREAD = re.compile(r"<!--.*?-->|<(script|style|head)\b.*?</\1\s*>", re.DOTALL | re.IGNORECASE)
_TAG = re.compile(r"<[^<>]{0,5000}>")
_PDF_SECONDS = 20
_PDF_MEMORY = 2 << 30  # bytes of address space
_MAX_PAGES = 500  # of a PDF


@dataclasses.dataclass(frozen=True)
class ExtractedPage:
    title: str
    published_at: str | None  # ISO date
    passages: list[str]


def extract_page(fetched: FetchedPage) -> ExtractedPage:
    """Returns the content of a page. Blocking (1-10 ms for HTML, more for PDF). Raises ToolError when unreadable."""
    if fetched.media_type == "application/pdf":
        return _read_pdf(fetched.body)
    content = decode_body(fetched.body, fetched.charset)
    if fetched.media_type in ("text/plain", "text/markdown"):
        lines = content.splitlines()
        title = next((line.lstrip("# ").strip() for line in lines if line.strip()), "")
        return ExtractedPage(title[:120], None, text.passages(content))
    return _read_html(content)


def _read_html(content: str) -> ExtractedPage:
    import lxml.html

    if not content.strip():
        return ExtractedPage("", None, [])
    try:
        # Bytes, because lxml rejects text with an encoding declaration.
        root = lxml.html.document_fromstring(
            content.encode("utf-8", "replace"), parser=lxml.html.HTMLParser(encoding="utf-8")
        )
    except (lxml.etree.LxmlError, ValueError):
        raise ToolError("unreadable page") from None
    titles = (node.text_content() for path in ("title", "h1") for node in root.iter(path))
    title = next((" ".join(t.split()) for t in titles if t.strip()), "")
    main = [node for node in root.iter("main", "article")]
    passages = text.passages(_lines(main[0])) if main else []
    if not passages and len(content) <= _MAX_EXTRACTED:
        import trafilatura

        extracted = trafilatura.extract(
            content, output_format="markdown", include_comments=False, include_links=False, favor_recall=True
        )
        passages = text.passages(extracted or "")
    passages = passages or text.passages(_lines(root)) or text.passages(_TAG.sub("\n", _UNREAD.sub("", content)))
    return ExtractedPage(title, _date(root), passages)


def _date(root) -> str | None:
    named = {}
    for meta in root.iter("meta"):
        name = (meta.get("property") or meta.get("name") or meta.get("itemprop") or "").lower()
        named.setdefault(name, meta.get("content") or "")
    candidates = [named.get(name, "") for name in _DATE_NAMES] + [t.get("datetime") or "" for t in root.iter("time")]
    return next((found.group() for value in candidates if (found := _DATE.match(value.strip()))), None)


def _lines(root) -> str:
    """Returns visible text, one block per line; headings are marked with # so that they do not become passages."""
    out: list[str] = []

    def walk(node):
        tag = node.tag if isinstance(node.tag, str) else None
        hidden = tag is None or tag in _HIDDEN or node.get("hidden") is not None
        block = tag in _BLOCKS or tag in _HEADINGS or tag in ("tr", "br")
        if not hidden:
            if block:
                out.append("\n# " if tag in _HEADINGS else "\n")
            elif tag in ("td", "th") and node.getprevious() is not None:
                out.append(" | ")
            out.append(" ".join(node.text.split("\n")) if node.text else "")
            for child in node:
                walk(child)
            if block:
                out.append("\n")
        out.append(" ".join(node.tail.split("\n")) if node.tail and node is not root else "")

    walk(root)
    return "".join(out)


def _read_pdf(body: bytes) -> ExtractedPage:
    """Parses a PDF in a separate process with limits, so that a hostile one does not affect the host."""
    try:
        done = subprocess.run(
            [sys.executable, "-m", "tools_env.web.page"],
            input=body,
            capture_output=True,
            timeout=_PDF_SECONDS,
            env={"PATH": "/usr/bin:/bin", "PYTHONPATH": ":".join(sys.path), "LANG": "C.UTF-8"},
        )
        answer = json.loads(done.stdout)
    except (subprocess.TimeoutExpired, ValueError):
        raise ToolError("unreadable PDF: it takes too much time or memory") from None
    if "error" in answer:
        raise ToolError(answer["error"])
    return ExtractedPage(**answer)


def _parse_pdf(body: bytes) -> ExtractedPage:
    import pypdfium2

    try:
        document = pypdfium2.PdfDocument(body)
        title = document.get_metadata_value("Title")
        created = re.match(r"D:(\d{4})(\d{2})(\d{2})", document.get_metadata_value("CreationDate") or "")
        count = min(len(document), _MAX_PAGES)
        pages = [document[i].get_textpage().get_text_bounded() for i in range(count)]
    except pypdfium2.PdfiumError:
        raise ToolError("unreadable PDF") from None
    lines = [line.strip() for page in pages for line in page.splitlines()]
    if not title:
        title = next((line for line in lines if line), "")
    return ExtractedPage(
        title[:120], "-".join(created.groups()) if created else None, text.passages("\n".join(_joined(lines)))
    )


def _joined(lines: list[str]) -> list[str]:
    """Joins the lines of a paragraph, which PDF breaks at the end of a column."""
    paragraphs, current = [], ""
    for line in [*lines, ""]:
        if not line or (current and current.endswith(_SENTENCE_END) and len(current) > 20):
            if current:
                paragraphs.append(current)
            current = line
        elif current and text.is_cjk(current[-1]):
            current += line
        else:
            current = f"{current} {line}".strip()
    if current:
        paragraphs.append(current)
    return paragraphs


def main() -> int:
    """Parses a PDF from standard input, with limits on memory and time, and prints JSON."""
    resource.setrlimit(resource.RLIMIT_AS, (_PDF_MEMORY, _PDF_MEMORY))
    resource.setrlimit(resource.RLIMIT_CPU, (_PDF_SECONDS, _PDF_SECONDS))
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0))
    try:
        answer = dataclasses.asdict(_parse_pdf(sys.stdin.buffer.read()))
    except ToolError as error:
        answer = {"error": str(error)}
    except Exception as error:  # a parser's exception means a broken file
        answer = {"error": f"unreadable PDF ({type(error).__name__})"}
    print(json.dumps(answer))
    return 0


if __name__ == "__main__":
    sys.exit(main())
