"""One PPO iteration on finished rollouts: values, advantages, critic updates, actor updates and their metrics.

With `PPOConfig.offload` a part of the state is in device memory only while a program of its network runs; otherwise it
is in pinned host memory. Results do not depend on it.

Shape suffixes: E episodes, T tokens of an episode, A actions of a microbatch, M tokens or episodes under a mask.
"""

import concurrent.futures
import dataclasses
import enum
import functools
import types
from collections.abc import Callable, Mapping, Sequence
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
from stepdr_jax.rl.rollout_metrics import evenly_spaced
from stepdr_jax.rl.rollouts import EpisodeArrays
from stepdr_jax.runtime import distributed
from stepdr_jax.sharding import memory
from stepdr_jax.training.program import resolve_parallel, token_order

Params = dict[str, Any]  # a tree of arrays, as of `qwen2.param_shapes`
LearnerState = dict[str, Params]  # of `init_state`
KL_EPISODES = 16  # of an iteration, on which the policies before and after the update are compared


@dataclasses.dataclass(frozen=True)
class PPOConfig:
    """The `ppo` section as the learner reads it, plus the length of a packed row and the seed."""

    settings: ppo.ProgramSettings
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
    microbatch_sequences: int  # packed rows
    seq_len: int  # tokens of a packed row
    seed: int
    order: np.ndarray | None = None  # of a row's tokens on a mesh; None gathers actions instead
    offload: bool = False  # keep idle state in pinned host memory
    staleness: int = 0  # iterations that the sampler's weights lag behind; above 0 the state holds those weights
    guard: Guard = Guard()

    @classmethod
    def from_config(cls, config: ConfigDict, model: Qwen2Config, mesh: jax.sharding.Mesh | None = None) -> "PPOConfig":
        """From the config; rows are sharded over `mesh`. Raises UserError for sizes that it does not divide."""
        c = config.ppo
        seq_len = config.agent.max_episode_tokens
        parallel, order = Parallel(remat=c.remat), None
        if mesh is not None and mesh.size > 1:
            parallel = resolve_parallel(config, "ppo", mesh, model)
            order = token_order(parallel, seq_len)
            order = np.arange(seq_len) if order is None else order
        return cls(
            settings=ppo.ProgramSettings(
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
            microbatch_sequences=c.microbatch_sequences,
            seq_len=seq_len,
            seed=config.seed,
            order=order,
            offload=config.placement.offload == "idle",
            staleness=c.staleness,
            guard=Guard.from_config(c.guard),
        )

    def pack(self, episodes: EpisodeArrays, members: Sequence[int] | np.ndarray, *, tight: bool = True):
        """`ppo.pack` with this config's shapes."""
        rows, seq_len = self.microbatch_sequences, self.seq_len
        return ppo.pack(episodes, members, rows=rows, seq_len=seq_len, tight=tight, order=self.order)


def init_state(actor: Params, config: PPOConfig, key: jax.Array) -> LearnerState:
    """{"params", "critic", "params_moments", "critic_moments"}: the actor is "params", as in every stage's checkpoint.

    The critic's decoder starts as a copy of the actor's, its head at zero. With staleness there is also "behaviour":
    the weights that sample the next iteration's episodes.
    """
    actor = jax.tree.map(jax.numpy.copy, actor)  # updates donate their parameters; the caller's stay valid
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
    """Per token, for logs and the trajectory viewer: float32[E, T], 0 at observed tokens."""

    values_ET: np.ndarray
    advantages_ET: np.ndarray  # before whitening
    logprobs_ET: np.ndarray  # the trainer's


def update(
    state: LearnerState,
    episodes: EpisodeArrays,
    config: PPOConfig,
    iteration: int,
    reference: Params | None = None,
    known: Mapping[str, Any] = types.MappingProxyType({}),
) -> tuple[LearnerState, dict[str, float], Details]:
    """Runs one iteration; `state` is consumed (its arrays are donated).

    Old log-probabilities and values are the trainer's own, computed before any update. Masked episodes have no
    influence. If no episode is left the parameters come back unchanged.

    Args:
        state: of `init_state`.
        episodes: arrays of `rollouts.rollout_arrays`.
        config: see PPOConfig.
        iteration: number of this iteration; decides the minibatch order and whether the actor is trained yet.
        reference: frozen policy parameters, needed when kl_coefficient is not 0.
        known: metrics of these episodes that the guard checks beside the learner's own.

    Returns:
        (state, metrics, details).

    Raises:
        guards.GuardStop: a metric is beyond a limit of the guard, whose action is stop.
    """
    state = dict(state)
    if config.staleness:
        [state["behaviour"]] = _copies(config, state["params"])
    per_action, metrics, details = _targets(state, episodes, config, reference)
    if not episodes.action_mask_ET.any():
        return state, metrics | {"skipped_updates": 0.0, "guarded_updates": 0.0}, details
    train_actor = iteration >= config.critic_warmup_iterations
    guarded = train_actor and _exceeds(config.guard, {**known, **metrics})
    train_actor = train_actor and not guarded
    names = ("params", "params_moments")
    before = _copies(config, *(state[name] for name in names)) if train_actor and config.guard.may_undo else []
    networks = list(_Network) if train_actor else [_Network.CRITIC]
    trained = _run_independent(
        *(functools.partial(_train, n, state, episodes, per_action, config, iteration) for n in networks), config=config
    )
    skipped = 0.0
    for new_metrics, bad in trained:
        metrics, skipped = metrics | new_metrics, skipped + bad
    if train_actor and config.guard.max_kl:
        metrics["kl_after"] = _kl_after(_on_device(state["params"]), details.logprobs_ET, episodes, config)
        guarded = _exceeds(config.guard, metrics)
        if guarded:
            state |= dict(zip(names, before, strict=True))
    metrics["guarded_updates"] = float(guarded)
    return state, metrics | {"skipped_updates": skipped}, details


def _targets(
    state: LearnerState, episodes: EpisodeArrays, config: PPOConfig, reference: Params | None
) -> tuple[dict[str, np.ndarray], dict[str, float], Details]:
    """What the losses need per action, [E, T] each, with the metrics known before the update, and the details."""
    mask_ET = episodes.action_mask_ET
    (old_ET, entropy_ET, reference_ET), values_ET = _run_independent(
        lambda: _old_logprobs(_on_device(state["params"]), reference and _on_device(reference), episodes, config),
        lambda: _old_values(_on_device(state["critic"]), episodes, config),
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
    per_action = dict(
        advantage=advantages.whiten(raw_ET, mask_ET) if config.whiten else raw_ET,
        old_logprob=old_ET,
        old_value=values_ET,
        return_=returns_ET,
        reference_logprob=reference_ET,
        importance=importance_ET,
    )
    return per_action, metrics, Details(values_ET, raw_ET, old_ET)


def _exceeds(guard: Guard, metrics: Mapping[str, float | None]) -> bool:
    problem = guard.problem(metrics)
    if problem and not guard.skip:
        raise guards.GuardStop(problem)
    return problem is not None


class _Network(enum.StrEnum):
    """The two trained networks, by their key in the state."""

    CRITIC = "critic"
    ACTOR = "params"


def _run_independent(*works: Callable[[], Any], config: PPOConfig) -> list[Any]:
    """Runs independent functions and returns their results, which do not depend on how they run.

    On a CPU in threads: their small programs leave cores idle.

    Elsewhere one after the other: programs with collectives must start in the same order on every device and host, and
    idle state must be moved to the host first.
    """
    if len(works) == 1 or jax.default_backend() != "cpu" or config.settings.mesh is not None or config.offload:
        return [work() for work in works]
    with concurrent.futures.ThreadPoolExecutor(len(works)) as threads:
        return [running.result() for running in [threads.submit(work) for work in works]]


_copied = jax.jit(lambda tree: jax.tree.map(jax.numpy.copy, tree))


def _copies(config: PPOConfig, *trees: Any) -> list[Any]:
    """Copies that outlive an update, in the memory where the state rests."""
    copies = (_copied(_on_device(tree)) for tree in trees)
    return [memory.moved(copy, memory.HOST) if config.offload else copy for copy in copies]


def _on_device(tree: Any) -> Any:
    """The tree in device memory; a copy on the host is kept."""
    return memory.copied(tree, memory.DEVICE)


def _old_logprobs(
    actor: Params, reference: Params | None, episodes: EpisodeArrays, config: PPOConfig
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Log-probability and entropy of every action now, and its log-probability under the reference (0 without one)."""
    old_ET, entropy_ET, reference_ET = (np.zeros(episodes.tokens_ET.shape, np.float32) for _ in range(3))
    for micro in config.pack(episodes, range(len(old_ET))):
        logprob_A, entropy_A = ppo.logprobs(actor, micro.rows, settings=config.settings)
        micro.scatter(distributed.fetch_global(logprob_A), old_ET)
        micro.scatter(distributed.fetch_global(entropy_A), entropy_ET)
        if config.settings.kl_coefficient:
            expected_A = ppo.logprobs(reference, micro.rows, settings=config.settings)[0]
            micro.scatter(distributed.fetch_global(expected_A), reference_ET)
    return old_ET, entropy_ET, reference_ET


def _kl_after(actor: Params, old_ET: np.ndarray, episodes: EpisodeArrays, config: PPOConfig) -> float:
    """Mean k3 estimate per token of KL(policy before || policy now) on at most KL_EPISODES episodes, evenly spaced."""
    kept = np.flatnonzero(episodes.kept_E)
    members = kept[evenly_spaced(len(kept), KL_EPISODES)]
    now_ET, read_ET = np.zeros_like(old_ET), np.zeros(old_ET.shape, bool)
    for micro in config.pack(episodes, members):
        micro.scatter(distributed.fetch_global(ppo.logprobs(actor, micro.rows, settings=config.settings)[0]), now_ET)
    read_ET[members] = episodes.action_mask_ET[members]
    change_A = (now_ET - old_ET)[read_ET].astype(np.float64)
    return float(np.mean(np.exp(change_A) - 1 - change_A))


def _old_values(critic: Params, episodes: EpisodeArrays, config: PPOConfig) -> np.ndarray:
    values_ET = np.zeros(episodes.tokens_ET.shape, np.float32)
    for micro in config.pack(episodes, range(len(values_ET)), tight=False):
        micro.scatter(distributed.fetch_global(ppo.values(critic, micro.rows, settings=config.settings)), values_ET)
    return values_ET


def _train(
    network: _Network,
    state: LearnerState,
    episodes: EpisodeArrays,
    per_action: dict[str, np.ndarray],
    config: PPOConfig,
    iteration: int,
) -> tuple[dict[str, float], float]:
    """One optimizer step per minibatch, on this network's part of `state`: (mean metrics, number of skipped steps)."""
    is_actor = network == _Network.ACTOR
    gradients = ppo.actor_gradients if is_actor else ppo.critic_gradients
    optimizer = config.actor_optimizer if is_actor else config.critic_optimizer
    count = config.actor_minibatches if is_actor else config.critic_minibatches
    parts = (network, f"{network}_moments")
    params, moments = (memory.moved(state[part], memory.DEVICE) for part in parts)
    mask_ET = episodes.action_mask_ET
    sums: dict[str, float] = {}
    norms, skipped = [], 0.0
    kept_M = np.flatnonzero(episodes.kept_E)  # minibatches are made of the unmasked episodes alone
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
        for micro in config.pack(episodes, members, tight=is_actor):
            actions = micro.gather(weight=weight_ET, share=share_ET, **per_action)
            total, more = gradients(params, total, micro.rows, actions, settings=config.settings)
            for key, value in more.items():
                sums[key] = sums.get(key, 0.0) + float(value)
        params, moments, norm, bad = ppo.apply_gradient(params, moments, total, optimizer=optimizer)
        norms.append(float(norm))
        skipped += float(bad)
    metrics = {key: value / max(len(norms), 1) for key, value in sums.items()}
    metrics["actor_grad_norm" if is_actor else "critic_grad_norm"] = float(np.mean(norms))
    resting = memory.HOST if config.offload else memory.DEVICE
    state |= {part: memory.moved(tree, resting) for part, tree in zip(parts, (params, moments), strict=True)}
    return metrics, skipped


def _importance(old_ET: np.ndarray, episodes: EpisodeArrays, cap: float) -> tuple[np.ndarray, dict[str, float]]:
    """Truncated importance sampling (TIS): min(trainer's / sampler's probability, cap) of every action, and metrics.

    Corrects for samples of older weights or of a sampler with other numerics; the cap limits the variance.
    """
    mask_ET = episodes.action_mask_ET
    ratio_ET = np.exp(np.clip(np.where(mask_ET, old_ET - episodes.logprobs_ET, 0.0), -20.0, 20.0))
    kept_M = ratio_ET[mask_ET]
    metrics = (
        {"importance/mean": float(kept_M.mean()), "importance/capped": float((kept_M > cap).mean())}
        if kept_M.size
        else {}
    )
    return np.minimum(ratio_ET, cap).astype(np.float32), metrics


def _batch_metrics(
    episodes: EpisodeArrays,
    old_ET: np.ndarray,
    entropy_ET: np.ndarray,
    values_ET: np.ndarray,
    returns_ET: np.ndarray,
    raw_ET: np.ndarray,
) -> dict[str, float]:
    """Metrics known before any update. The gap compares the sampler's log-probabilities with the trainer's."""
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
