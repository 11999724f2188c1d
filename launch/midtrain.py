"""Mid-trains the model on packed documents and agentic data, in two stages of growing context.

Continues where it stopped; a finished stage returns at once. Writes run_dir/seed<k>/<stage>/.
"""

from absl import flags

from launch import entry, sft
from stepdr_jax.errors import UserError
from stepdr_jax.runtime import stages

NAMES = stages.run_by("launch.midtrain")
_STAGE = flags.DEFINE_string("stage", "", f"{' or '.join(NAMES)}; empty = both, in order")


def main(config) -> None:
    if _STAGE.value and _STAGE.value not in NAMES:
        raise UserError(f"--stage: expected one of {', '.join(NAMES)}, got {_STAGE.value!r}")
    for stage in [_STAGE.value] if _STAGE.value else NAMES:
        sft.train_stage(config, stage)


if __name__ == "__main__":
    entry.run(main, __doc__, many_processes=True)
