"""Makes the corpus: offline web, tasks, rubrics, expert episodes, cleaning, renamed copies and reading material.

Writes run_dir/world and run_dir/corpus. Safe to run again: finished work is kept, an interrupted run continues.
"""

import sys
from pathlib import Path

from launch import entry, tool_host
from stepdr_jax.synthesis import pipeline
from tools_env.offline_web.build import build_offline_web


def main(config) -> None:
    run_dir = Path(config.run_dir)
    build_offline_web(run_dir / "world", seed=config.data_seed, documents=config.world.documents)
    card = pipeline.finished(config)
    if card:
        pass
    elif config.tools.address:
        card = pipeline.run(config, config.tools.address)
    else:
        with tool_host.new_tool_host(config, "synthesize") as host:
            card = pipeline.run(config, host.address)
    kept = sum(card["episodes"]["kept"].values())
    tasks = {split: sum(table.values()) for split, table in card["tasks"].items()}
    print(
        f"corpus  {tasks.get('train', 0)} training and {tasks.get('heldout', 0)} held-out tasks  "
        f"{card['episodes']['run']} expert episodes, {kept} kept  {sum(card['reading'].values())} reading rows  "
        f"{run_dir / 'corpus' / 'card.json'}",
        file=sys.stderr,
    )


if __name__ == "__main__":
    entry.run(main, __doc__)
