"""Builds the training data: the tokenizer if absent, then packed rows for mid-training I, II and SFT.

Reads run_dir/corpus, writes run_dir/tokenizer and run_dir/data. Components that are already built from the same corpus
are left alone.
"""

import sys
import time

from launch import entry
from stepdr_jax.data import cache, card, tokenizer_text


def main(config) -> None:
    began = time.monotonic()
    tokenizer = tokenizer_text.ensure_tokenizer(config)
    say(f"tokenizer  {tokenizer.vocab_size} ids  {time.monotonic() - began:.0f}s gone")
    built = {}
    for stage in cache.STAGES:
        built[stage] = cache.build(config, stage)
        rows, tokens, dropped = (sum(counts) for counts in zip(*map(_counts, built[stage].values()), strict=True))
        say(
            f"{stage}  {len(built[stage])} components  {rows} rows of {config[stage].context}  {tokens} tokens  "
            f"{dropped} examples dropped  {time.monotonic() - began:.0f}s gone"
        )
    card.write_card(config.run_dir, built, {stage: dict(config[stage].mixture) for stage in built})


def _counts(component: dict) -> tuple[int, int, int]:
    return component["rows"], component["tokens"], sum(component["dropped"].values())


def say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


if __name__ == "__main__":
    entry.run(main, __doc__)
