"""Builds the training data: the tokenizer if absent, then packed rows for mid-training I, II and SFT, and their data card.

Reads run_dir/corpus and config.data.sources, writes run_dir/tokenizer and run_dir/data. What is already built from the same
sources is left alone, so the same command continues a build that was killed. Work is handed out by Apache Beam: on this machine
by default, elsewhere by --runner and Beam's own options, for example
--runner=DataflowRunner --beam_options="--project=p --region=r --temp_location=gs://b/tmp".
"""

import shlex
import sys
import time

from absl import flags

from launch import entry
from stepdr_jax.data import cache, card, tokenizer_text, workers
from stepdr_jax.runtime.layout import RunLayout

_RUNNER = flags.DEFINE_string(
    "runner", workers.IN_PROCESS, "Beam's runner, e.g. DataflowRunner, FlinkRunner, SparkRunner"
)
_OPTIONS = flags.DEFINE_string("beam_options", "", "further options of Beam's pipelines, as on its command line")


def main(config) -> None:
    began = time.monotonic()
    tokenizer = tokenizer_text.ensure_tokenizer(config)
    say(f"tokenizer  {tokenizer.vocab_size} ids  {time.monotonic() - began:.0f}s gone")
    built = cache.build(config, runner=_RUNNER.value, options=shlex.split(_OPTIONS.value))
    for stage, components in built.items():
        rows, tokens, dropped = (sum(counts) for counts in zip(*map(_counts, components.values()), strict=True))
        say(
            f"{stage}  {len(components)} components  {rows} rows of {config[stage].seq_len}  {tokens} tokens  "
            f"{dropped} examples dropped  {time.monotonic() - began:.0f}s gone"
        )
    card.write_card(config.run_dir, built, {stage: dict(config[stage].mixture) for stage in built})
    say(f"data card  {RunLayout.from_config(config).data_card.with_suffix('.html')}")


def _counts(component: dict) -> tuple[int, int, int]:
    return component["rows"], component["tokens"], sum(component["dropped"].values())


def say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


if __name__ == "__main__":
    entry.run(main, __doc__)
