"""Saves a state of one mesh of eight simulated devices and restores it on others; prints the meshes that agreed.

python -m tests.training.another_mesh [WHERE]      default: a temporary folder
"""

import os
import sys
import tempfile

os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=8"

import jax
import numpy as np

from stepdr_jax.models.qwen2 import Qwen2Config
from stepdr_jax.runtime import checkpoint
from stepdr_jax.sharding.mesh import make_mesh
from stepdr_jax.training import program, state
from stepdr_jax.training.optimizer import make_optimizer
from tests.training.tiny import VOCAB, tiny_config

config = tiny_config("unused", **{"midtrain1.batch_size": 8, "model.num_kv_heads": 2})


def abstract(**sizes: int) -> state.TrainState:
    config.mesh.update(dict(data=1, fsdp=1, context=1, tensor=1) | sizes)
    mesh = make_mesh(**config.mesh, devices=jax.devices()[: int(np.prod(list(sizes.values()) or [1]))])
    return program.train_program(config, "midtrain1", mesh, vocab_size=VOCAB, num_sources=2)[1]


placed = jax.tree.map(lambda leaf: leaf.sharding, abstract(data=2, fsdp=2, context=2))
params = state.initial_params(Qwen2Config.from_config(config.model, VOCAB), 0, placed.params)
fresh = jax.jit(lambda p: state.new_state(p, make_optimizer(config.midtrain1), 2), out_shardings=placed)(params)
saved = state.as_tree(fresh)
with tempfile.TemporaryDirectory() as folder:
    where = (sys.argv[1:] or [folder])[0]
    checkpoint.save_checkpoint(where, 1, saved, {}, keep=1)
    for sizes in (dict(fsdp=8), dict(fsdp=2, context=2, tensor=2), dict(fsdp=2), {}):
        wanted = state.as_tree(abstract(**sizes))
        read = checkpoint.restore_checkpoint(where, wanted).tree
        jax.tree.map(np.testing.assert_array_equal, jax.device_get(read), jax.device_get(saved))
        assert all(jax.tree.leaves(jax.tree.map(lambda a, b: a.sharding == b.sharding, read, wanted)))
        assert checkpoint.params_sha256(read["params"]) == checkpoint.params_sha256(params)
        print(sorted(sizes.items()), file=sys.stdout)
