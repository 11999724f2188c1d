"""Mid-trains the model on packed reading and agentic data, in two stages of growing context.

Continues where it stopped; a finished stage returns at once. Writes run_dir/seed<k>/<stage>/.
"""

import sys

from absl import flags

from launch import entry, tool_host
from stepdr_jax.errors import UserError

STAGES = ("midtrain1", "midtrain2")
_STAGE = flags.DEFINE_string("stage", "", "midtrain1 or midtrain2; empty = both, in order")


def main(config) -> None:
    stages = STAGES if not _STAGE.value else (_STAGE.value,)
    if not set(stages) <= set(STAGES):
        raise UserError(f"expected --stage=midtrain1 or --stage=midtrain2, got --stage={_STAGE.value}")
    from stepdr_jax.evaluation import milestones
    from stepdr_jax.training import loop  # after the flags: a mistyped one should not wait for jax

    for stage in stages:
        on_milestone = milestones.inline(
            config, stage, lambda name=stage: tool_host.open_tool_host(config, f"seed{config.seed}.{name}")
        )
        done = loop.train(config, stage, on_milestone=on_milestone)
        print(f"{stage}  {done['steps']} steps  loss {done['final_loss']:.3f}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    entry.run(main, __doc__, many_processes=True)
