"""PPO values to write over a config's `ppo` section, as configs/ppo_orz_paper.py and configs/ppo_128k.py do.

They suit any size; each line ends with its source. Open-Reasoner-Zero (arXiv 2503.24290 section 3.1 and its
playground/orz_32b_ppo.py) has one set of values for 0.5B to 32B. Step-DeepResearch (arXiv 2512.20491 section 4.3.3)
says "consistent with the engineering practice in Open-Reasoner-Zero", on policy, clipped, a learned critic,
gamma = lambda = 1, and gives no other value.
"""

from ml_collections import ConfigDict

ORZ = dict(
    prompts_per_iteration=128,  # Open-Reasoner-Zero
    samples_per_prompt=64,  # Open-Reasoner-Zero
    gamma=1.0,  # Open-Reasoner-Zero
    gae_lambda=1.0,  # Open-Reasoner-Zero
    staleness=0,  # Open-Reasoner-Zero: strictly on policy
    clip=0.2,  # Open-Reasoner-Zero; without effect at one actor update an iteration, as the ratio is 1
    dual_clip=0.0,  # Open-Reasoner-Zero has none
    value_clip=0.2,  # Open-Reasoner-Zero
    actor_learning_rate=1e-6,  # Open-Reasoner-Zero
    critic_learning_rate=5e-6,  # Open-Reasoner-Zero
    warmup_steps=50,  # Open-Reasoner-Zero, optimizer steps; constant after them
    beta2=0.95,  # Open-Reasoner-Zero; beta1 is 0.9 and weight decay 0, as there
    clip_norm=1.0,  # Open-Reasoner-Zero
    actor_minibatches=1,  # Open-Reasoner-Zero: 1 actor update an iteration
    critic_minibatches=12,  # Open-Reasoner-Zero: 12 critic updates an iteration
    critic_warmup_iterations=0,  # Open-Reasoner-Zero: freezing_actor_steps -1, none
    kl_coefficient=0.0,  # Open-Reasoner-Zero
    entropy_coefficient=0.0,  # Open-Reasoner-Zero
    loss_aggregation="token_mean",  # Open-Reasoner-Zero: all tokens of the buffer alike
    whiten=True,  # Open-Reasoner-Zero: mean and deviation over all action tokens
    temperature=1.0,  # Open-Reasoner-Zero; the sampler has no top_p and top_k
    truncated_reward="zero",  # Open-Reasoner-Zero: 0 unless the episode stopped by itself
    tis_cap=0.0,  # Open-Reasoner-Zero: no correction
)
STEPDR = ORZ | dict(
    prompts_per_iteration=64,  # ours: episodes have up to 128K tokens, Open-Reasoner-Zero's 8K
    samples_per_prompt=8,  # ours; deep-research recipes take 8 to 16
    gamma=1.0,  # paper
    gae_lambda=1.0,  # paper
    staleness=0,  # paper: on policy
    critic_warmup_iterations=5,  # ours: first values are 0, and the actor should not learn from them
    truncated_reward="worst",  # ours: rubrics may have negative weights, so that 0 would reward giving up
    tis_cap=2.0,  # ours: sampler and trainer round differently in bfloat16; 2 is Tunix's and SkyRL's cap
)


def orz_paper(config: ConfigDict) -> ConfigDict:
    """Open-Reasoner-Zero's published values; changes and returns `config`."""
    config.ppo.update(ORZ)
    return config


def stepdr(config: ConfigDict) -> ConfigDict:
    """The paper's choices, the rest from Open-Reasoner-Zero or ours."""
    config.ppo.update(STEPDR)
    return config
