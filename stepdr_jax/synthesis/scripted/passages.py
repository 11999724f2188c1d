"""Cited passages as the tools show them, read back from the text of an observation."""

import dataclasses
import re

from stepdr_jax.synthesis.scripted import sentences

_SEARCH_HEADER = re.compile(r"\d+\. .* \| (\S+) \| ?\S*")
_PAGE_HEADER = re.compile(r".* \| https?://([^/\s|]+)\S* \| ?\S*")
_PASSAGE = re.compile(r"(.+?)\s*\\cite\{(web_[a-z]{8})\}")


@dataclasses.dataclass(frozen=True)
class Passage:
    host: str
    text: str
    id: str
    statement: sentences.Statement | None


def read_passages(text: str) -> list[Passage]:
    """Reads the cited passages of a search result or an opened page, with the host that each stands under."""
    host, passages = "", []
    for line in text.splitlines():
        line = line.strip()
        if match := _PASSAGE.fullmatch(line):
            passages.append(Passage(host, match.group(1), match.group(2), sentences.parse_statement(match.group(1))))
        elif match := _SEARCH_HEADER.fullmatch(line) or _PAGE_HEADER.fullmatch(line):
            host = match.group(1)
    return passages
