"""Runs the held-out tasks on every finished stage of a seed, or on the stages named by --stages.

Rows go to run_dir/seed<k>/eval/<stage>.jsonl. A stage that is evaluated already is left alone; an interrupted one continues.
"""

import contextlib
from pathlib import Path

from absl import flags

from launch import entry
from stepdr_jax.evaluation import qa
from tools_env.process import ToolHost

FLAGS = flags.FLAGS
flags.DEFINE_list("stages", [], "stages to evaluate, comma-separated: init, midtrain1, midtrain2, sft, ppo")


def main(config) -> None:
    stages = FLAGS.stages or qa.trained_stages(config)
    if not all(qa.finished(config, stage) for stage in stages):
        with tool_host(config) as host:
            for stage in stages:
                qa.evaluate(config, stage, host)
    for stage in stages:
        print(qa.result_path(config, stage))


def tool_host(config) -> contextlib.AbstractContextManager[qa.Host]:
    """The tool host at config.tools.address, or one of our own for the time of the evaluation."""
    if config.tools.address:
        return contextlib.nullcontext(qa.RemoteHost(config.tools.address))
    run_dir = Path(config.run_dir)
    return ToolHost(
        run_dir / "world",
        topk=config.tools.topk,
        max_observation_chars=config.tools.max_observation_chars,
        fetch_timeout=config.tools.fetch_timeout,
        concurrency=config.tools.concurrency,
        log_path=run_dir / "logs" / f"seed{config.seed}.evaluate_tool_host.log",
    )


if __name__ == "__main__":
    entry.run(main, __doc__)
