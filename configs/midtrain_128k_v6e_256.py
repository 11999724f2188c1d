"""Qwen2.5-32B at 128K tokens on 256 chips of v6e (16x16): configs/midtrain_128k.py on another slice.

It takes 10.4 GiB a chip (docs/plans.md):
`python -m launch.plan --config=configs/midtrain_128k_v6e_256.py --topology=v6e-256`.
"""

from ml_collections import ConfigDict

from configs import midtrain_128k


def get_config() -> ConfigDict:
    config = midtrain_128k.get_config()
    config.name = "midtrain_128k_v6e_256"
    config.run_dir = "runs/midtrain_128k_v6e_256"
    config.mesh.update(dict(data=1, fsdp=16, context=16, tensor=1))  # 8,192 tokens a chip
    config.midtrain1.microbatches = 2  # a row at a time per fsdp group
    config.midtrain2.batch_size = config.sft.batch_size = 16  # a row for each fsdp group: 2,097,152 tokens a step
    config.midtrain2.steps //= 2  # the same tokens
    config.midtrain2.checkpoint_every //= 2
    config.sft.steps //= 2
    return config
