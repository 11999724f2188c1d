"""Wikipedia dumps: pages of a MediaWiki XML export, and their wikitext as plain paragraphs.

Templates, tables, references, files and categories are removed; links and emphasis become plain words. The result is
prose, not what MediaWiki renders: the output of templates (units, dates, infoboxes) is lost.
"""

import bz2
import dataclasses
import html
import re
import xml.etree.ElementTree
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import quote, urlsplit

from tools_env.errors import ToolHostError

LICENSE = (
    "text of Wikipedia: CC BY-SA, with attribution to its pages; see https://creativecommons.org/licenses/by-sa/4.0/"
)
_COMMENT = re.compile(r"<!--.*?-->", re.DOTALL)
_DROPPED = re.compile(
    r"<(ref|math|gallery|timeline|score|syntaxhighlight|source|imagemap|graph|chem)\b[^<>]*?(?:/>|>.*?</\1\s*>)",
    re.DOTALL | re.IGNORECASE,
)
_TAG = re.compile(r"</?[a-zA-Z][^<>]*>")
_BREAK = re.compile(r"<br\s*/?>", re.IGNORECASE)
_INNER_TEMPLATE = re.compile(r"\{\{[^{}]*\}\}")
_INNER_TABLE = re.compile(r"^[:\s]*\{\|(?:(?!^[:\s]*\{\|).)*?^\s*\|\}", re.DOTALL | re.MULTILINE)
_INNER_LINK = re.compile(r"\[\[([^\[\]|]*)(?:\|([^\[\]]*))?\]\]")
_NOT_PROSE = re.compile(
    r"^\s*(?:file|image|category|datei|文件|檔案|图像|圖像|分类|分類|[a-z]{2,3}(?:-[a-z]+)?)\s*:", re.IGNORECASE
)
_EXTERNAL = re.compile(r"\[(?:https?:)?//[^\s\]]+\s*([^\]]*)\]")
_EMPHASIS = re.compile(r"'{2,5}")
_HEADING = re.compile(r"^(={1,6})\s*(.+?)\s*\1\s*$")
_SWITCH = re.compile(r"__[A-Z]+__")
_VARIANT = re.compile(r"-\{(?:[^{}|]*\|)?([^{}]*)\}-")
_CHINESE = re.compile(r"^(?:zh-hans|zh-cn|zh):([^\n]*)", re.MULTILINE)
_TAIL = re.compile(
    r"^(?:references|external links|see also|notes|further "
    r"reading|bibliography|参考文献|參考文獻|外部链接|外部連結|参见|參見|注释|註釋)$",
    re.IGNORECASE,
)


@dataclasses.dataclass(frozen=True)
class DumpPage:
    title: str
    url: str
    lang: str
    revision: str  # changes with the page
    published_at: str | None  # date of the revision
    wikitext: str


def dump_pages(path: Path) -> Iterator[DumpPage]:
    """Yields the articles of an .xml or .xml.bz2 dump in its order; redirects and other namespaces are skipped.

    Memory use is constant. Raises ToolHostError when the file is not a dump or is truncated.
    """
    opener = bz2.open if path.suffix == ".bz2" else open
    host, lang = "en.wikipedia.org", "en"
    try:
        with opener(path, "rb") as file:
            root, here = None, False
            for event, node in xml.etree.ElementTree.iterparse(file, events=("start", "end")):
                name = node.tag.rpartition("}")[2]
                if root is None:
                    root, here = node, name == "mediawiki"
                    lang = node.get("{http://www.w3.org/XML/1998/namespace}lang", lang)
                    if not here:
                        raise ToolHostError(f"expected a MediaWiki export, got <{name}> in {path}; correct the source")
                if event == "start":
                    continue
                if name == "base" and node.text:
                    host = urlsplit(node.text).hostname or host
                elif name == "page":
                    if (found := _page(node, host, lang)) is not None:
                        yield found
                    root.clear()
            if not here:
                raise ToolHostError(f"expected a MediaWiki export, got an empty file {path}; correct the source")
    except (xml.etree.ElementTree.ParseError, EOFError, OSError) as error:
        raise ToolHostError(f"cannot read the dump {path} to its end ({error}); download it again") from None


def _page(node, host: str, lang: str) -> DumpPage | None:
    fields = {child.tag.rpartition("}")[2]: child for child in node}
    if fields["ns"].text != "0" or "redirect" in fields or "revision" not in fields:
        return None
    revision = {child.tag.rpartition("}")[2]: child.text or "" for child in fields["revision"]}
    title, content = fields["title"].text or "", revision.get("text", "")
    if not content or re.match(r"\s*#(?:redirect|重定向)", content, re.IGNORECASE):
        return None
    return DumpPage(
        title=title,
        url=f"http://{host}/wiki/{quote(title.replace(' ', '_'), safe='/:,()')}",
        lang="zh" if lang.startswith("zh") else "en",
        revision=revision.get("id", "") or revision.get("sha1", ""),
        published_at=revision.get("timestamp", "")[:10] or None,
        wikitext=content,
    )


def plain_text(wikitext: str) -> str:
    """Returns wikitext as Markdown: one paragraph or list item per line, headings with #.

    Reference sections are omitted.
    """
    content = _DROPPED.sub("", _COMMENT.sub("", wikitext))
    content = _to_end(_INNER_TEMPLATE, "", content)
    content = _to_end(_INNER_TABLE, "", content)
    content = _to_end(_VARIANT, lambda m: _variant(m.group(1)), content)
    content = _to_end(_INNER_LINK, _link, content)
    content = _EXTERNAL.sub(r"\1", content)
    content = _EMPHASIS.sub("", _SWITCH.sub("", content))
    content = html.unescape(_TAG.sub("", _BREAK.sub(" ", content)))
    lines: list[str] = []
    skipping = 0
    for raw in content.splitlines():
        line = " ".join(raw.split())
        if heading := _HEADING.match(line):
            level = len(heading.group(1))
            if skipping and level > skipping:
                continue
            skipping = level if _TAIL.match(heading.group(2)) else 0
            line = "#" * level + " " + heading.group(2)
        else:
            line = line.lstrip("*#:; ")
        if line and not skipping and not line.startswith(("|", "{|", "!", "{{", "}}")):
            lines.append(line)
    return "\n".join(lines)


def _to_end(pattern: re.Pattern, replacement, content: str) -> str:
    """Replaces nested matches from the inside out."""
    for _ in range(40):
        content, count = pattern.subn(replacement, content)
        if not count:
            break
    return content


def _variant(content: str) -> str:
    """Returns the simplified form of Chinese Wikipedia's -{zh-hans:x; zh-hant:y}-."""
    found = _CHINESE.search(content.replace(";", "\n").replace(" ", ""))
    return found.group(1) if found else content


def _link(match: re.Match) -> str:
    target, shown = match.group(1), match.group(2)
    if _NOT_PROSE.match(target):
        return ""
    return (shown.rpartition("|")[2] if shown else "") or target.lstrip(":")
