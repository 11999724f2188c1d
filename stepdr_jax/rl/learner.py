"""One PPO iteration on finished episodes: values, advantages, critic updates, actor updates, and what they did."""

import dataclasses
from typing import Any

import jax
import numpy as np
import optax
from ml_collections import ConfigDict

from stepdr_jax.models import value_head
from stepdr_jax.models.qwen2 import Qwen2Config
from stepdr_jax.rl import advantages, ppo
from stepdr_jax.rl.rollouts import EpisodeArrays

CRITIC, ACTOR = 0, 1  # purposes of the minibatch order


@dataclasses.dataclass(frozen=True)
class PPOConfig:
    """The `ppo` section as the learner reads it, plus the row length and the seed."""

    settings: ppo.Settings
    actor_optimizer: optax.GradientTransformation
    critic_optimizer: optax.GradientTransformation
    gamma: float
    gae_lambda: float
    actor_minibatches: int
    critic_minibatches: int
    critic_only_iterations: int
    loss_aggregation: str
    whiten: bool
    rows: int
    context: int
    seed: int

    @classmethod
    def from_config(cls, config: ConfigDict, model: Qwen2Config) -> "PPOConfig":
        c = config.ppo
        return cls(
            settings=ppo.Settings(
                model=model,
                temperature=c.temperature,
                clip=c.clip,
                value_clip=c.value_clip,
                kl_coefficient=c.kl_coefficient,
                entropy_coefficient=c.entropy_coefficient,
                remat=c.remat,
            ),
            actor_optimizer=ppo.make_optimizer(c.actor_learning_rate, c.warmup_steps, c.beta2, c.clip_norm),
            critic_optimizer=ppo.make_optimizer(c.critic_learning_rate, c.warmup_steps, c.beta2, c.clip_norm),
            gamma=c.gamma,
            gae_lambda=c.gae_lambda,
            actor_minibatches=c.actor_minibatches,
            critic_minibatches=c.critic_minibatches,
            critic_only_iterations=c.critic_only_iterations,
            loss_aggregation=c.loss_aggregation,
            whiten=c.whiten,
            rows=c.microbatch_rows,
            context=config.agent.max_episode_tokens,
            seed=config.seed,
        )


def init_state(actor: dict, config: PPOConfig, key: jax.Array) -> dict[str, Any]:
    """{"params", "critic", "params_moments", "critic_moments"}: the actor is "params", as in every stage's checkpoint.

    The critic's decoder starts as the actor's, its head at zero.
    """
    actor = jax.tree.map(jax.numpy.copy, actor)  # steps donate their parameters; the caller's stay alive
    critic = value_head.init_value_params(actor, config.settings.model, key)
    return {
        "params": actor,
        "critic": critic,
        "params_moments": config.actor_optimizer.init(actor),
        "critic_moments": config.critic_optimizer.init(critic),
    }


@dataclasses.dataclass(frozen=True)
class Details:
    """Per token, for logs and the trajectory viewer: float32[E, T], zero where nothing was sampled."""

    values_ET: np.ndarray
    advantages_ET: np.ndarray  # before whitening
    logprobs_ET: np.ndarray  # the trainer's


