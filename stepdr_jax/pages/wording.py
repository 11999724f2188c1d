"""How pages name kinds, languages and components, and how they write counts, lists and tables."""

from collections.abc import Sequence
from typing import Any

KIND_TITLES = {
    "fact": "single fact",
    "deep_search": "deep search",
    "doc_walk": "document walk",
    "verification": "verification",
    "report": "report",
}
LANG_TITLES = {"en": "English", "zh": "Chinese"}


def component_title(name: str) -> str:
    """The title of a mixture component, a data family, a capability or a reason, from its name in code."""
    return name.replace("_", " ")


def count_of(n: int, singular: str, plural: str | None = None) -> str:
    """A count and its noun: "1 task", "2,000 tasks"."""
    return f"{n:,} {singular if n == 1 else plural or singular + 's'}"


def join_and(words: Sequence[str]) -> str:
    """ "a, b and c"."""
    return " and ".join([", ".join(words[:-1]), words[-1]] if len(words) > 1 else words)


def table(
    head: Sequence[str],
    rows: Sequence[Sequence[Any]],
    *,
    caption: str = "",
    numeric: bool = True,
    dense: bool = False,
) -> dict[str, Any]:
    """A table for the macro of table.html.j2. A cell is text, or {"value", "range"}; `numeric` aligns to the right."""
    cells = [{"cells": list(row)} for row in rows]
    return {"head": list(head), "rows": cells, "caption": caption, "numeric": numeric, "dense": dense}


def mixture_table(components: dict[str, dict], *, caption: str = "") -> dict[str, Any]:
    """The components of a stage's training data, from the data card: by rate, highest first."""
    head = ["Component", "Rate", "Share of tokens", "Examples", "Sequences", "Tokens", "Trained on", "Fill", "Dropped"]
    rows = []
    for name, part in sorted(components.items(), key=lambda item: -item[1]["rate"]):
        trained_on = part["loss_tokens"] / max(part["tokens"], 1)
        rows.append(
            [component_title(name), percent(part["rate"]), percent(part["share_of_tokens"])]
            + [f"{part[count]:,}" for count in ("examples", "sequences", "tokens")]
            + [percent(trained_on), percent(part["fill"]), f"{sum(part['dropped'].values()):,}", f"{part['shards']:,}"]
        )
    return table([*head, "Shards"], rows, caption=caption)


def percent(share: float) -> str:
    return f"{100 * share:.1f}\u00a0%"
