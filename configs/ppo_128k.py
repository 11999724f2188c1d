"""PPO of Qwen2.5-32B on episodes of up to 128K tokens, on 128 chips of v5p (4x4x8): the recipe's last stage.

As sft_128k, from whose end it starts when both have the same run_dir. Learner and samplers share the chips in turn.
`python -m launch.plan --config=configs/ppo_128k.py --stage=ppo --topology=v5p:4x4x8` shows what it takes.
"""

from ml_collections import ConfigDict

from configs import ppo_presets, sft_128k


def get_config() -> ConfigDict:
    config = ppo_presets.stepdr(sft_128k.get_config())
    config.name = "ppo_128k"
    config.ppo.update(
        dict(
            iterations=500,  # ours
            microbatch_sequences=8,  # a row of 131,072 tokens for each fsdp group
            remat="layer",  # as in training: 5 GiB of layer inputs a chip
            checkpoint_every=5,  # iterations; ours: a checkpoint holds two networks and their moments, 0.8 TB
            max_masked_share=0.1,  # ours
        )
    )
    config.agent.wall_seconds = 9000.0  # ours; Alibaba's DeepResearch agent gives 150 minutes
    config.agent.max_tool_calls = 100  # ours
    config.sampler.update(
        dict(
            replicas=1,  # on each host; every host samples its own share of the episodes
            tensor=4,  # the chips of a v5p host: 15.3 GiB of weights on each
            pools=1,
            max_num_seqs=32,  # a host's pages hold so many episodes of 32K tokens
            page_size=128,  # tokens: 8 MiB a chip over 64 layers
            num_pages=8192,  # a host's: 64 GiB a chip, 8 episodes of full length (the planner says how many fit)
            prefill_batch=4,  # sequences of one prefill call
            prefill_chunk=2048,  # tokens of each: 8,192 a call keep the matrix units busy
            decode_steps=16,  # tokens of one decode call
            prefill_calls=1,  # between decode calls, so that a long observation does not hold up the others
            host_gb=192.0,  # of a host's 417 GiB; beyond it parked episodes are prefilled again
            attention="auto",  # the Pallas kernel on TPUs
        )
    )
    config.placement.update(
        dict(
            sampler="colocated",
            offload="none",  # 5.7 GiB of the learner's state a chip: it need not make room
            weight_sync_bucket_gb=2.0,  # the embedding alone is 1.45 GiB
        )
    )
    return config
