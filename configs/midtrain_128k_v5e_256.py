"""Qwen2.5-32B at 128K tokens on 256 chips of v5e (16x16): configs/midtrain_128k.py on another slice.

It takes 7.8 GiB a chip (docs/plans.md):
`python -m launch.plan --config=configs/midtrain_128k_v5e_256.py --topology=v5e-256`.
"""

from ml_collections import ConfigDict

from configs import midtrain_128k


def get_config() -> ConfigDict:
    config = midtrain_128k.get_config()
    config.name = "midtrain_128k_v5e_256"
    config.run_dir = "runs/midtrain_128k_v5e_256"
    config.mesh.update(dict(data=1, fsdp=8, context=32, tensor=1))  # 4,096 tokens a chip
    config.parallel.context_strategy = "all_gather"  # permutes are synchronous on v5e
    return config
