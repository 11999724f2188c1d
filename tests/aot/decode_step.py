"""Compiles the sampler's decode program for two v5p chips and prints its memory, in bytes, as JSON."""

import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))

import jax
from jax.experimental import topologies

from stepdr_jax.aot import sampler
from stepdr_jax.engine import engine
from stepdr_jax.models import qwen2

SLOTS, LENGTH, PAGE = 64, 2048, 64
MODEL = qwen2.Qwen2Config(8192, 512, 2, 4, 2, 128, 1024, 1e6, 1e-6, False, dtype="bfloat16", param_dtype="bfloat16")

chips = topologies.get_topology_desc("v5p:2x2x1", "tpu").devices[:2]
layout = engine.layout_of(MODEL, SLOTS, LENGTH, page_size=PAGE, devices=chips)
program, arguments = sampler.decode(layout, chips[0], max_num_seqs=SLOTS, decode_steps=8)
memory = program.lower(*arguments).compile().memory_analysis()
pool = arguments[1]
print(
    json.dumps(
        {
            "attention": layout.attention,
            "pool": sum(a.size * a.dtype.itemsize for a in jax.tree.leaves(pool)) // layout.tensor,
            "aliased": memory.alias_size_in_bytes,
            "temporaries": memory.temp_size_in_bytes,
        }
    )
)
