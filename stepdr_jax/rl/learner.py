"""One PPO iteration on finished episodes: values, advantages, critic updates, actor updates, and what they did.

With `PPOConfig.offload` a part of the state is in device memory only while a program of its network runs; between calls all
of it waits in pinned host memory. Numbers do not depend on it.
"""

import concurrent.futures
import dataclasses
import enum
import functools
import types
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np
import optax
from ml_collections import ConfigDict

from stepdr_jax.models import value_head
from stepdr_jax.models.parallel import Parallel
from stepdr_jax.models.qwen2 import Qwen2Config
from stepdr_jax.rl import advantages, guards, ppo
from stepdr_jax.rl.guards import Guard
from stepdr_jax.rl.rollouts import EpisodeArrays
from stepdr_jax.runtime import distributed
from stepdr_jax.sharding import memory
from stepdr_jax.training.program import resolve_parallel, token_order

KL_EPISODES = 16  # of an iteration, on which the policy before and after an update are compared


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
    critic_warmup_iterations: int
    loss_aggregation: str
    whiten: bool
    tis_cap: float
    rows: int
    context: int
    seed: int
    order: np.ndarray | None = None  # of a row's tokens on a mesh; None gathers actions instead
    offload: bool = False  # what is not at work waits in pinned host memory
    staleness: int = 0  # iterations that the sampler's weights are behind; above 0 the state keeps those weights
    guard: Guard = Guard()

    @classmethod
    def from_config(cls, config: ConfigDict, model: Qwen2Config, mesh: jax.sharding.Mesh | None = None) -> "PPOConfig":
        """From the config; with a mesh, rows are split over it. Raises UserError for sizes that it does not divide."""
        c = config.ppo
        context = config.agent.max_episode_tokens
        parallel, order = Parallel(remat=c.remat), None
        if mesh is not None and mesh.size > 1:
            parallel = resolve_parallel(config, "ppo", mesh, model)
            order = token_order(parallel, context)
            order = np.arange(context) if order is None else order
        return cls(
            settings=ppo.Settings(
                model=model,
                temperature=c.temperature,
                clip=c.clip,
                dual_clip=c.dual_clip,
                value_clip=c.value_clip,
                kl_coefficient=c.kl_coefficient,
                entropy_coefficient=c.entropy_coefficient,
                parallel=parallel,
            ),
            actor_optimizer=ppo.make_optimizer(c.actor_learning_rate, c.warmup_steps, c.beta2, c.clip_norm),
            critic_optimizer=ppo.make_optimizer(c.critic_learning_rate, c.warmup_steps, c.beta2, c.clip_norm),
            gamma=c.gamma,
            gae_lambda=c.gae_lambda,
            actor_minibatches=c.actor_minibatches,
            critic_minibatches=c.critic_minibatches,
            critic_warmup_iterations=c.critic_warmup_iterations,
            loss_aggregation=c.loss_aggregation,
            whiten=c.whiten,
            tis_cap=c.tis_cap,
            rows=c.microbatch_sequences,
            context=context,
            seed=config.seed,
            order=order,
            offload=config.placement.offload == "idle",
            staleness=c.staleness,
            guard=Guard.of(c.guard),
        )


