"""Loads a checkpoint onto eight simulated devices, saves it from them, prints what was read: SCRIPT FROM TO."""

import json
import os
import sys
from pathlib import Path

os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=8"
os.environ["JAX_PLATFORMS"] = "cpu"
sys.path.insert(0, str(Path(__file__).parents[2]))

import jax  # noqa: E402

from stepdr_jax.models import hf  # noqa: E402
from stepdr_jax.sharding.mesh import make_mesh  # noqa: E402
from stepdr_jax.sharding.rules import param_shardings  # noqa: E402

read: dict[tuple[str, int], int] = {}
copy, from_files = hf._copy, hf._from_files
names: list[str] = []


def counted_copy(out, tensor, index, transposed):
    read[names[-1]] = read.get(names[-1], 0) + out.size
    copy(out, tensor, index, transposed)


def counted_from_files(source, *rest):
    names.append(source[0][1].leaf)
    return from_files(source, *rest)


hf._copy, hf._from_files = counted_copy, counted_from_files
hf.CHUNK = 1000  # so that some parameters come in pieces
mesh = make_mesh(data=1, fsdp=2, context=2, tensor=2)
config, params = hf.load(sys.argv[1], mesh=mesh)
wanted = param_shardings(params, mesh)
placed = jax.tree.map(lambda leaf, sharding: leaf.sharding.is_equivalent_to(sharding, leaf.ndim), params, wanted)
values = {name: (read[name], leaf.size) for name, leaf in (params | params["layers"]).items() if name != "layers"}
hf._copy = copy
hf.save(config, params, sys.argv[2])


def share(leaf: jax.Array) -> float:
    return leaf.addressable_shards[0].data.size / leaf.size


print(
    json.dumps(
        {
            "share of q_kernel": share(params["layers"]["q_kernel"]),
            "share of embedding": share(params["embedding"]),
            "values read": values,
            "placed by the rules": all(jax.tree.leaves(placed)),
        }
    )
)
