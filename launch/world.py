"""Builds the offline web: pages of real facts, and your own documents (--config.world.documents), in run_dir/world.

Left alone when it is built already from the same inputs.
"""

import sys
from pathlib import Path

from launch import entry
from tools_env.offline_web.build import build_offline_web


def main(config) -> None:
    folder = Path(config.run_dir) / "world"
    build_offline_web(folder, seed=config.data_seed, documents=config.world.documents)
    with open(folder / "documents.jsonl", "rb") as rows:
        print(f"world  {sum(1 for _ in rows)} pages in {folder}", file=sys.stderr)


if __name__ == "__main__":
    entry.run(main, __doc__)
