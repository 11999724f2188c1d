"""The data card: what the built training data of all stages contains, as data/card.json and data/card.html."""

from collections import Counter
from pathlib import Path

from stepdr_jax import files
from stepdr_jax.tokens.tokenizer import Tokenizer

COUNTS = ("sequences", "tokens", "loss_tokens", "examples", "pieces")
SHARES = ("tokens_by_capability", "tokens_by_lang", "tokens_by_license", "tokens_by_source")
SELECTION_COUNTS = ("bad_rows", "bad_listed", "skipped", "rows_by_source", "duplicates", "contaminated")


def write_card(run_dir: str | Path, built: dict[str, dict[str, dict]], rates: dict[str, dict[str, float]]) -> dict:
    """Writes run_dir/data/card.json and card.html and returns the former.

    Args:
        built: stage -> component -> card, as `build.build_training_data` returns it.
        rates: stage -> component -> mixture rate.

    For each stage the card has: sequences, tokens, loss_tokens, examples, dropped by reason, fill, tokens by
    capability, language, license and source, and examples by length. For each component it has the same counts,
    `rate` (share of the tokens that training draws), `share_of_tokens` (share of the tokens on disk) and the counts
    of selection: duplicates, evaluation questions, bad rows.
    """
    run_dir = Path(run_dir)
    tokenizer = Tokenizer.load(run_dir / "tokenizer" / "tokenizer.json")
    card = dict(
        tokenizer=dict(fingerprint=tokenizer.fingerprint(), vocab_size=tokenizer.vocab_size),
        stages={stage: _stage_card(components, rates[stage]) for stage, components in built.items()},
    )
    card["tokens"] = sum(stage["tokens"] for stage in card["stages"].values())
    files.write_json(run_dir / "data" / "card.json", card)
    from stepdr_jax.data.card_page import render_card  # here: jinja2 is slow to import

    files.write_atomic(run_dir / "data" / "card.html", render_card(card, run_dir.name))
    return card


def _stage_card(components: dict[str, dict], rates: dict[str, float]) -> dict:
    cards = list(components.values())
    totals = {key: sum(card[key] for card in cards) for key in COUNTS}
    seq_len = cards[0]["seq_len"]
    rate_sum = sum(rates.get(name, 0) for name in components) or 1
    by_length = Counter()
    for card in cards:
        by_length.update(dict(card["examples_by_length"]))
    return totals | dict(
        seq_len=seq_len,
        fill=round(totals["tokens"] / (totals["sequences"] * seq_len), 4),
        dropped=sum_counts(card["dropped"] for card in cards),
        **{share: sum_counts(card[share] for card in cards) for share in SHARES},
        examples_by_length=[[upper, by_length[upper]] for upper in sorted(by_length)],
        components={
            name: {key: card[key] for key in (*COUNTS, "dropped", "fill", *SHARES)}
            | {key: card[key] for key in SELECTION_COUNTS if key in card}
            | dict(
                shards=len(card["shards"]),
                rate=round(rates.get(name, 0) / rate_sum, 4),
                share_of_tokens=round(card["tokens"] / totals["tokens"], 4),
            )
            for name, card in components.items()
        },
    )


def sum_counts(counts) -> dict[str, int]:
    """Sums dicts of counts by key; keys come sorted."""
    total = Counter()
    for count in counts:
        for name, value in count.items():
            total[name] += value
    return dict(sorted(total.items()))
