"""Text rules shared by the index and the page parser: from text to passages and from passages to tokens.

A passage is one paragraph or list item, without markup. Tokens are words with case, accents and plural s removed,
without function and question words. Chinese and Japanese have no spaces, so their tokens are overlapping pairs of
characters, and the full-text engine needs no dictionary.
"""

import functools
import re
import unicodedata

_CJK = "\u3005\u3007\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff"
_WORD_OR_CJK = re.compile(f"[{_CJK}]+|[^\\W{_CJK}_]+")
_CJK_CHARACTER = re.compile(f"[{_CJK}]")
_SPACES = re.compile(r"\s+")
_LINK = re.compile(r"!?\[([^\]]*)\]\([^()\s]*(?:\([^()\s]*\)[^()\s]*)*\)")
_LIST_MARK = re.compile(r"^(?:[-*+•]|\d{1,3}[.)])\s+")
_EMPHASIS = re.compile(r"(\*\*|__|`)(?=\S)(.+?)(?<=\S)\1")
_CJK_FUNCTION = re.compile("请问|什么|多少|哪里|哪个|哪些|[的是哪谁吗呢]")
_FUNCTION = frozenset(
    "a an the of in on at to for and or is are was were be been by with from as its it this that what which who whom "
    "whose when where how many much does do did has have please tell me about".split()
)
_RULE = re.compile(r"^[-*_=|:\s]+$")


def passage(line: str) -> str:
    """Returns a markdown line as plain passage text; "" for headings, rules and blank lines.

    The same paragraph read from the documents file and from the served page gives the same text, so it gets the same
    citation id.
    """
    line = _SPACES.sub(" ", unicodedata.normalize("NFC", line)).strip()
    if not line or line.startswith("#") or _RULE.match(line):
        return ""
    line = _LIST_MARK.sub("", line.lstrip("> "))
    line = _EMPHASIS.sub(r"\2", _LINK.sub(r"\1", line))
    if line.startswith("|") and line.endswith("|"):
        line = " | ".join(cell.strip() for cell in line.strip("|").split("|"))
    return line.strip()


def passages(markdown: str) -> list[str]:
    """Returns the passages of a page in order, each once."""
    return list(dict.fromkeys(text for line in markdown.splitlines() if (text := passage(line))))


def _fold(word: str) -> str:
    word = "".join(c for c in unicodedata.normalize("NFKD", word) if not unicodedata.combining(c)).casefold()
    if len(word) > 3 and word.endswith("ies"):
        return word[:-3] + "y"
    if len(word) > 3 and word.endswith("s") and not word.endswith("ss"):
        return word[:-1]
    return word


@functools.lru_cache(maxsize=1 << 12)
def tokens(text: str) -> tuple[str, ...]:
    """Returns search tokens in order: folded words, and character pairs of CJK runs (single characters are kept)."""
    found = []
    for run in _WORD_OR_CJK.findall(unicodedata.normalize("NFKC", text)):
        if _CJK_CHARACTER.match(run):
            for part in filter(None, _CJK_FUNCTION.split(run)):
                found.extend([part] if len(part) == 1 else (part[i : i + 2] for i in range(len(part) - 1)))
        elif (word := run.casefold()) not in _FUNCTION:
            found.append(_fold(word))
    return tuple(found)


def is_cjk(token: str) -> bool:
    return bool(_CJK_CHARACTER.match(token))


def estimated_tokens(text: str) -> int:
    """Returns the approximate number of language model tokens: one per CJK character, one per four others."""
    wide = len(_CJK_CHARACTER.findall(text))
    return wide + -(-(len(text) - wide) // 4)
