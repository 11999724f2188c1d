"""Samples the same sessions on one device and on a mesh of data 2 and tensor 2; prints the differences as JSON."""

import asyncio
import json
import os

os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=4"

import jax
import numpy as np
from jax.sharding import Mesh

from stepdr_jax.engine.engine import JaxEngine, SampleParams
from stepdr_jax.models import qwen2

CONFIG = qwen2.Qwen2Config(128, 32, 2, 4, 2, 8, 48, 1e4, 1e-6, False)
PARAMS = jax.tree.map(lambda w: 6 * w, qwen2.init_params(CONFIG, jax.random.key(0)))
OTHER = jax.tree.map(lambda w: 5 * w, qwen2.init_params(CONFIG, jax.random.key(1)))


async def turns(engine):
    async def one(number: int):
        done = []
        for turn in range(3):
            new = np.random.default_rng([number, turn]).integers(10, 100, 3 + number).tolist()
            done.append(await engine.generate(f"{number}", new, SampleParams(max_tokens=7, seed=number)))
        await engine.close(f"{number}")
        return done

    first = await asyncio.gather(*(one(number) for number in range(6)))
    await engine.update_weights(OTHER, 1)
    return [*first, *await asyncio.gather(*(one(number) for number in range(6)))]


def sampled(**settings):
    engine = JaxEngine(
        PARAMS,
        CONFIG,
        max_num_seqs=4,
        max_len=64,
        stop_ids=(3, 7),
        prefill_batch=2,
        prefill_chunk=8,
        decode_steps=4,
        **settings,
    )
    devices = {d for pool in engine._pools for leaf in jax.tree.leaves(pool.kv_pages) for d in leaf.devices()}
    found = asyncio.run(turns(engine))
    return [g.ids for s in found for g in s], [p for s in found for g in s for p in g.logprobs], len(devices)


alone, alone_logprobs, _ = sampled(page_size=16)
mesh = Mesh(np.array(jax.devices()).reshape(2, 2), ("data", "tensor"))
split, split_logprobs, devices = sampled(page_size=16, mesh=mesh)
print(
    json.dumps(
        {
            "same_ids": alone == split,
            "turns": len(alone),
            "largest_difference": float(np.max(np.abs(np.subtract(alone_logprobs, split_logprobs)))),
            "devices": devices,
        }
    )
)
