"""Trains a few steps on one of eight simulated devices, then on all of them; prints the losses and the placement."""

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
from stepdr_jax.sharding.rules import batch_sharding  # noqa: E402
from stepdr_jax.training import state  # noqa: E402
from stepdr_jax.training.optimizer import adamw  # noqa: E402
from stepdr_jax.training.step import train_step  # noqa: E402
from tests.training.tiny import VOCAB, Memory  # noqa: E402

MODEL = Qwen2Config(VOCAB, 16, 1, 4, 2, 8, 32, 1e4, 1e-6, False)


def train(microbatches: int, **axes: int) -> dict:
    mesh = make_mesh(**axes)
    optimizer = adamw(1e-2, weight_decay=0.01)
    now = state.new_state(state.initial_params(MODEL, 0), optimizer, 2)
    shardings = state.state_shardings(now, mesh)
    now = jax.device_put(now, shardings)
    step = jax.jit(
        functools.partial(
            train_step,
            config=MODEL,
            optimizer=optimizer,
            clip_norm=1.0,
            num_sources=2,
            loss_chunk=64,
            z_loss=1e-4,
            microbatches=microbatches,
        ),
        donate_argnums=0,
        in_shardings=(shardings, None),
        out_shardings=shardings,
    )
    losses = []
    for i in range(3):
        batch = Memory(batch=8).batch(i)
        now = step(now, {k: jax.device_put(v, batch_sharding(mesh, ndim=v.ndim)) for k, v in batch.items()})
        losses.append(float(np.sum(now.window["loss"]) / np.sum(now.window["weight"])))
    kernel, moment = (tree["layers"]["q_kernel"] for tree in (now.params, now.optimizer[0].mu))
    return {
        "devices": mesh.size,
        "losses": losses,
        "share": kernel.addressable_shards[0].data.size / kernel.size,
        "moment_share": moment.addressable_shards[0].data.size / moment.size,
    }


print(json.dumps({"one": train(1), "eight": train(2, data=2, fsdp=2, tensor=2)}))
