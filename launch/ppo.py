"""Reinforcement learning: PPO from the end of SFT, against live tools and the rubric judge.

Writes run_dir/seed<k>/ppo: checkpoints, metrics.jsonl, iterations/NNNN.jsonl and done.json. The same command continues an
interrupted run. With --config.tools.address the tool host there is used; otherwise one is started for the time of the run.

Several processes, those of config.distributed, are one run: each samples its share of an iteration's episodes on its own
devices, and all learn together. Processes on several machines need a tool host that all reach (--config.tools.address).

--train_only learns anew from the episodes that the run recorded, without sampler and tools, into seed<k>/ppo_replay:

    python -m launch.ppo --train_only --config.ppo.gae_lambda=0.95
"""

from absl import flags

from launch import entry, tool_host
from stepdr_jax.rl import loop
from stepdr_jax.training import distributed

TRAIN_ONLY = flags.DEFINE_boolean("train_only", False, "learn anew from the recorded episodes, into seed<k>/ppo_replay")


def main(config) -> None:
    if TRAIN_ONLY.value:
        loop.replay(config, loop.prepare(config))
        print(loop.replay_home_of(config))
        return
    loop.run(config, lambda: tool_host.open_tool_host(config, f"seed{config.seed}.ppo"))
    if distributed.is_lead():
        print(loop.home_of(config))


if __name__ == "__main__":
    entry.run(main, __doc__, many_processes=True)
