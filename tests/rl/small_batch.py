"""A tiny model and a batch of made-up episodes."""

import jax
import numpy as np

from stepdr_jax.models import qwen2
from stepdr_jax.rl import learner, ppo
from stepdr_jax.rl.rollouts import EpisodeArrays

MODEL = qwen2.Qwen2Config(
    vocab_size=70,
    hidden_size=16,
    num_layers=1,
    num_heads=2,
    num_kv_heads=1,
    head_dim=8,
    intermediate_size=24,
    rope_theta=1e4,
    rms_norm_eps=1e-6,
    tie_embeddings=True,
)

CONTEXT = 24

CONFIG = learner.PPOConfig(
    settings=ppo.ProgramSettings(MODEL, 1.0, 0.2, 0.2, 0.0, 0.0),
    actor_optimizer=ppo.make_optimizer(1e-2, 1, 0.95, 1.0),
    critic_optimizer=ppo.make_optimizer(1e-2, 1, 0.95, 1.0),
    gamma=1.0,
    gae_lambda=1.0,
    actor_minibatches=1,
    critic_minibatches=2,
    critic_warmup_iterations=0,
    loss_aggregation="token_mean",
    whiten=True,
    tis_cap=0.0,
    microbatch_sequences=2,
    seq_len=CONTEXT,
    seed=0,
)


def make_state():
    actor = jax.tree.map(lambda w: 5 * w, qwen2.init_params(MODEL, jax.random.PRNGKey(0)))
    state = learner.init_state(actor, CONFIG, jax.random.PRNGKey(1))
    head = jax.random.normal(jax.random.PRNGKey(2), (MODEL.hidden_size,)) * 0.3
    return state | {"critic": state["critic"] | {"value_kernel": head}}


def make_episodes(masked=()):
    rng = np.random.default_rng(0)
    E = 6
    tokens = rng.integers(0, 70, (E, CONTEXT)).astype(np.int32)
    lengths = np.array([11, 24, 9, 15, 13, 10], np.int32)
    mask = np.zeros((E, CONTEXT), bool)
    for e in range(E):
        mask[e, 3:6] = True
        mask[e, lengths[e] - 3 : lengths[e]] = True
    kept = np.array([e not in masked for e in range(E)])
    mask &= kept[:, None]
    return EpisodeArrays(
        tokens,
        lengths,
        mask,
        np.where(mask, -3.0, 0).astype(np.float32),
        rng.random(E).astype(np.float32) * kept,
        kept,
    )
