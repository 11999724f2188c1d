r"""Citation marks: `\cite{web_bakotefi}` or `\cite{web_bakotefi, web_lomihoba}` after a statement."""

import re
from collections.abc import Container

CITATION = re.compile(r"\\cite\{([^{}]*)\}")
CITATION_ID = re.compile(r"web_[a-z]{8}")


def cited_ids(text: str) -> list[str]:
    r"""Ids of every `\cite{a}` or `\cite{a, b}` mark in reading order, repeats kept; empty ids are kept as ''."""
    return [part.strip() for mark in CITATION.findall(text) for part in mark.split(",")]


def resolves(ids: list[str], observed: Container[str]) -> bool:
    """Whether every cited id names an observed passage."""
    return all(id_ in observed for id_ in ids)


def strip_citations(text: str) -> str:
    r"""Removes `\cite{...}` marks and the space before them."""
    return re.sub(rf"\s*{CITATION.pattern}", "", text)
