"""Qwen2.5-32B at 128K tokens on 64 chips of tpu7x (4x4x4), two devices each: configs/midtrain_128k.py on another slice.

It takes 13.2 GiB a device (docs/plans.md):
`python -m launch.plan --config=configs/midtrain_128k_tpu7x_64.py --topology=tpu7x:4x4x4`.
"""

from ml_collections import ConfigDict

from configs import midtrain_128k


def get_config() -> ConfigDict:
    config = midtrain_128k.get_config()
    config.name = "midtrain_128k_tpu7x_64"
    config.run_dir = "runs/midtrain_128k_tpu7x_64"
    config.mesh.update(dict(data=1, fsdp=8, context=16, tensor=1))  # 8,192 tokens a device
    return config
