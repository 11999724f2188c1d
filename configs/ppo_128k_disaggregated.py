"""PPO of Qwen2.5-32B at 128K on 128 chips of v5p with samplers of their own: two chips of each host sample, two learn.

`python -m launch.plan --config=configs/ppo_128k_disaggregated.py --stage=ppo --topology=v5p:4x4x8` shows what it takes.
"""

from ml_collections import ConfigDict

from configs import ppo_128k


def get_config() -> ConfigDict:
    return disaggregated(ppo_128k.get_config())


def disaggregated(config: ConfigDict) -> ConfigDict:
    """`config` with two of each v5p host's four chips for the sampler and two for the learner."""
    config.name += "_disaggregated"
    config.mesh.fsdp //= 2
    config.ppo.microbatch_sequences //= 2  # a row for each fsdp group
    config.placement.update(dict(sampler="disaggregated", offload="none"))
    config.sampler.update(
        dict(
            tensor=2,  # 30.5 GiB of weights on each chip
            max_num_seqs=16,
            num_pages=3840,  # 60 GiB a chip: pages are of 16 MiB with two chips
        )
    )
    return config