def init_state(actor: dict, config: PPOConfig, key: jax.Array) -> dict[str, Any]:
    """{"params", "critic", "params_moments", "critic_moments"}: the actor is "params", as in every stage's checkpoint.

    The critic's decoder starts as the actor's, its head at zero. With staleness there is "behaviour", too: the weights that
    the next iteration's episodes are sampled with.
    """
    actor = jax.tree.map(jax.numpy.copy, actor)  # steps donate their parameters; the caller's stay alive
    critic = value_head.init_value_params(actor, config.settings.model, key)
    behaviour = {"behaviour": jax.tree.map(jax.numpy.copy, actor)} if config.staleness else {}
    return behaviour | {
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
    known: Mapping[str, Any] = types.MappingProxyType({}),
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
        known: metrics of these episodes that the guard looks at beside the learner's own.

    Returns:
        (state, metrics, details).

    Raises:
        guards.Stop: a limit of the guard is broken, and it does not skip.
    """
    state, mask_ET = dict(state), episodes.action_mask_ET
    if config.staleness:
        [state["behaviour"]] = _kept(config, state["params"])
    (old_ET, entropy_ET, reference_ET), values_ET = _at_once(
        lambda: _old_logprobs(*_for_reading(state["params"], reference), episodes, config),
        lambda: _old_values(*_for_reading(state["critic"]), episodes, config),
        config=config,
    )
    rewards_ET = advantages.place_rewards(episodes.rewards_E, mask_ET)
    raw_ET, returns_ET = map(
        np.asarray, advantages.gae(rewards_ET, values_ET, mask_ET, config.gamma, config.gae_lambda)
    )
    metrics = _batch_metrics(episodes, old_ET, entropy_ET, values_ET, returns_ET, raw_ET)
    importance_ET = np.ones_like(old_ET)
    if config.tis_cap:
        importance_ET, more = _importance(old_ET, episodes, config.tis_cap)
        metrics |= more
    details = Details(values_ET, raw_ET, old_ET)
    if not mask_ET.any():
        return state, metrics | {"skipped_updates": 0.0, "guarded_updates": 0.0}, details

    per_action = dict(
        advantage=advantages.whiten(raw_ET, mask_ET) if config.whiten else raw_ET,
        old_logprob=old_ET,
        old_value=values_ET,
        return_=returns_ET,
        reference_logprob=reference_ET,
        importance=importance_ET,
    )
    acts = iteration >= config.critic_warmup_iterations
    guarded = acts and _breaks(config.guard, {**known, **metrics})
    acts = acts and not guarded
    parts = ("params", "params_moments")
    before = _kept(config, *(state[part] for part in parts)) if acts and config.guard.undoes else []
    networks = list(_Network) if acts else [_Network.CRITIC]
    trained = _at_once(
        *(functools.partial(_train, n, state, episodes, per_action, config, iteration) for n in networks), config=config
    )
    skipped = 0.0
    for new_metrics, bad in trained:
        metrics, skipped = metrics | new_metrics, skipped + bad
    if acts and config.guard.max_kl:
        metrics["kl_after"] = _kl_after(*_for_reading(state["params"]), old_ET, episodes, config)
        guarded = _breaks(config.guard, metrics)
        if guarded:
            state |= dict(zip(parts, before, strict=True))
    metrics["guarded_updates"] = float(guarded)
    return state, metrics | {"skipped_updates": skipped}, details


def _breaks(guard: Guard, metrics: Mapping[str, float]) -> bool:
    problem = guard.problem(metrics)
    if problem and not guard.skip:
        raise guards.Stop(problem)
    return problem is not None


class _Network(enum.StrEnum):
    """The two trained networks, by their key in the state."""

    CRITIC = "critic"
    ACTOR = "params"


def _at_once(*works: Callable[[], Any], config: PPOConfig) -> list[Any]:
    """Results of independent works. On a CPU in threads: their small programs leave cores idle. Same results either way.

    Elsewhere one after the other: programs with collectives must start in the same order on every device and host, and
    what is to wait on the host must make room first.
    """
    if len(works) == 1 or jax.default_backend() != "cpu" or config.settings.sharded or config.offload:
        return [work() for work in works]
    with concurrent.futures.ThreadPoolExecutor(len(works)) as threads:
        return [running.result() for running in [threads.submit(work) for work in works]]


_copied = jax.jit(lambda tree: jax.tree.map(jax.numpy.copy, tree))


def _kept(config: PPOConfig, *trees: Any) -> list[Any]:
    """Copies that outlive an update, where the state waits."""
    copies = (_copied(memory.copied(tree, memory.DEVICE)) for tree in trees)
    return [memory.moved(copy, memory.HOST) if config.offload else copy for copy in copies]


def _for_reading(*trees: Any) -> list[Any]:
    """The trees in device memory; what waits on the host stays there, too."""
    return [None if tree is None else memory.copied(tree, memory.DEVICE) for tree in trees]


def _old_logprobs(actor, reference, episodes: EpisodeArrays, config: PPOConfig):
    """Log-probability and entropy of every action now, and its log-probability under the reference (0 without one)."""
    old_ET, entropy_ET, reference_ET = (np.zeros(episodes.tokens_ET.shape, np.float32) for _ in range(3))
    for micro in ppo.pack(episodes, range(len(old_ET)), rows=config.rows, context=config.context, order=config.order):
        logprob_N, entropy_N = ppo.logprobs(actor, micro.rows, settings=config.settings)
        micro.scatter(distributed.fetch_global(logprob_N), old_ET)
        micro.scatter(distributed.fetch_global(entropy_N), entropy_ET)
        if config.settings.kl_coefficient:
            expected_N = ppo.logprobs(reference, micro.rows, settings=config.settings)[0]
            micro.scatter(distributed.fetch_global(expected_N), reference_ET)
    return old_ET, entropy_ET, reference_ET


def _kl_after(actor, old_ET, episodes: EpisodeArrays, config: PPOConfig) -> float:
    """Mean k3 estimate a token of KL(policy before || policy now) on at most KL_EPISODES episodes, evenly spaced."""
    kept = np.flatnonzero(episodes.kept_E)
    members = kept[np.linspace(0, len(kept) - 1, min(KL_EPISODES, len(kept))).round().astype(int)]
    now_ET, read_ET = np.zeros_like(old_ET), np.zeros(old_ET.shape, bool)
    for micro in ppo.pack(episodes, members, rows=config.rows, context=config.context, order=config.order):
        micro.scatter(distributed.fetch_global(ppo.logprobs(actor, micro.rows, settings=config.settings)[0]), now_ET)
    read_ET[members] = episodes.action_mask_ET[members]
    change_N = (now_ET - old_ET)[read_ET].astype(np.float64)
    return float(np.mean(np.exp(change_N) - 1 - change_N))


def _old_values(critic, episodes: EpisodeArrays, config: PPOConfig) -> np.ndarray:
    values_ET = np.zeros(episodes.tokens_ET.shape, np.float32)
    for micro in ppo.pack(
        episodes, range(len(values_ET)), rows=config.rows, context=config.context, tight=False, order=config.order
    ):
        micro.scatter(distributed.fetch_global(ppo.values(critic, micro.rows, settings=config.settings)), values_ET)
    return values_ET


def _train(
    network: _Network,
    state: dict[str, Any],
    episodes: EpisodeArrays,
    per_action: dict[str, np.ndarray],
    config: PPOConfig,
    iteration: int,
) -> tuple[dict[str, float], float]:
    """One optimizer step a minibatch, on this network's part of `state`: (mean metrics, steps skipped as not finite)."""
    is_actor = network == _Network.ACTOR
    gradients = ppo.actor_gradients if is_actor else ppo.critic_gradients
    optimizer = config.actor_optimizer if is_actor else config.critic_optimizer
    count = config.actor_minibatches if is_actor else config.critic_minibatches
    parts = (network, f"{network}_moments")
    params, moments = (memory.moved(state[part], memory.DEVICE) for part in parts)
    mask_ET = episodes.action_mask_ET
    sums: dict[str, float] = {}
    norms, skipped = [], 0.0
    kept_M = np.flatnonzero(episodes.kept_E)  # minibatches are those of the surviving episodes alone
    for places in ppo.minibatches(len(kept_M), count, seed=config.seed, iteration=iteration, purpose=int(is_actor)):
        members = kept_M[places]
        kept_ET = np.zeros_like(mask_ET)
        kept_ET[members] = mask_ET[members]
        if not kept_ET.any():
            continue
        weight_ET = ppo.action_weights(kept_ET, config.loss_aggregation)
        if is_actor:
            weight_ET = weight_ET * per_action["importance"]
        share_ET = ppo.action_weights(kept_ET, "token_mean")
        total = ppo.zeros_like(params)
        for micro in ppo.pack(
            episodes, members, rows=config.rows, context=config.context, tight=is_actor, order=config.order
        ):
            actions = micro.gather(weight=weight_ET, share=share_ET, **per_action)
            total, more = gradients(params, total, micro.rows, actions, settings=config.settings)
            for key, value in more.items():
                sums[key] = sums.get(key, 0.0) + float(value)
        params, moments, norm, bad = ppo.apply(params, moments, total, optimizer=optimizer)
        norms.append(float(norm))
        skipped += float(bad)
    metrics = {key: value / max(len(norms), 1) for key, value in sums.items()}
    metrics["actor_grad_norm" if is_actor else "critic_grad_norm"] = float(np.mean(norms))
    rest = memory.HOST if config.offload else memory.DEVICE
    state |= {part: memory.moved(tree, rest) for part, tree in zip(parts, (params, moments), strict=True)}
    return metrics, skipped


def _importance(old_ET, episodes: EpisodeArrays, cap: float) -> tuple[np.ndarray, dict[str, float]]:
    """min(trainer's / sampler's probability, cap) of every action: corrects for samples of older weights, or of a sampler
    whose numbers differ, as far as the cap lets the variance grow (truncated importance sampling)."""
    mask_ET = episodes.action_mask_ET
    ratio_ET = np.exp(np.clip(np.where(mask_ET, old_ET - episodes.logprobs_ET, 0.0), -20.0, 20.0))
    kept_M = ratio_ET[mask_ET]
    metrics = (
        {"importance/mean": float(kept_M.mean()), "importance/capped": float((kept_M > cap).mean())}
        if kept_M.size
        else {}
    )
    return np.minimum(ratio_ET, cap).astype(np.float32), metrics


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
