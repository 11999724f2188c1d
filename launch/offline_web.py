"""Builds the offline web in run_dir/world: pages of real facts, and your documents (config.offline_web.documents).

Left alone when it is built already from the same inputs.
"""

import sys

from launch import entry
from stepdr_jax.runtime.layout import RunLayout
from tools_env.offline_web.build import build_offline_web


def main(config) -> None:
    folder = RunLayout.from_config(config).offline_web
    build_offline_web(folder, seed=config.data_seed, documents=config.offline_web.documents)
    with open(folder / "documents.jsonl", "rb") as rows:
        print(f"offline web  {sum(1 for _ in rows)} pages in {folder}", file=sys.stderr)


if __name__ == "__main__":
    entry.run(main, __doc__)
