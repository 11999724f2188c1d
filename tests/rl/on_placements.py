"""Short PPO runs with other placements on eight simulated devices, and an observed weight sync; prints JSON."""

import json
import os
import sys
from pathlib import Path

os.environ["XLA_FLAGS"] = (
    "--xla_force_host_platform_device_count=8 --xla_backend_optimization_level=0"  # compiles sooner
)

import jax
import numpy as np

from stepdr_jax import files
from stepdr_jax.engine import weights
from stepdr_jax.engine.engine import layout_of
from stepdr_jax.models import qwen2
from stepdr_jax.rl import learner, loop
from stepdr_jax.sharding import memory, rules
from stepdr_jax.sharding.mesh import make_mesh
from tests.rl import toy

WHOLE = qwen2.Qwen2Config(96, 32, 3, 4, 2, 8, 48, 1e4, 1e-6, False)
LIMIT = 8 << 10


def held(kind=memory.DEVICE) -> dict[int, int]:
    """Bytes in memory of `kind` beside each device; an array that two share counts once."""
    found = {}
    for array in jax.live_arrays():
        for part in array.addressable_shards:
            if part.data.sharding.memory_kind == kind:
                found[part.data.unsafe_buffer_pointer()] = (part.device.id, part.data.nbytes)
    return {d.id: sum(size for device, size in found.values() if device == d.id) for d in jax.devices()}


def watched_transfer() -> dict:
    """Weights of a mesh of four devices go to two replicas of two devices each: how much is where at every landing."""
    mesh = make_mesh(fsdp=2, tensor=2, devices=jax.devices()[:4])
    params = jax.device_get(qwen2.init_params(WHOLE, jax.random.key(0)))
    expected = jax.device_get(weights.unstack(params, config=WHOLE))
    params = jax.device_put(params, rules.param_shardings(params, mesh))
    targets = [(layout_of(WHOLE, 2, 32, devices=jax.devices()[n : n + 2]), jax.devices()[n]) for n in (4, 6)]
    before, on_the_way, land = held(), [], memory.land

    def watched(array, sharding):
        on_the_way.append(max(held()[device.id] - before[device.id] for device in mesh.devices.flat))
        return land(array, sharding)

    memory.land = watched
    arrived = weights.transfer(params, targets, limit=LIMIT)
    memory.land = land
    after = held()
    same = all(np.array_equal(a, b) for a, b in zip(*map(jax.tree.leaves, (arrived[1], expected)), strict=True))
    part = sum(leaf.nbytes for leaf in jax.tree.leaves(arrived[0])) / 2
    return {
        "same": same,
        "most_on_the_way": max(on_the_way),
        "limit": LIMIT,
        "whole": part,
        "learner_grew": max(after[d.id] - before[d.id] for d in mesh.devices.flat),
        "sampler_holds": max(after[d] for d in range(4, 8)) / part,
    }


def run(folder: Path, *, mesh=(), sampling=(), **placement) -> dict:
    config = (
        toy.config(folder, iterations=2, critic_warmup_iterations=0, checkpoint_every=2)
        .copy_and_resolve_references()
        .unlock()
    )
    config.model.num_kv_heads = 2
    config.mesh.update(dict(mesh))
    config.sampler.update(dict(pools=1) | dict(sampling))
    config.placement.update(placement)
    at_samples, at_updates, on_host = [], [], []
    update = learner.update

    async def run_episode(*arguments, **keywords):
        at_samples.append(held()), on_host.append(held(memory.HOST))
        return await toy.run_episode(*arguments, **keywords)

    def watched(*arguments, **keywords):
        at_updates.append(held())
        return update(*arguments, **keywords)

    learner.update = watched
    parts = toy.inputs(config, run_episode=run_episode)
    mine = sum(leaf.nbytes for leaf in jax.tree.leaves(parts.read_actor()))
    done = loop.train_ppo(config, parts)
    learner.update = update
    rows = files.read_jsonl(loop.ppo_layout(config).directory / "metrics.jsonl")
    recorded = [files.read_jsonl(loop.ppo_layout(config).directory / "iterations" / f"{i:04d}.jsonl") for i in range(2)]

    def in_actors(seen):  # of the devices, in sizes of the actor
        return {d: max(one[d] for one in seen) / mine for d in range(8)}

    return {
        "sha256": done["params_sha256"],
        "answers": [one["trajectory"]["answer"] for rows in recorded for one in rows],
        "losses": [[row.get(name, 0.0) for name in ("policy_loss", "value_loss", "entropy")] for row in rows],
        "sampling": in_actors(at_samples),
        "learning": in_actors(at_updates),
        "hosted": in_actors(on_host),
    }


folder = Path(sys.argv[1])
print(
    json.dumps(
        {
            "transfer": watched_transfer(),
            "plain": run(folder / "plain"),
            "idle": run(folder / "idle", offload="idle", weight_sync_bucket_gb=2.0**-14),
            "disaggregated": run(
                folder / "disaggregated",
                mesh=dict(fsdp=4),
                sampling=dict(replicas=2, tensor=2),
                sampler="disaggregated",
                offload="idle",
            ),
        }
    )
)
