"""Time and memory of attention on a CPU: backends by length, and context strategies on eight simulated devices.

Each measurement is of values and gradients, in a process of its own, so that peak memory is its own. The simulated
devices share the machine's cores: their times compare total work, not what links and waiting would cost.
"""

import functools
import json
import os
import resource
import subprocess
import sys
import time

_HEADS, _KV_HEADS, _HEAD_DIM = 4, 2, 64
_LENGTHS = (2048, 8192, 32768)
_LARGEST = 8 * 2**30  # bytes of scores above which `reference` is not tried
_STRATEGIES = {
    "ring, zigzag": ("ring", True),
    "all_gather, zigzag": ("all_gather", True),
    "ring, plain": ("ring", False),
}
_SPLIT_LENGTH = 8192


def measure(rounds: int) -> dict:
    """Both comparisons as one JSON-ready dict; seconds are the fastest of `rounds`, at most 3 for the longest rows."""
    backends = [
        _backend(backend, length, min(rounds, 3 if length > 8192 else rounds))
        for length in _LENGTHS
        for backend in ("reference", "prefix", "blockwise")
    ]
    return {
        "what": "attention",
        "unit": "seconds of values and gradients of one row, the fastest of the rounds: other jobs only add",
        "heads": _HEADS,
        "kv_heads": _KV_HEADS,
        "head_dim": _HEAD_DIM,
        "backends": backends,
        "eight_devices": _in_process("split", rounds, flags="--xla_force_host_platform_device_count=8"),
        "rounds": rounds,
    }


def _backend(backend: str, length: int, rounds: int) -> dict:
    row = {"backend": backend, "tokens": length}
    # scores, weights and their gradients are alive together
    needed = 4 * 4 * _HEADS * length * length
    if backend == "reference" and needed > _LARGEST:
        return row | {"skipped": f"would hold {needed / 2**30:.0f} GiB of scores and gradients"}
    if backend == "prefix" and length > 8192:
        return row | {"skipped": f"one piece of program for each of {length // 64} tiles"}
    return row | _in_process("backend", backend, length, rounds)


def _in_process(*job, flags: str = "") -> dict:
    environment = os.environ | {
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": f"{os.environ.get('XLA_FLAGS', '')} {flags}".strip(),
    }
    command = [sys.executable, "-m", "launch.bench.attention", json.dumps(job)]
    done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(done.stdout)


def _inputs(length: int):
    import jax
    import jax.numpy as jnp

    keys = jax.random.split(jax.random.key(0), 3)
    shapes = [(1, length, heads, _HEAD_DIM) for heads in (_HEADS, _KV_HEADS, _KV_HEADS)]
    arrays = [jax.random.normal(key, shape) for key, shape in zip(keys, shapes, strict=True)]
    return *arrays, jnp.arange(length, dtype=jnp.int32)[None], jnp.ones((1, length), jnp.int32)


def _value_and_grads(attend, q, k, v, *tokens):
    import jax

    o, pull = jax.vjp(lambda *qkv: attend(*qkv, *tokens), q, k, v)
    return o, *pull(o)


def _seconds(step, arguments) -> float:
    import jax

    start = time.perf_counter()
    jax.block_until_ready(step(*arguments))
    return time.perf_counter() - start


def _peak() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def _measure_backend(backend: str, length: int, rounds: int) -> dict:
    import jax

    from stepdr_jax.ops.attention import attention

    def attend(q, k, v, positions, segments):
        tokens = dict(query_positions_BT=positions, key_positions_BS=positions)
        tokens |= dict(query_segments_BT=segments, key_segments_BS=segments)
        return attention(q, k, v, **tokens, in_order=True, backend=backend)

    arguments = _inputs(length)
    step = jax.jit(functools.partial(_value_and_grads, attend)).lower(*arguments).compile()
    before = _peak()
    _seconds(step, arguments)
    peak = _peak() - before
    return {
        "seconds": round(min(_seconds(step, arguments) for _ in range(rounds)), 4),
        "peak_mib": round(peak / 2**20),
    }


def _measure_split(rounds: int) -> dict:
    import jax
    import numpy as np
    from jax.sharding import Mesh
    from jax.sharding import PartitionSpec as P

    from stepdr_jax.ops.context_parallel import context_attention

    n = len(jax.devices())
    mesh, spec = Mesh(np.array(jax.devices()), ("context",)), P(None, "context")
    arguments = _inputs(_SPLIT_LENGTH)

    def program(strategy, zigzag):
        attend = functools.partial(context_attention, strategy=strategy, axis_size=n, zigzag=zigzag)
        split = functools.partial(_value_and_grads, attend)
        return jax.jit(jax.shard_map(split, mesh=mesh, in_specs=spec, out_specs=spec, check_vma=False))

    steps = {name: program(*layout) for name, layout in _STRATEGIES.items()}
    for step in steps.values():
        _seconds(step, arguments)
    times = {name: [] for name in steps}
    for _ in range(rounds):  # in turns: a busy machine slows all
        for name, step in steps.items():
            times[name].append(_seconds(step, arguments))
    return {"tokens": _SPLIT_LENGTH, "seconds": {name: round(min(s), 4) for name, s in times.items()}}


if __name__ == "__main__":
    part, *job = json.loads(sys.argv[1])
    print(json.dumps({"backend": _measure_backend, "split": _measure_split}[part](*job)))
