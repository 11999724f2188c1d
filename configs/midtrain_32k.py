"""Qwen2.5-32B at 32K tokens on 128 chips of v5p (4x4x8): mid-training I of the recipe (arXiv 2512.20491), 150B tokens.

Everything else is as in midtrain_128k. The context axis is shorter, because a row is.
`python -m launch.plan --config=configs/midtrain_32k.py --stage=midtrain1 --topology=v5p:4x4x8` shows what it takes.
"""

from ml_collections import ConfigDict

from configs import midtrain_128k


def get_config() -> ConfigDict:
    config = midtrain_128k.get_config()
    config.name = "midtrain_32k"
    config.run_dir = "runs/midtrain_32k"
    config.mesh.update(
        dict(data=1, fsdp=32, context=4, tensor=1)
    )  # the same 8,192 tokens a chip, a quarter of the hops
    config.midtrain1.microbatches = 1  # a row per fsdp group is the whole batch
    for stage in (
        config.midtrain2,
        config.sft,
    ):  # 128K rows need midtrain_128k's mesh; here they would be 4 times the batch
        stage.batch_size = 32
    return config
