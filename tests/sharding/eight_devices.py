"""Trains a few steps on one of eight simulated devices, then on all of them in several meshes; prints what came out."""

import functools
import json
import os
import sys
from pathlib import Path

os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=8"
os.environ["JAX_PLATFORMS"] = "cpu"
sys.path.insert(0, str(Path(__file__).parents[2]))

import jax  # noqa: E402
import numpy as np  # noqa: E402

from stepdr_jax.models.qwen2 import Qwen2Config  # noqa: E402
from stepdr_jax.sharding.mesh import make_mesh  # noqa: E402
from stepdr_jax.training import state  # noqa: E402
from stepdr_jax.training.optimizer import optimizer_of  # noqa: E402
from stepdr_jax.training.program import eval_program, order_of, parallel_of, train_program  # noqa: E402
from stepdr_jax.training.step import arrange, gradients  # noqa: E402
from tests.training.tiny import VOCAB, Memory, tiny_config  # noqa: E402

TIED = {"model.tie_embeddings": True, "parallel.vocab_tiles": 2}
CASES = {
    "one": ({}, {}),
    "data fsdp tensor": (dict(data=2, fsdp=2, tensor=2), {"midtrain1.microbatches": 2}),
    "fsdp context": (dict(fsdp=2, context=4), {"parallel.remat": "layer", "parallel.context_strategy": "ring"}),
    "fsdp context tensor": (
        dict(fsdp=2, context=2, tensor=2),
        {"parallel.remat": "attention", "parallel.vocab_tiles": 4, "parallel.context_strategy": "all_gather"},
    ),
    "tied one": ({}, TIED),
    "tied fsdp context": (dict(fsdp=4, context=2), TIED | {"parallel.context_strategy": "ring"}),
}


def train(axes: dict[str, int], overrides: dict) -> dict:
    """Losses of four steps, then the loss, the norms of the gradient and the share of a kernel on one device."""
    config = tiny_config("unused", **{"model.tie_embeddings": False, "midtrain1.batch": 8} | overrides)
    config.model.update(dict(num_heads=4, num_kv_heads=2))
    mesh = make_mesh(**axes)
    model = Qwen2Config.from_config(config.model, VOCAB)
    program, abstract, abstract_batch = train_program(config, "midtrain1", mesh, vocab_size=VOCAB, num_sources=2)
    order = order_of(parallel_of(config, "midtrain1", mesh, model), config.midtrain1.context)
    fresh = state.new_state(state.initial_params(model, 0), optimizer_of(config.midtrain1), 2)
    now = jax.device_put(fresh, jax.tree.map(lambda leaf: leaf.sharding, abstract))

    def batch(step):
        rows = arrange(Memory(batch=8).batch(step), order)
        return {name: jax.device_put(a, abstract_batch[name].sharding) for name, a in rows.items()}

    losses = []
    for step in range(4):
        before = now.window["loss"].sum(), now.window["weight"].sum()
        before = [float(x) for x in before]
        now = program(now, batch(step))
        losses.append((float(now.window["loss"].sum()) - before[0]) / (float(now.window["weight"].sum()) - before[1]))
    nll_S, weight_S = eval_program(config, "midtrain1", mesh, vocab_size=VOCAB, num_sources=2)[0](now.params, batch(9))
    options = dict(num_sources=2, loss_chunk=64, z_loss=1e-4, microbatches=config.midtrain1.microbatches)
    parallel = parallel_of(config, "midtrain1", mesh, model)
    gradient = jax.jit(functools.partial(gradients, config=model, parallel=parallel, **options))(now.params, batch(9))[
        0
    ]
    kernel, moment = (tree["layers"]["q_kernel"] for tree in (now.params, now.optimizer[0].mu))
    return {
        "losses": losses,
        "held_out": float(nll_S.sum() / weight_S.sum()),
        "gradient": {jax.tree_util.keystr(p): float(np.linalg.norm(g)) for p, g in jax.tree.leaves_with_path(gradient)},
        "share": kernel.addressable_shards[0].data.size / kernel.size,
        "moment_share": moment.addressable_shards[0].data.size / moment.size,
    }


print(json.dumps({name: train(*case) for name, case in CASES.items()}))
