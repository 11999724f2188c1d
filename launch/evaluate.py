"""Runs the held-out tasks on every finished stage of a seed, or on the stages named by --stages.

Rows go to run_dir/seed<k>/eval/<stage>.jsonl. A stage that is evaluated already is left alone; an interrupted one continues.
"""

from absl import flags

from launch import entry, tool_host
from stepdr_jax.evaluation import qa

FLAGS = flags.FLAGS
flags.DEFINE_list("stages", [], "stages to evaluate, comma-separated: init, midtrain1, midtrain2, sft, ppo")


def main(config) -> None:
    stages = FLAGS.stages or qa.trained_stages(config)
    if not all(qa.finished(config, stage) for stage in stages):
        with tool_host.of(config, f"seed{config.seed}.evaluate") as host:
            for stage in stages:
                qa.evaluate(config, stage, host)
    for stage in stages:
        print(qa.result_path(config, stage))


if __name__ == "__main__":
    entry.run(main, __doc__)
