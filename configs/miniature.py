"""The whole recipe on two CPU cores in half an hour: a tiny Qwen2.5, an offline web of real facts, every stage.

Sizes are those of configs/base.py; steps, rates and mixtures are chosen here, by measurement at this size. The
configs of pods change values only: the stages, their order and their code are the same.
"""

from ml_collections import ConfigDict

from configs import base


def get_config() -> ConfigDict:
    config = base.get_config()
    config.name = "miniature"
    config.run_dir = "runs/miniature"
    config.midtrain1.update(
        dict(
            steps=2600,
            warmup_data="copying",  # repeated spans of random ids; without it quoting is not learned in minutes
            warmup_data_steps=1000,
            mixture=dict(
                copying=0.05,
                active_reading=0.2,  # Table 1: general knowledge, QA and rewriting
                quoting=0.25,  # Table 1: rewriting; a span and the same span again teaches copying
                synthetic_knowledge=0.25,  # Table 1: PleIAs-style, invented entities
                summarisation=0.1,
                reasoning=0.1,
                reflection=0.05,
            ),
        )
    )
    config.midtrain2.update(
        dict(
            seq_len=640,
            batch_size=4,
            steps=1200,
            learning_rate=1.5e-3,
            final_learning_rate=1.5e-4,
            mixture=dict(
                url_qa=0.2,  # Table 2
                deep_search_tools=0.4,  # Table 2: deep search with tool calls
                planning_tools=0.1,
                long_summarisation=0.1,
                reflection_tools=0.1,
                dialogue=0.05,
                active_reading=0.05,
            ),
        )
    )
    config.sft.update(
        dict(
            seq_len=640,
            batch_size=4,
            steps=600,
            learning_rate=1e-3,
            final_learning_rate=1e-4,
            trajectory_loss="assistant",
            mixture=dict(sft_deep_search=0.5, sft_deep_research=0.5),
        )
    )
    return config
