"""PPO of Qwen2.5-32B at 128K tokens on 256 chips of v5p (4x8x8): configs/ppo_128k.py on another slice.

`python -m launch.plan --config=configs/ppo_128k_v5p_256.py --stage=ppo --topology=v5p:4x8x8` shows what it takes.
"""

from ml_collections import ConfigDict

from configs import ppo_128k


def get_config() -> ConfigDict:
    config = ppo_128k.get_config()
    config.name = "ppo_128k_v5p_256"
    config.mesh.update(dict(data=1, fsdp=16, context=16, tensor=1))  # 8,192 tokens a chip
    config.ppo.microbatch_sequences = 16  # a row for each fsdp group
    config.parallel.vocab_tiles = 6  # of the 594 words that a device has
    for stage in (config.midtrain2, config.sft):  # not run with this config, but its batch must divide
        stage.batch_size = 16
    config.midtrain1.microbatches = 2
    return config
