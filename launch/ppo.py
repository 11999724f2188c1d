"""Reinforcement learning: PPO from the end of SFT, against live tools and the rubric judge.

Writes run_dir/seed<k>/ppo: checkpoints, metrics.jsonl, iterations/NNNN.jsonl and done.json. The same command continues an
interrupted run. With --config.tools.address the tool host there is used; otherwise one is started for the time of the run.
"""

import contextlib
from pathlib import Path

from launch import entry
from stepdr_jax.rl import loop
from tools_env.process import ToolHost


def main(config) -> None:
    loop.run(config, lambda: tool_host(config))
    print(loop.home_of(config))


def tool_host(config) -> contextlib.AbstractContextManager[ToolHost | None]:
    """A tool host of our own, or None where the config names one that someone else runs."""
    if config.tools.address:
        return contextlib.nullcontext()
    run_dir = Path(config.run_dir)
    return ToolHost(
        run_dir / "world",
        topk=config.tools.topk,
        max_observation_chars=config.tools.max_observation_chars,
        fetch_timeout=config.tools.fetch_timeout,
        concurrency=config.tools.concurrency,
        log_path=run_dir / "logs" / f"seed{config.seed}.ppo_tool_host.log",
    )


if __name__ == "__main__":
    entry.run(main, __doc__)
