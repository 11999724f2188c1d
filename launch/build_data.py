"""Builds the training data: a tokenizer if absent, packed sequences for mid-training I, II and SFT, and their data
card.

Reads run_dir/corpus and config.data.sources, writes run_dir/tokenizer and run_dir/data. Files that are already built
from the same sources are kept, so the same command continues a killed build. Apache Beam runs the work: on this
machine by default, elsewhere with --runner and Beam's own options, for example --runner=DataflowRunner
--beam_options="--project=p --region=r --temp_location=gs://b/tmp".
"""

import shlex
import sys
import time

from absl import flags

from launch import entry
from stepdr_jax import configuration
from stepdr_jax.data import beam_runner, build, card, tokenizer_text
from stepdr_jax.runtime.layout import RunLayout

_RUNNER = flags.DEFINE_string(
    "runner", beam_runner.IN_PROCESS, "Beam's runner, e.g. DataflowRunner, FlinkRunner, SparkRunner"
)
_OPTIONS = flags.DEFINE_string("beam_options", "", "further options of Beam's pipelines, as on its command line")


def main(config) -> None:
    began = time.monotonic()
    configuration.save_config(config, RunLayout.from_config(config).data)
    tokenizer = tokenizer_text.ensure_tokenizer(config)
    say(f"tokenizer  {tokenizer.vocab_size} tokens  {time.monotonic() - began:.0f}s elapsed")
    built = build.build_training_data(config, runner=_RUNNER.value, beam_options=shlex.split(_OPTIONS.value))
    for stage, components in built.items():
        sequences, tokens, dropped = map(sum, zip(*map(_counts, components.values()), strict=True))
        say(
            f"{stage}  {len(components)} components  {sequences} sequences of {config[stage].seq_len}  "
            f"{tokens} tokens  {dropped} examples dropped  {time.monotonic() - began:.0f}s elapsed"
        )
    card.write_card(config.run_dir, built, {stage: dict(config[stage].mixture) for stage in built})
    say(f"data card  {RunLayout.from_config(config).data_card.with_suffix('.html')}")


def _counts(component: dict) -> tuple[int, int, int]:
    return component["sequences"], component["tokens"], sum(component["dropped"].values())


def say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


if __name__ == "__main__":
    entry.run(main, __doc__)
