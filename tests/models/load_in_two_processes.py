"""One of two processes with two devices each that load a checkpoint and save it: SCRIPT NUMBER PORT FROM TO."""

import json
import os
import sys
from pathlib import Path

os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=2"
os.environ["JAX_PLATFORMS"] = "cpu"
sys.path.insert(0, str(Path(__file__).parents[2]))

import jax  # noqa: E402

from stepdr_jax.models import hf  # noqa: E402
from stepdr_jax.sharding.mesh import make_mesh  # noqa: E402

number, port, source, target = sys.argv[1:]
jax.config.update("jax_cpu_collectives_implementation", "gloo")
jax.distributed.initialize(f"localhost:{port}", 2, int(number))
read = 0
copy = hf._copy


def counted_copy(out, *arguments, **keywords):
    global read
    read += out.size
    copy(out, *arguments, **keywords)


hf._copy = counted_copy
hf.CHUNK = 1000  # so that some parameters come in pieces
config, params = hf.load(source, mesh=make_mesh(fsdp=4))
here = sum(
    len({str(shard.index) for shard in leaf.addressable_shards}) * leaf.addressable_shards[0].data.size
    for leaf in jax.tree.leaves(params)
)
hf._copy = copy
hf.save(config, params, target)
print(json.dumps({"read": read, "here": here, "all": sum(leaf.size for leaf in jax.tree.leaves(params))}))
