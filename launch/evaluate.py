"""Runs the held-out tasks on every finished stage of a seed, or on the stages named by --stages.

Rows go to run_dir/seed<k>/eval/<stage>.jsonl. A stage that is evaluated already is left alone; an interrupted one
continues.

With --watch it evaluates the checkpoints that training saves for it every config.eval.every_tokens tokens, as they
appear in the run directory, until the stages are done: a job of its own beside a pod that trains
(config.eval.inline=False).
"""

import sys

from absl import flags

from launch import entry, tool_host
from stepdr_jax import configuration
from stepdr_jax.evaluation import qa
from stepdr_jax.runtime import stages
from stepdr_jax.runtime.layout import RunLayout

FLAGS = flags.FLAGS
flags.DEFINE_list("stages", [], f"stages to evaluate, comma-separated: {', '.join(stages.evaluated())}")
flags.DEFINE_boolean(
    "watch",
    False,
    f"evaluate checkpoints while another job trains; default stages: {', '.join(stages.trained())}",
)


def main(config) -> None:
    if FLAGS.watch:
        return _watch(config)
    names = FLAGS.stages or qa.trained_stages(config)
    if not all(qa.finished(config, stage) for stage in names):
        configuration.save_config(config, RunLayout.from_config(config).seed_dir() / "eval")
        with tool_host.start_if_needed(config, f"seed{config.seed}.evaluate") as host:
            for stage in names:
                qa.evaluate(config, stage, host)
    for stage in names:
        print(qa.result_path(config, stage))


def _watch(config) -> None:
    from stepdr_jax.evaluation import checkpoints

    with tool_host.start_if_needed(config, f"seed{config.seed}.watch") as host:
        for row in checkpoints.watch_stages(config, FLAGS.stages or stages.trained(), host):
            shown = "  ".join(f"{name} {row[name]:.3f}" for name in ("reward", "correct", "answered") if name in row)
            print(f"{row['stage']}  step {row['step']}  {row['tokens']} tokens  {shown}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    entry.run(main, __doc__)
