"""Run in a process of its own: compiles ring attention for TPU topologies without a TPU, prints its transfers as JSON.

Arguments: topology:barrier, for example v5p:2x2x2:1. The program is loss and gradients of one rematerialised layer.
"""

import json
import os
import sys
import tempfile

from stepdr_jax.aot.compile import ENVIRONMENT

os.environ |= ENVIRONMENT

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import topologies
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from stepdr_jax.aot import schedule
from stepdr_jax.ops.context_parallel import context_attention

LENGTH, HEADS, KV_HEADS, HEAD_DIM = 8192, 4, 2, 128


def transfers(topology: str, barrier: bool):
    devices = topologies.get_topology_desc(topology, "tpu").devices
    mesh = Mesh(np.array(devices), ("context",))

    def step(q, k, v, positions, segments):
        @jax.checkpoint
        def layer(q, k, v):
            q, k, v = jnp.sin(q), jnp.sin(k), jnp.sin(v)  # something to compute again
            return context_attention(
                q, k, v, positions, segments, strategy="ring", axis_size=len(devices), zigzag=True, barrier=barrier
            )

        return jax.grad(lambda *qkv: jnp.sum(jnp.tanh(layer(*qkv).astype(jnp.float32))), (0, 1, 2))(q, k, v)

    spec = P(None, "context")
    split = jax.jit(jax.shard_map(step, mesh=mesh, in_specs=spec, out_specs=spec, check_vma=False))
    sharding = NamedSharding(mesh, spec)
    tokens = [jax.ShapeDtypeStruct((1, LENGTH), jnp.int32, sharding=sharding)] * 2
    arrays = [
        jax.ShapeDtypeStruct((1, LENGTH, heads, HEAD_DIM), jnp.bfloat16, sharding=sharding)
        for heads in (HEADS, KV_HEADS, KV_HEADS)
    ]
    with tempfile.TemporaryDirectory() as directory:
        options = {"xla_dump_to": directory, "xla_dump_hlo_as_text": True}
        split.lower(*arrays, *tokens).compile(compiler_options=options)
        return schedule.transfers(schedule.read_schedule(directory))


if __name__ == "__main__":
    for argument in sys.argv[1:]:
        topology, _, barrier = argument.rpartition(":")
        found = [
            dict(kind=t.kind, payload=t.payload, synchronous=t.synchronous, kernels=t.kernels, inside=t.computation)
            for t in transfers(topology, barrier == "1")
        ]
        print(json.dumps(found), flush=True)
