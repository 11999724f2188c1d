"""The data card as one HTML file that opens offline, in the style of the report."""

import jinja2

from stepdr_jax.pages import TEMPLATES, plots

MAX_BARS = 12  # of a chart; the rest is summed


def page(card: dict, name: str) -> str:
    """Returns the page of a card (`card.write_card`). Everything from the data is escaped."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(TEMPLATES), autoescape=True, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters |= dict(thousands=lambda value: f"{value:,}", percent=lambda value: f"{100 * value:.1f} %")
    stages = [_stage(stage, facts) for stage, facts in card["stages"].items()]
    style = (TEMPLATES / "style.css").read_text()
    return environment.get_template("card.html.j2").render(name=name, card=card, stages=stages, style=style)


def _stage(stage: str, facts: dict) -> dict:
    charts = [
        _bars("Tokens by capability", facts["tokens_by_capability"]),
        _bars("Tokens by language", facts["tokens_by_lang"]),
        _bars("Tokens by licence", facts["tokens_by_licence"]),
        _bars("Tokens by source", facts["tokens_by_source"]),
        _lengths(facts["examples_by_length"]),
    ]
    components = facts["components"].items()
    return dict(
        id=stage,
        name=NAMES.get(stage, stage),
        facts=facts,
        charts=charts,
        dropped=[(name, reason, count) for name, c in components for reason, count in _dropped(c)],
        duplicates=[(name, c["duplicates"]) for name, c in components if any(c.get("duplicates", {}).values())],
        contaminated=[(n, s, hits) for n, c in components for s, hits in c.get("contaminated", {}).items()],
        bad=[(name, line) for name, c in components for line in c.get("bad_named", [])],
    )


def _dropped(component: dict) -> list[tuple[str, int]]:
    counts = component["dropped"] | {f"bad row: {why}": count for why, count in component.get("bad_rows", {}).items()}
    counts["left out on purpose"] = component.get("left_out", 0)
    return [(reason.replace("_", " "), count) for reason, count in counts.items() if count]


def _bars(title: str, counts: dict[str, int]) -> str:
    ordered = sorted(counts.items(), key=lambda item: -item[1])
    if len(ordered) > MANY:
        ordered = [*ordered[: MANY - 1], ("others", sum(count for _, count in ordered[MANY - 1 :]))]
    total = sum(counts.values()) or 1
    rows = [(f"{label}, {100 * count / total:.1f}\u00a0%", [count]) for label, count in ordered]
    return plots.bar_chart(rows, title=title, x_label="tokens")


def _lengths(histogram: list[list[int]]) -> str:
    rows = [(f"up to {upper:,} tokens", [count]) for upper, count in histogram]
    return plots.bar_chart(rows, title="Examples by length", x_label="examples")
