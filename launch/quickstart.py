"""Runs the whole recipe: offline web, synthesis, data, two mid-training stages, SFT, PPO, evaluation, report.

Finished stages are skipped and an interrupted one continues, so the same command is always safe to run again.

    python -m launch.quickstart
    python -m launch.quickstart --seeds=3
    python -m launch.quickstart --config.run_dir=runs/mine --config.offline_web.documents=path/to/my/documents
"""

from absl import flags

from launch import entry
from stepdr_jax.errors import UserError
from stepdr_jax.orchestration import quickstart

FLAGS = flags.FLAGS
flags.DEFINE_integer("seeds", 1, "training seeds, from config.seed on; data is made once")
flags.DEFINE_boolean("fresh", False, "delete the run directory first")


def main(config) -> None:
    if FLAGS.seeds < 1:
        raise UserError(f"--seeds: expected 1 or more, got {FLAGS.seeds}")
    reference = entry.load(entry.DEFAULT_CONFIG)
    report = quickstart.run_stages(config, reference, entry.config_arguments(), seeds=FLAGS.seeds, fresh=FLAGS.fresh)
    print(f"report: {report.resolve()}", flush=True)


if __name__ == "__main__":
    entry.run(main, __doc__)
