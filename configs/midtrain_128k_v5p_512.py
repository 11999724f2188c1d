"""Qwen2.5-32B at 128K tokens on 512 chips of v5p (8x8x8): configs/midtrain_128k.py on another slice.

It takes 3.6 GiB a chip (docs/plans.md):
`python -m launch.plan --config=configs/midtrain_128k_v5p_512.py --topology=v5p:8x8x8`.
"""

from ml_collections import ConfigDict

from configs import midtrain_128k


def get_config() -> ConfigDict:
    config = midtrain_128k.get_config()
    config.name = "midtrain_128k_v5p_512"
    config.run_dir = "runs/midtrain_128k_v5p_512"
    config.mesh.update(dict(data=1, fsdp=8, context=64, tensor=1))  # 2,048 tokens a chip
    config.parallel.vocab_tiles = 9  # of the 297 words that a device has
    return config
