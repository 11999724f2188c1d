"""The data card as one HTML file that opens offline, in the style of the report."""

from stepdr_jax.pages import plots, wording
from stepdr_jax.pages.render import render_page
from stepdr_jax.runtime import stages

MAX_BARS = 12  # of a chart; the rest is summed
CONTAMINATED = ("Component", "Evaluation set", "Rows with a question", "With its answer")


def render_card(card: dict, name: str) -> str:
    """Returns the page of a card (`card.write_card`)."""
    sections = [_stage_section(stage, counts) for stage, counts in card["stages"].items()]
    return render_page("card.html.j2", dict(name=name, card=card, stages=sections), styles=["style.css", "card.css"])


def _stage_section(stage: str, counts: dict) -> dict:
    components = {wording.component_title(name): part for name, part in counts["components"].items()}.items()
    languages = {wording.LANG_TITLES.get(lang, lang): count for lang, count in counts["tokens_by_lang"].items()}
    capabilities = {wording.component_title(name): n for name, n in counts["tokens_by_capability"].items()}
    dropped = [[name, reason, f"{n:,}"] for name, part in components for reason, n in _dropped(part)]
    duplicates = [
        [name, f"{part['duplicates']['exact']:,}", f"{part['duplicates']['near']:,}"]
        for name, part in components
        if any(part.get("duplicates", {}).values())
    ]
    contaminated = [
        [name, evaluation_set, f"{hits['rows']:,}", f"{hits['with_answer']:,}"]
        for name, part in components
        for evaluation_set, hits in part.get("contaminated", {}).items()
    ]
    return dict(
        id=stage,
        title=stages.title_of(stage),
        counts=counts,
        mixture=wording.mixture_table(counts["components"]),
        charts=[
            _token_chart("Tokens by capability", capabilities),
            _token_chart("Tokens by language", languages),
            _token_chart("Tokens by license", counts["tokens_by_license"]),
            _token_chart("Tokens by source", counts["tokens_by_source"]),
            _length_chart(counts["examples_by_length"]),
        ],
        dropped=wording.table(["Component", "Reason", "Rows"], dropped, numeric=False) if dropped else None,
        duplicates=wording.table(["Component", "Exact", "Near"], duplicates) if duplicates else None,
        contaminated=wording.table(CONTAMINATED, contaminated, numeric=False) if contaminated else None,
        bad=[(name, line) for name, part in components for line in part.get("bad_listed", [])],
    )


def _dropped(part: dict) -> list[tuple[str, int]]:
    counts = part["dropped"] | {f"bad row: {why}": count for why, count in part.get("bad_rows", {}).items()}
    counts["skipped on purpose"] = part.get("skipped", 0)
    return [(wording.component_title(reason), count) for reason, count in counts.items() if count]


def _token_chart(title: str, counts: dict[str, int]) -> str:
    ordered = sorted(counts.items(), key=lambda item: -item[1])
    if len(ordered) > MAX_BARS:
        ordered = [*ordered[: MAX_BARS - 1], ("all others", sum(count for _, count in ordered[MAX_BARS - 1 :]))]
    total = sum(counts.values()) or 1
    rows = [(f"{label}, {100 * count / total:.1f}\u00a0%", [count]) for label, count in ordered]
    return plots.bar_chart(rows, title=title, x_label="tokens")


def _length_chart(histogram: list[list[int]]) -> str:
    rows = [(f"up to {upper:,} tokens", [count]) for upper, count in histogram]
    return plots.bar_chart(rows, title="Examples by length", x_label="examples")
