"""Reinforcement learning: PPO from the end of SFT, against live tools and the rubric judge.

Writes run_dir/seed<k>/ppo: checkpoints, metrics.jsonl, iterations/NNNN.jsonl and done.json. The same command continues an
interrupted run. With --config.tools.address the tool host there is used; otherwise one is started for the time of the run.
"""

from launch import entry, tool_host
from stepdr_jax.rl import loop


def main(config) -> None:
    loop.run(config, lambda: tool_host.of(config, f"seed{config.seed}.ppo"))
    print(loop.home_of(config))


if __name__ == "__main__":
    entry.run(main, __doc__)
