"""Reinforcement learning: PPO from the end of SFT, against live tools and the rubric judge.

Writes run_dir/seed<k>/ppo: checkpoints, metrics.jsonl, iterations/NNNN.jsonl and done.json. The same command continues
an interrupted run. With --config.tools.address the tool host there is used; otherwise one is started for the time of
the run.

Several processes, those of config.distributed, are one run: each samples its share of an iteration's episodes on its
own devices, and all learn together. Processes on several machines need a tool host that all reach
(--config.tools.address).

--replay learns again from the episodes that the run recorded, without sampler and tools, into seed<k>/ppo_replay:

    python -m launch.ppo --replay --config.ppo.gae_lambda=0.95
"""

from absl import flags

from launch import entry, tool_host
from stepdr_jax.rl import loop
from stepdr_jax.runtime import distributed

REPLAY = flags.DEFINE_boolean("replay", False, "learn again from the recorded episodes, into seed<k>/ppo_replay")


def main(config) -> None:
    if REPLAY.value:
        loop.replay_ppo(config, loop.read_inputs(config))
        print(loop.replay_layout(config).directory)
        return
    loop.run_ppo(config, lambda: tool_host.start_if_needed(config, f"seed{config.seed}.ppo"))
    if distributed.is_lead():
        print(loop.ppo_layout(config).directory)


if __name__ == "__main__":
    entry.run(main, __doc__, many_processes=True)
