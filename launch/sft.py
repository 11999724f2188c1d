"""Supervised fine-tuning on clean trajectories, from the end of mid-training; only what the assistant wrote is learned.

Continues where it stopped; a finished stage returns at once. Writes run_dir/seed<k>/sft/.
"""

import sys

from launch import entry, tool_host


def main(config) -> None:
    train_stage(config, "sft")


def train_stage(config, stage: str) -> None:
    """Trains one stage of `training.loop`, with its evaluations on the way, and prints how it ended."""
    from stepdr_jax.evaluation import checkpoints
    from stepdr_jax.training import loop  # after the flags: a mistyped one should not wait for jax

    on_eval_checkpoint = checkpoints.inline_evaluation(
        config, stage, lambda: tool_host.start_if_needed(config, f"seed{config.seed}.{stage}")
    )
    done = loop.train(config, stage, on_eval_checkpoint=on_eval_checkpoint)
    print(f"{stage}  {done['steps']} steps  loss {done['final_loss']:.3f}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    entry.run(main, __doc__, many_processes=True)
