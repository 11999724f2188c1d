"""Supervised fine-tuning of Qwen2.5-32B on agent trajectories of up to 128K tokens (arXiv 2512.20491) on v5p:4x4x8.

As midtrain_128k, from whose end it starts when both have the same run_dir; only the assistant's tokens carry loss.
`python -m launch.plan --config=configs/sft_128k.py --stage=sft --topology=v5p:4x4x8` shows what it takes.
"""

from ml_collections import ConfigDict

from configs import midtrain_128k


def get_config() -> ConfigDict:
    config = midtrain_128k.get_config()
    config.name = "sft_128k"
    config.sft.update(
        dict(
            learning_rate=1e-5,  # ours: half of mid-training's, for a thousandth of its tokens
            final_learning_rate=1e-6,
            warmup_steps=50,
            trajectory_loss="assistant",  # paper: next token on model turns
        )
    )
    return config
