"""Runs the held-out tasks on every finished stage of a seed, or on the stages named by --stages.

Rows go to run_dir/seed<k>/eval/<stage>.jsonl. A stage that is evaluated already is left alone; an interrupted one continues.
"""

import contextlib

from absl import flags

from launch import entry, tool_host
from stepdr_jax.evaluation import qa

FLAGS = flags.FLAGS
flags.DEFINE_list("stages", [], "stages to evaluate, comma-separated: init, midtrain1, midtrain2, sft, ppo")


def main(config) -> None:
    stages = FLAGS.stages or qa.trained_stages(config)
    if not all(qa.finished(config, stage) for stage in stages):
        with host_of(config) as host:
            for stage in stages:
                qa.evaluate(config, stage, host)
    for stage in stages:
        print(qa.result_path(config, stage))


def host_of(config) -> contextlib.AbstractContextManager[qa.Host]:
    """The tool host at config.tools.address, or one of our own for the time of the evaluation."""
    if config.tools.address:
        return contextlib.nullcontext(qa.RemoteHost(config.tools.address))
    return tool_host.own(config, f"seed{config.seed}.evaluate")


if __name__ == "__main__":
    entry.run(main, __doc__)
