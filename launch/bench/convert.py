"""Host memory and time of loading and saving a Hugging Face checkpoint; `launch.bench convert` runs it.

Each measurement is a process of its own, so that its peak is its own: python -m launch.bench.convert make|load|save
SIZE DIRECTORY. On a CPU the arrays themselves are host memory, so what counts is the peak above them.
"""

import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

GB = 1e9


def measure(size: str) -> dict:
    """Makes a random checkpoint of a published size in bfloat16, then loads it and saves it in fresh processes.

    Raises UserError for a size that does not exist.
    """
    from stepdr_jax.models import sizes

    sizes.size(size)
    with tempfile.TemporaryDirectory(prefix="stepdr-convert-") as folder:
        rows = {what: _child(what, size, Path(folder)) for what in ("make", "load", "save")}
    return {"what": "convert", "size": size, "weights": "bfloat16", "load": rows["load"], "save": rows["save"]}


def _child(what: str, size: str, folder: Path) -> dict:
    command = [sys.executable, "-m", "launch.bench.convert", what, size, str(folder)]
    done = subprocess.run(command, env=os.environ | {"JAX_PLATFORMS": "cpu"}, stdout=subprocess.PIPE, check=True)
    return json.loads(done.stdout)


def _run(what: str, size: str, folder: Path) -> dict:
    import dataclasses
    import math

    import jax
    import jax.numpy as jnp

    from stepdr_jax.models import hf, sizes
    from stepdr_jax.models.qwen2 import init_params, param_shapes

    config = dataclasses.replace(sizes.size(size), param_dtype="bfloat16")
    source, target = folder / "source", folder / "target"
    if what == "make":
        hf.save(config, jax.jit(init_params, static_argnums=0)(config, jax.random.key(0)), source)
        return {}
    arrays = sum(math.prod(leaf.shape) * leaf.dtype.itemsize for leaf in jax.tree.leaves(param_shapes(config)))
    largest = max(math.prod(place.shape) for place in hf.places(config)) * 2
    jax.block_until_ready(jax.jit(jnp.sum)(jnp.ones(8)))  # the backend's own memory is not counted
    before = _resident()
    if what == "load":
        began = time.perf_counter()
        config, params = hf.load(source)
        held = before + arrays
    else:
        config, params = hf.load(source)
        held = _resident()
        Path("/proc/self/clear_refs").write_text("5")  # the peak so far is forgotten
        began = time.perf_counter()
        hf.save(config, params, target)
    seconds = time.perf_counter() - began
    return {
        "arrays_gb": round(arrays / GB, 3),
        "largest_tensor_gb": round(largest / GB, 3),
        "peak_above_arrays_gb": round((_peak() - held) / GB, 3),
        "seconds": round(seconds, 2),
        "gb_per_second": round(arrays / GB / seconds, 2),
    }


def _resident() -> int:
    import psutil

    return psutil.Process().memory_info().rss


def _peak() -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmHWM"):
            return int(line.split()[1]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


if __name__ == "__main__":
    print(json.dumps(_run(sys.argv[1], sys.argv[2], Path(sys.argv[3]))))
