"""Qwen2.5-32B at 128K tokens on 128 chips of v5p (4x4x8, sold as v5p-256): mid-training II and what follows.

The miniature with what a pod changes. The paper is arXiv 2512.20491.
`python -m launch.plan --config=configs/midtrain_128k.py --topology=v5p:4x4x8` shows what it takes.
"""

import dataclasses

from ml_collections import ConfigDict

from configs import miniature

SIZE = "32B"  # paper: Qwen2.5-32B-Base


def get_config() -> ConfigDict:
    from stepdr_jax.models import sizes  # here: a config is listed without jax

    config = miniature.get_config()
    config.name = "midtrain_128k"
    config.run_dir = "runs/midtrain_128k"
    shape = dataclasses.asdict(sizes.size(SIZE))
    config.tokenizer.vocab_size = shape.pop("vocab_size")  # rows of the embedding, padded as published
    config.model.update(shape)
    config.mesh.update(dict(data=1, fsdp=8, context=16, tensor=1))  # one row per fsdp group; 8,192 tokens a chip
    config.parallel.update(
        dict(
            context_strategy="ring",  # its hops run under the kernel on v5p and it holds no gathered keys
            zigzag=True,  # equal causal work on all 16 positions
            attention="splash",  # the Pallas kernel; scores never reach HBM
            remat="layer",  # 5 GiB of layer inputs instead of about 100 GiB of activations a chip
            vocab_tiles=4,  # a quarter of the unembedding at a time: 12.7 GiB a chip instead of 15.8 (docs/plans.md)
        )
    )
    config.agent.update(dict(prompt="full", max_turns=30, max_turn_tokens=16384, max_episode_tokens=131072))  # paper

    # Name the sources that you have on disk here, each with the license under which you may use it, for example
    #   config.data.sources.update(dict(
    #       wikipedia=dict(format="wikipedia", path="<dumps>/enwiki-*.xml*.bz2", component="general_knowledge"),
    #       synth=dict(format="synth", path="<synth>/*.parquet", component="synthetic_knowledge"),
    #       adp=dict(format="adp", path="<adp>/*.jsonl", component="web_browsing", license="<of the data set>")))
    # and what must not be trained on:
    #   config.data.evaluation_sets.update(dict(simpleqa="<evals>/simple_qa_test_set.csv", frames="<evals>/frames.tsv"))
    # Dumps have bad rows; they are counted and named in the data card.
    config.data.update(dict(on_bad_row="skip", exact_duplicates="drop"))

    config.eval.update(dict(every_tokens=5_000_000_000, inline=False))  # paper: every 5B tokens
    config.log.tensorboard = True

    config.midtrain1.mixture.copying = 0.0  # the model can copy already
    config.midtrain1.update(
        dict(
            seq_len=32768,  # paper
            batch_size=32,  # rows; 1M tokens a step as below, ours (the paper is silent)
            steps=143051,  # paper: 150B tokens / 1,048,576 a step
            microbatches=4,  # a row at a time per fsdp group
            checkpoint_every=4768,  # steps; paper: every 5B tokens
        )
    )
    config.midtrain2.update(
        dict(
            seq_len=131072,  # paper
            batch_size=8,  # rows; 1,048,576 tokens a step, ours (the paper is silent)
            steps=14305,  # 15B tokens, a tenth of stage I, ours (the paper is silent)
            checkpoint_every=4768,
        )
    )
    config.sft.update(
        dict(
            seq_len=131072,  # the longest episodes of the paper; it is silent on SFT's length
            batch_size=8,
            steps=1000,  # 1B tokens, ours
            checkpoint_every=250,
        )
    )
    for stage in (config.midtrain1, config.midtrain2, config.sft):
        stage.update(
            dict(
                learning_rate=2e-5,  # ours: a tenth of a 32B model's peak in pre-training, as it continues one
                final_learning_rate=2e-6,
                warmup_steps=200,
                weight_decay=0.1,  # as Qwen2.5 and most pre-training
                loss_chunk=512,  # tokens whose logits exist at a time: 0.29 GiB in float32
                warmup_data="",
                warmup_data_steps=0,
                keep_checkpoints=3,
                heldout_every=500,  # steps
            )
        )
        # ours: a large batch is steadier than the miniature's, so less is a spike
        stage.guard.update(dict(norm_factor=5.0, loss_rise=0.5))
    return config
