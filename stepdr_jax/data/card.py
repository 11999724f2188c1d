"""data/card.json: what the built training data holds, over all stages, for the report and for a person."""

from collections import Counter
from pathlib import Path

from stepdr_jax import files
from stepdr_jax.tokens.tokenizer import Tokenizer


def write_card(run_dir: str | Path, built: dict[str, dict[str, dict]], rates: dict[str, dict[str, float]]) -> dict:
    """Writes run_dir/data/card.json and returns it.

    Args:
        built: stage -> component -> side file's content, as `cache.build` returns it.
        rates: stage -> component -> mixture rate.

    The card has, per stage: rows, tokens, loss_tokens, examples, dropped, fill, tokens by capability and by language,
    examples by length, and per component the same counts with `rate` (share of rows that training draws) and
    `share_of_tokens` (share of what is on disk).
    """
    run_dir = Path(run_dir)
    tokenizer = Tokenizer.load(run_dir / "tokenizer" / "tokenizer.json")
    card = dict(
        tokenizer=dict(fingerprint=tokenizer.fingerprint(), vocab_size=tokenizer.vocab_size),
        stages={stage: _stage(components, rates[stage]) for stage, components in built.items()},
    )
    card["tokens"] = sum(stage["tokens"] for stage in card["stages"].values())
    files.write_json(run_dir / "data" / "card.json", card)
    return card


def _stage(components: dict[str, dict], rates: dict[str, float]) -> dict:
    cards = list(components.values())
    totals = {key: sum(card[key] for card in cards) for key in ("rows", "tokens", "loss_tokens", "examples", "pieces")}
    context = cards[0]["context"]
    rate_sum = sum(rates.get(name, 0) for name in components) or 1
    by_length = Counter()
    for card in cards:
        by_length.update(dict(card["examples_by_length"]))
    return totals | dict(
        context=context,
        fill=round(totals["tokens"] / (totals["rows"] * context), 4),
        dropped=_added(card["dropped"] for card in cards),
        tokens_by_capability=_added(card["tokens_by_capability"] for card in cards),
        tokens_by_lang=_added(card["tokens_by_lang"] for card in cards),
        examples_by_length=[[upper, by_length[upper]] for upper in sorted(by_length)],
        components={
            name: {key: card[key] for key in ("rows", "tokens", "loss_tokens", "examples", "dropped", "fill")}
            | dict(
                rate=round(rates.get(name, 0) / rate_sum, 4),
                share_of_tokens=round(card["tokens"] / totals["tokens"], 4),
                tokens_by_capability=card["tokens_by_capability"],
                tokens_by_lang=card["tokens_by_lang"],
            )
            for name, card in components.items()
        },
    )


def _added(counts) -> dict[str, int]:
    total = Counter()
    for count in counts:
        total.update(count)
    return dict(sorted(total.items()))
