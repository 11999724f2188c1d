"""Articles: Wikipedia and Baike pages, academic papers, PleIAs' SYNTH.

Formats as published: MediaWiki's export schema 0.11; Baike dumps as JSONL of title, summary, sections, url; Semantic
Scholar's S2ORC (both its releases) and arXiv's metadata; SYNTH's Parquet columns
(huggingface.co/datasets/PleIAs/SYNTH).
"""

import html
import json
import re

from stepdr_jax.data.sources.fields import common, parsed, text

WIKIPEDIA_LICENSE = "CC-BY-SA-4.0"
_DROPPED = re.compile(
    r"<!--.*?-->|<(ref|math|gallery|timeline|score)\b[^>]*?(?:/>|>.*?</\1\s*>)", re.DOTALL | re.IGNORECASE
)
_TAG = re.compile(r"</?[a-zA-Z][^<>]*>")
_BRACES = re.compile(r"\{\{|\}\}|\{\||\|\}")
_FILE = re.compile(r"\[\[(?:[^\[\]:|]+):(?:[^\[\]]|\[\[[^\[\]]*\]\])*\]\]")
_LINK = re.compile(r"\[\[(?:[^\[\]|]*\|)?([^\[\]|]*)\]\]")
_OUTSIDE = re.compile(r"\[(?:https?:)?//[^\s\]]+\s*([^\]]*)\]")
_HEADING = re.compile(r"^(=+)\s*(.*?)\s*\1\s*$", re.MULTILINE)


def wikipedia(page: dict) -> dict | None:
    """Title and plain text of a page; None for redirects and pages outside the main namespace."""
    if page["ns"] != "0" or page["redirect"]:
        return None
    body = plain_wikitext(page["text"])
    if not body:
        raise ValueError(f"page {page['title']!r} has no text")
    url = f"{page['base']}/{page['title'].replace(' ', '_')}" if page["base"] else ""
    row = dict(
        id=page["id"] and f"wikipedia/{page['lang']}/{page['id']}", text=f"{page['title']}\n\n{body}", provenance=url
    )
    lang = page["lang"].split("-")[0]
    return row | {"license": WIKIPEDIA_LICENSE} | ({"lang": lang} if lang else {})


def plain_wikitext(source: str) -> str:
    """Returns the prose of wikitext without templates, tables, references, files and markup; headings become lines."""
    source = _without_braces(_DROPPED.sub("", source))
    source = _LINK.sub(r"\1", _FILE.sub("", source))
    source = _OUTSIDE.sub(r"\1", source)
    source = _HEADING.sub(r"\n\2\n", _TAG.sub("", source))
    source = html.unescape(source.replace("'''", "").replace("''", "")).replace("__NOTOC__", "").replace("__TOC__", "")
    lines = (line.strip().lstrip("*#:;").strip() for line in source.splitlines())
    return re.sub(r"\n{3,}", "\n\n", "\n".join(lines)).strip()


def _without_braces(source: str) -> str:
    """Drops {{templates}} and {|tables|}, nested ones too; an unclosed one is dropped to the end."""
    kept, depth, start = [], 0, 0
    for match in _BRACES.finditer(source):
        opens = match.group() in ("{{", "{|")
        if opens and not depth:
            kept.append(source[start : match.start()])
        depth = depth + 1 if opens else max(depth - 1, 0)
        if not depth:
            start = match.end()
    return "".join(kept) + ("" if depth else source[start:])


def baike(line: bytes) -> dict:
    """An entry {title, summary, sections: [{title, content}], url}; text and title are enough."""
    row = parsed(line)
    sections = row.get("sections") or []
    parts = [row.get("summary") or row.get("abstract") or row.get("text") or ""]
    parts += [f"{section.get('title') or ''}\n{section.get('content') or ''}".strip() for section in sections]
    body = "\n\n".join(part for part in parts if part)
    return dict(lang="zh") | common(row) | {"text": f"{text(row['title'], 'title')}\n\n{text(body, 'summary')}"}


def paper(line: bytes) -> dict:
    """A paper of S2ORC (`content` or `pdf_parse`), of arXiv's metadata (title and abstract), or plain `text`."""
    row = parsed(line)
    own = common(row)
    own["license"] = own.get("license", "")
    if isinstance(row.get("content"), dict):
        body = row["content"]
        access = ((body.get("source") or {}).get("oainfo")) or {}
        own |= dict(license=access.get("license") or own["license"], provenance=access.get("openaccessurl") or "")
        title = _annotated(body, "title")
        return own | dict(id=f"s2orc/{row['corpusid']}", text=_joined(title, text(body.get("text"), "content.text")))
    if isinstance(row.get("pdf_parse"), dict):
        sections: dict[str, list[str]] = {}
        for paragraph in row["pdf_parse"].get("body_text") or []:
            sections.setdefault(paragraph.get("section") or "", []).append(paragraph["text"])
        body = "\n\n".join(_joined(name, "\n".join(texts)) for name, texts in sections.items())
        return own | dict(
            id=f"s2orc/{row['paper_id']}", text=_joined(row.get("title"), _abstract(row), text(body, "pdf_parse"))
        )
    if "text" in row:
        return own | {"text": _joined(row.get("title"), text(row["text"], "text"))}
    if isinstance(row.get("authors_parsed", row.get("categories")), list | str):
        own |= dict(id=f"arxiv/{row['id']}", provenance=f"https://arxiv.org/abs/{row['id']}")
    return own | {"text": _joined(text(row["title"], "title"), text(_abstract(row), "abstract"))}


def _abstract(row: dict) -> str:
    abstract = row.get("abstract") or ""
    return "\n".join(part["text"] for part in abstract) if isinstance(abstract, list) else abstract


def _annotated(body: dict, name: str) -> str:
    """Text under the first annotation of a name; S2ORC keeps annotations as JSON text of {start, end}."""
    spans = (body.get("annotations") or {}).get(name)
    spans = json.loads(spans) if isinstance(spans, str) else spans
    found = body["text"][int(spans[0]["start"]) : int(spans[0]["end"])] if spans else ""
    return "" if body["text"].startswith(found) else found  # the text begins with it


def _joined(*parts: str | None) -> str:
    return "\n\n".join(" ".join(part.split()) if "\n" not in part else part.strip() for part in parts if part)


def synth(row: dict) -> dict:
    """A row of SYNTH: the query; then, trained on, the reasoning between <think> tags and the answer."""
    thought = row.get("synthetic_reasoning") or ""
    answer = text(row["synthetic_answer"], "synthetic_answer")
    completion = f"<think>\n{thought.strip()}\n</think>\n{answer}" if thought.strip() else answer
    return dict(
        id=f"synth/{row['synth_id']}",
        prompt=text(row["query"], "query"),
        completion=completion,
        chat=True,
        loss="completion",
        lang=row.get("language") or "",
        license=row.get("seed_license") or "",
        provenance=row.get("query_seed_url") or "",
    )
