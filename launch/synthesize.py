"""Makes the corpus: offline web, tasks, rubrics, expert episodes, cleaning, renamed copies and synthetic documents.

Writes run_dir/world and run_dir/corpus. Safe to run again: finished work is kept, an interrupted run continues.
"""

import sys

from launch import entry, tool_host
from stepdr_jax.runtime.layout import RunLayout
from stepdr_jax.synthesis import pipeline
from tools_env.offline_web.build import build_offline_web


def main(config) -> None:
    layout = RunLayout.from_config(config)
    build_offline_web(layout.offline_web, seed=config.data_seed, documents=config.offline_web.documents)
    card = pipeline.finished_card(config)
    if card:
        pass
    elif config.tools.address:
        card = pipeline.synthesize_corpus(config, config.tools.address)
    else:
        with tool_host.start(config, "synthesize") as host:
            card = pipeline.synthesize_corpus(config, host.address)
    kept = sum(card["episodes"]["kept"].values())
    tasks = {split: sum(table.values()) for split, table in card["tasks"].items()}
    print(
        f"corpus  {tasks.get('train', 0)} training and {tasks.get('heldout', 0)} held-out tasks  "
        f"{card['episodes']['run']} expert episodes, {kept} kept  "
        f"{sum(card['synthetic_documents'].values())} synthetic documents  "
        f"{layout.corpus_card}",
        file=sys.stderr,
    )


if __name__ == "__main__":
    entry.run(main, __doc__)
