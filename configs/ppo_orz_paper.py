"""The miniature with Open-Reasoner-Zero's published PPO values, which are for large models.

`python -m launch.ppo --config=configs/ppo_orz_paper.py --config.run_dir=DIR` after `launch.sft` in the same DIR.
"""

from ml_collections import ConfigDict

from configs import miniature, ppo_presets


def get_config() -> ConfigDict:
    config = ppo_presets.orz_paper(miniature.get_config())
    config.name = "ppo_orz_paper"
    return config
