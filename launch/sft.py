"""Fine-tunes the mid-trained model on research trajectories; only what the assistant wrote is learnt.

Continues where it stopped; a finished stage returns at once. Writes run_dir/seed<k>/sft/.
"""

import sys

from launch import entry, tool_host


def main(config) -> None:
    from stepdr_jax.evaluation import milestones
    from stepdr_jax.training import loop  # after the flags: a mistyped one should not wait for jax

    on_milestone = milestones.inline(config, "sft", lambda: tool_host.open_tool_host(config, f"seed{config.seed}.sft"))
    done = loop.train(config, "sft", on_milestone=on_milestone)
    print(f"sft  {done['steps']} steps  loss {done['final_loss']:.3f}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    entry.run(main, __doc__, many_processes=True)