def update(
    state: dict[str, Any],
    episodes: EpisodeArrays,
    config: PPOConfig,
    iteration: int,
    reference: dict | None = None,
) -> tuple[dict[str, Any], dict[str, float], Details]:
    """Runs one iteration; `state` is consumed (its arrays are donated).

    Old log-probabilities and values are the trainer's own, computed before any update. Masked episodes enter nothing.
    With no episode left the state comes back unchanged.

    Args:
        state: of `init_state`.
        episodes: arrays of `rollouts.arrays`.
        config: see PPOConfig.
        iteration: number of this iteration; decides the minibatch order and whether the actor is trained yet.
        reference: frozen policy parameters, needed when kl_coefficient is not 0.

    Returns:
        (state, metrics, details).
    """
    settings, mask_ET = config.settings, episodes.action_mask_ET
    old_ET, entropy_ET, values_ET, reference_ET = (np.zeros(mask_ET.shape, np.float32) for _ in range(4))
    for micro in ppo.pack(episodes, range(len(mask_ET)), rows=config.rows, context=config.context):
        logprob_N, entropy_N = ppo.logprobs(state["params"], micro.rows, settings=settings)
        micro.scatter(logprob_N, old_ET)
        micro.scatter(entropy_N, entropy_ET)
        if settings.kl_coefficient:
            micro.scatter(ppo.logprobs(reference, micro.rows, settings=settings)[0], reference_ET)
    for micro in ppo.pack(episodes, range(len(mask_ET)), rows=config.rows, context=config.context, tight=False):
        micro.scatter(ppo.values(state["critic"], micro.rows, settings=settings), values_ET)

    rewards_ET = advantages.place_rewards(episodes.rewards_E, mask_ET)
    raw_ET, returns_ET = map(
        np.asarray, advantages.gae(rewards_ET, values_ET, mask_ET, config.gamma, config.gae_lambda)
    )
    advantages_ET = advantages.whiten(raw_ET, mask_ET) if config.whiten else raw_ET
    metrics = _batch_metrics(episodes, old_ET, entropy_ET, values_ET, returns_ET, raw_ET)
    details = Details(values_ET, raw_ET, old_ET)
    if not mask_ET.any():
        return state, metrics | {"skipped_updates": 0.0}, details

    per_action = dict(
        advantage=advantages_ET,
        old_logprob=old_ET,
        old_value=values_ET,
        return_=returns_ET,
        reference_logprob=reference_ET,
    )
    skipped = 0.0
    parts = [("critic", config.critic_minibatches, CRITIC, ppo.critic_gradients, config.critic_optimizer)]
    if iteration >= config.critic_only_iterations:
        parts.append(("params", config.actor_minibatches, ACTOR, ppo.actor_gradients, config.actor_optimizer))
    for name, count, purpose, gradients, optimizer in parts:
        sums: dict[str, float] = {}
        norms = []
        for members in ppo.minibatches(len(mask_ET), count, seed=config.seed, iteration=iteration, purpose=purpose):
            kept_ET = np.zeros_like(mask_ET)
            kept_ET[members] = mask_ET[members]
            if not kept_ET.any():
                continue
            per_action["weight"] = ppo.action_weights(kept_ET, config.loss_aggregation)
            per_action["share"] = ppo.action_weights(kept_ET, "token_mean")
            total = ppo.zeros_like(state[name])
            for micro in ppo.pack(episodes, members, rows=config.rows, context=config.context, tight=name == "params"):
                actions = micro.gather(**per_action)
                total, more = gradients(state[name], total, micro.rows, actions, settings=settings)
                for key, value in more.items():
                    sums[key] = sums.get(key, 0.0) + float(value)
            state[name], state[f"{name}_moments"], norm, bad = ppo.apply(
                state[name], state[f"{name}_moments"], total, optimizer=optimizer
            )
            norms.append(float(norm))
            skipped += float(bad)
        metrics |= {key: value / max(len(norms), 1) for key, value in sums.items()}
        metrics["actor_grad_norm" if name == "params" else "critic_grad_norm"] = float(np.mean(norms))
    metrics["skipped_updates"] = skipped
    return state, metrics, details


def _batch_metrics(episodes, old_ET, entropy_ET, values_ET, returns_ET, raw_ET) -> dict[str, float]:
    """What is known before any update. The gap compares the sampler's log-probabilities with the trainer's."""
    mask_ET = episodes.action_mask_ET
    if not mask_ET.any():
        return {}
    gap_M = np.abs(episodes.logprobs_ET[mask_ET].astype(np.float64) - old_ET[mask_ET])
    return {
        "logprob_gap/mean": float(gap_M.mean()),
        "logprob_gap/max": float(gap_M.max()),
        "entropy": float(entropy_ET[mask_ET].mean()),
        "value_mean": float(values_ET[mask_ET].mean()),
        "advantage_std": float(raw_ET[mask_ET].std()),
        "explained_variance": advantages.explained_variance(values_ET, returns_ET, mask_ET),
    }
