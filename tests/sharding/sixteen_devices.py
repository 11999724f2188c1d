"""Gradients and training on one of sixteen simulated devices and on meshes of them; prints what came out."""

import functools
import json
import math
import os
import sys
from pathlib import Path

os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=16"
os.environ["JAX_PLATFORMS"] = "cpu"
sys.path.insert(0, str(Path(__file__).parents[2]))

import jax  # noqa: E402
import numpy as np  # noqa: E402

from stepdr_jax.models.qwen2 import Qwen2Config  # noqa: E402
from stepdr_jax.sharding.mesh import make_mesh  # noqa: E402
from stepdr_jax.training import state  # noqa: E402
from stepdr_jax.training.optimizer import make_optimizer  # noqa: E402
from stepdr_jax.training.program import eval_program, resolve_parallel, token_order, train_program  # noqa: E402
from stepdr_jax.training.step import arrange, gradients  # noqa: E402
from tests.training.tiny import VOCAB, Memory, tiny_config  # noqa: E402

TIED = {"model.tie_embeddings": True, "parallel.vocab_tiles": 2}
RING = {"parallel.context_strategy": "ring", "parallel.remat": "layer"}
CASES = {  # mesh, overrides of the config, train too
    "one": ({}, {}, True),
    "all": (
        dict(data=2, fsdp=2, context=2, tensor=2),
        RING | {"parallel.remat": "attention", "parallel.vocab_tiles": 4},
        True,
    ),
    "microbatches": (dict(fsdp=2, context=2, tensor=2), {"midtrain1.microbatches": 2}, False),
    "tied one": ({}, TIED, False),
    "tied": (dict(fsdp=2, context=4), TIED | RING, False),
}


def outcome(axes: dict[str, int], overrides: dict, train: bool) -> dict:
    """Norms of the gradient, the share of a kernel on one device, losses of four steps, and a loss without gradient."""
    config = tiny_config("unused", **{"model.tie_embeddings": False, "midtrain1.batch_size": 8} | overrides)
    config.model.update(dict(num_heads=4, num_kv_heads=2))
    mesh = make_mesh(**axes, devices=jax.devices()[: math.prod(axes.values())])
    model = Qwen2Config.from_config(config.model, VOCAB)
    parallel = resolve_parallel(config, "midtrain1", mesh, model)
    order = token_order(parallel, config.midtrain1.seq_len)
    program, abstract, abstract_batch = train_program(config, "midtrain1", mesh, vocab_size=VOCAB, num_sources=2)
    fresh = state.new_state(state.initial_params(model, 0), make_optimizer(config.midtrain1), 2)
    now = jax.device_put(fresh, jax.tree.map(lambda leaf: leaf.sharding, abstract))

    def batch(step):
        rows = arrange(Memory(batch=8).batch(step), order)
        return {name: jax.device_put(a, abstract_batch[name].sharding) for name, a in rows.items()}

    options = dict(num_sources=2, loss_chunk=64, z_loss=1e-4, microbatches=config.midtrain1.microbatches)
    gradient = jax.jit(functools.partial(gradients, config=model, parallel=parallel, **options))(now.params, batch(9))[
        0
    ]
    kernel, moment = (tree["layers"]["q_kernel"] for tree in (now.params, now.optimizer[0].mu))
    found = {
        "gradient": {jax.tree_util.keystr(p): float(np.linalg.norm(g)) for p, g in jax.tree.leaves_with_path(gradient)},
        "share": kernel.addressable_shards[0].data.size / kernel.size,
        "moment_share": moment.addressable_shards[0].data.size / moment.size,
    }
    if train:
        sums = []
        for step in range(4):
            now = program(now, batch(step))
            sums.append((float(now.window["loss"].sum()), float(now.window["weight"].sum())))
        loss, weight = np.diff(np.array([(0.0, 0.0), *sums]), axis=0).T
        evaluation = eval_program(config, "midtrain1", mesh, vocab_size=VOCAB, num_sources=2)[0]
        sums = evaluation(now.params, batch(9))
        found |= {"losses": (loss / weight).tolist(), "held_out": float(sums["loss"].sum() / sums["weight"].sum())}
    return found


print(json.dumps({name: outcome(*case) for name, case in CASES.items()}))
