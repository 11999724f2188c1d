"""Runs the held-out tasks on every finished stage of a seed, or on the stages named by --stages.

Rows go to run_dir/seed<k>/eval/<stage>.jsonl. A stage that is evaluated already is left alone; an interrupted one continues.

With --watch it evaluates the milestones that training lays down every config.eval.every_tokens tokens, as they appear in
the run directory, until the stages are done: a job of its own beside a pod that trains (config.eval.inline=False).
"""

import sys

from absl import flags

from launch import entry, tool_host
from stepdr_jax.evaluation import qa

FLAGS = flags.FLAGS
flags.DEFINE_list("stages", [], "stages to evaluate, comma-separated: init, midtrain1, midtrain2, sft, ppo")
flags.DEFINE_boolean(
    "watch", False, "evaluate milestones while another job trains; default stages: midtrain1, midtrain2, sft"
)


def main(config) -> None:
    if FLAGS.watch:
        return _watch(config)
    stages = FLAGS.stages or qa.trained_stages(config)
    if not all(qa.finished(config, stage) for stage in stages):
        with tool_host.open_tool_host(config, f"seed{config.seed}.evaluate") as host:
            for stage in stages:
                qa.evaluate(config, stage, host)
    for stage in stages:
        print(qa.result_path(config, stage))


def _watch(config) -> None:
    from stepdr_jax.evaluation import milestones

    with tool_host.open_tool_host(config, f"seed{config.seed}.watch") as host:
        for row in milestones.watch(config, FLAGS.stages or milestones.TRAINED, host):
            shown = "  ".join(f"{name} {row[name]:.3f}" for name in ("reward", "correct", "answered") if name in row)
            print(f"{row['stage']}  step {row['step']}  {row['tokens']} tokens  {shown}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    entry.run(main, __doc__)
