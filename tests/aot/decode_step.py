"""Compiles the sampler's decode program for one v5p chip and prints its memory, in bytes, as JSON."""

import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))

import jax
import numpy as np
from jax.experimental import topologies

from stepdr_jax.engine import programs
from stepdr_jax.models import qwen2

SLOTS, LENGTH = 64, 2048
MODEL = qwen2.Qwen2Config(8192, 512, 2, 4, 2, 128, 1024, 1e6, 1e-6, False, dtype="bfloat16", param_dtype="bfloat16")

chip = topologies.get_topology_desc("v5p:2x2x1", "tpu").devices[:1]
here = jax.sharding.NamedSharding(jax.sharding.Mesh(np.array(chip), ("x",)), jax.sharding.PartitionSpec())
weights = jax.eval_shape(lambda: programs.prepare(qwen2.init_params(MODEL, jax.random.key(0)), config=MODEL))
cache = jax.eval_shape(lambda: programs.init_cache(MODEL, SLOTS, LENGTH))
fields = dict.fromkeys(("token", "position", "remaining"), "int32") | {"seed": "uint32", "temperature": "float32"}
state = {name: jax.ShapeDtypeStruct((SLOTS,), dtype) for name, dtype in fields.items()}
stop_ids = jax.ShapeDtypeStruct((2,), "int32")
arguments = jax.tree.map(
    lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=here), (weights, cache, state, stop_ids)
)
memory = programs.decode.lower(*arguments, config=MODEL, steps=8).compile().memory_analysis()
print(
    json.dumps(
        {
            "cache": sum(a.size * a.dtype.itemsize for a in jax.tree.leaves(cache)),
            "aliased": memory.alias_size_in_bytes,
            "temporaries": memory.temp_size_in_bytes,
        }
    )
)
