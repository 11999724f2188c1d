"""Reinforcement learning: PPO from the end of SFT, against live tools and the rubric judge.

Writes run_dir/seed<k>/ppo: checkpoints, metrics.jsonl, iterations/NNNN.jsonl and done.json. The same command continues an
interrupted run. With --config.tools.address the tool host there is used; otherwise one is started for the time of the run.
"""

import contextlib

from launch import entry, tool_host
from stepdr_jax.rl import loop
from tools_env.process import ToolHost


def main(config) -> None:
    loop.run(config, lambda: host_of(config))
    print(loop.home_of(config))


def host_of(config) -> contextlib.AbstractContextManager[ToolHost | None]:
    """A tool host of our own, or None where the config names one that someone else runs."""
    if config.tools.address:
        return contextlib.nullcontext()
    return tool_host.own(config, f"seed{config.seed}.ppo")


if __name__ == "__main__":
    entry.run(main, __doc__)
