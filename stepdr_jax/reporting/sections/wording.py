"""How the report writes measured values, their intervals and the progress of a stage."""

import math
from typing import Any

from stepdr_jax.evaluation.statistics import Interval
from stepdr_jax.pages import plots
from stepdr_jax.pages.wording import count_of
from stepdr_jax.reporting.collect import Curves

Section = dict[str, Any]
PERCENT = "\u00a0%"


def format_value(value: float | None, unit: str = "score") -> str:
    """A value as text, by its unit."""
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


def value_cell(interval: Interval, unit: str = "score") -> dict[str, str]:
    """A table cell: the value and its interval."""
    if interval.n == 0:
        return {"value": "–", "range": ""}
    low, high = format_value(interval.low, unit), format_value(interval.high, unit)
    span = "" if math.isnan(interval.low) else f"{low.removesuffix(PERCENT)} to {high}"
    return {"value": format_value(interval.mean, unit), "range": span}


def progress_text(curves: Curves, unit: str) -> str:
    """How many steps or iterations a stage has made; its rows may be numbered from 0 or from 1."""
    return count_of(int(curves.x[-1]) + (curves.x[0] == 0), unit)
