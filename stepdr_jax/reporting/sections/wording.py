"""Values, ranges, counts and tables in words, and what kinds of things are called."""

import math
from collections.abc import Sequence
from typing import Any

from stepdr_jax.evaluation.statistics import Interval
from stepdr_jax.pages import plots
from stepdr_jax.reporting.collect import Curves

Section = dict[str, Any]
KIND_TITLES = {
    "fact": "single fact",
    "deep_search": "deep search",
    "doc_walk": "document walk",
    "verification": "verification",
    "report": "report",
}
PERCENT = "\u00a0%"
LANG_TITLES = {"en": "English", "zh": "Chinese"}


def shown(value: float | None, unit: str = "score") -> str:
    """A value in the words of its unit."""
    if value is None or not math.isfinite(value):
        return "–"
    if unit in ("share", "ratio"):
        return f"{100 * value:.1f}\u00a0%"
    if unit == "tokens":
        return f"{value:,.0f}"
    if unit == "count":
        return f"{value:.2f}"
    if unit == "price":
        return plots.number(1000 * value)
    if unit == "difference":
        return "0.000" if round(value, 3) == 0 else f"{value:+.3f}".replace("-", "−")
    return f"{value:.3f}".replace("-", "−")


def ranged(interval: Interval, unit: str = "score") -> dict[str, str]:
    """A table cell: the value and its interval."""
    if interval.n == 0:
        return {"value": "–", "range": ""}
    low, high = shown(interval.low, unit), shown(interval.high, unit)
    span = "" if math.isnan(interval.low) else f"{low.removesuffix(PERCENT)} to {high}"
    return {"value": shown(interval.mean, unit), "range": span}


def counted(n: int, singular: str, plural: str | None = None) -> str:
    return f"{n:,} {singular if n == 1 else plural or singular + 's'}"


def listed(words: Sequence[str]) -> str:
    words = list(words)
    return " and ".join([", ".join(words[:-1]), words[-1]] if len(words) > 1 else words)


def table(head: Sequence[str], rows: Sequence[Sequence[Any]], *, caption: str = "", numeric: bool = True):
    cells = [{"cells": list(row)} for row in rows]
    return {"head": list(head), "rows": cells, "caption": caption, "numeric": numeric, "dense": False}


def made(curves: Curves, unit: str) -> str:
    """How far a stage came: rows are numbered from 0 or 1, by what the first of them is."""
    return counted(int(curves.x[-1]) + (curves.x[0] == 0), unit)
