"""One PPO iteration on one device and on meshes of eight simulated ones; prints the differences as JSON."""

import dataclasses
import json
import os

os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=8"

import jax
import numpy as np

from configs import miniature
from stepdr_jax.models import qwen2
from stepdr_jax.rl import learner
from stepdr_jax.rl.rollouts import EpisodeArrays
from stepdr_jax.sharding import rules
from stepdr_jax.sharding.mesh import make_mesh

CONTEXT = 32
MODEL = qwen2.Qwen2Config(64, 16, 1, 4, 2, 8, 24, 1e4, 1e-6, False)


def config_of(**mesh):
    config = miniature.get_config().unlock()
    config.agent.max_episode_tokens = CONTEXT
    config.ppo.update(
        dict(microbatch_sequences=4, critic_warmup_iterations=0, critic_minibatches=2, kl_coefficient=0.1)
    )
    config.parallel.vocab_tiles = 2
    config.mesh.update(dict(data=1, fsdp=1, context=1, tensor=1) | mesh)
    return config


def episodes() -> EpisodeArrays:
    rng = np.random.default_rng(0)
    lengths = np.array([11, 32, 9, 17, 13, 20, 8, 29, 14], np.int32)
    mask = np.zeros((len(lengths), CONTEXT), bool)
    for e, length in enumerate(lengths):
        mask[e, 3:6] = mask[e, length - 2 : length] = True
    tokens = rng.integers(0, 64, mask.shape).astype(np.int32)
    rewards = rng.random(len(lengths)).astype(np.float32)
    return EpisodeArrays(
        tokens, lengths, mask, np.where(mask, -4.0, 0).astype(np.float32), rewards, np.ones(len(lengths), bool)
    )


def updated(**sizes):
    config = config_of(**sizes)
    mesh = make_mesh(**config.mesh, devices=jax.devices()[: int(np.prod(list(config.mesh.values())))])
    settings = learner.PPOConfig.from_config(config, MODEL, mesh)
    actor = jax.tree.map(lambda w: 4 * w, qwen2.init_params(MODEL, jax.random.key(0)))
    fresh = learner.init_state(actor, settings, jax.random.key(1))
    fresh["critic"]["value_kernel"] = jax.random.normal(jax.random.key(2), (MODEL.hidden_size,)) * 0.3
    reference = jax.tree.map(lambda w: 1.1 * w, actor)
    placed = jax.device_put(fresh, rules.param_shardings(fresh, mesh))
    reference = jax.device_put(reference, rules.param_shardings(reference, mesh))
    state, metrics, details = learner.update(placed, episodes(), settings, 5, reference)
    return jax.device_get(state), metrics, dataclasses.asdict(details)


def largest(a, b) -> float:
    return max(float(np.max(np.abs(x - y), initial=0.0)) for x, y in zip(*map(jax.tree.leaves, (a, b)), strict=True))


one_state, one_metrics, one_details = updated()
found = {}
for name, sizes in {
    "rows": dict(data=2, fsdp=2),
    "every": dict(fsdp=2, context=2, tensor=2),
}.items():
    state, metrics, details = updated(**sizes)
    found[name] = {
        "state": {part: largest(state[part], one_state[part]) for part in state},
        "details": {part: largest(details[part], one_details[part]) for part in details},
        "metrics": max(abs(metrics[key] - one) / (1 + abs(one)) for key, one in one_metrics.items()),
    }
print(json.dumps(found))
