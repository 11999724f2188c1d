"""Run in a process of its own: prints one JSON line of largest errors against dense attention for each case."""

import functools
import itertools
import json
import os

os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=8"

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from stepdr_jax.ops.attention import attention
from stepdr_jax.ops.context_parallel import context_attention, zigzag_order


def example(length, heads, kv_heads, packed, head_dim=8):
    rng = np.random.default_rng(0)
    arrays = [rng.normal(size=(2, length, n, head_dim)).astype(np.float32) for n in (heads, kv_heads, kv_heads, heads)]
    segments, positions = np.ones((2, length), np.int32), np.tile(np.arange(length, dtype=np.int32), (2, 1))
    if packed:  # short segments inside one chunk, segments over many, padding at the end
        for row, lengths in enumerate([(length // 2 + 3, 5, length // 4), (7, length - 7)]):
            segments[row], positions[row], at = 0, 0, 0
            for number, size in enumerate(lengths, 1):
                segments[row, at : at + size], positions[row, at : at + size] = number, np.arange(size)
                at += size
    return arrays, positions, segments


def dense(q, k, v, positions, segments):
    return attention(
        q,
        k,
        v,
        query_positions_BT=positions,
        key_positions_BS=positions,
        query_segments_BT=segments,
        key_segments_BS=segments,
        backend="reference",
    )


def value_and_grads(run, q, k, v, g, positions, segments):
    weight = g * (segments > 0)[..., None, None]
    o, pull = jax.vjp(lambda *qkv: run(*qkv, positions, segments), q, k, v)
    return o * (segments > 0)[..., None, None], *pull(weight)


@functools.lru_cache
def split(strategy, n, zigzag, backend="auto"):
    mesh = Mesh(np.array(jax.devices()[:n]), ("context",))

    def run(*arguments):
        return context_attention(*arguments, strategy=strategy, axis_size=n, zigzag=zigzag, backend=backend)

    spec = P(None, "context")
    return jax.jit(
        jax.shard_map(lambda *a: value_and_grads(run, *a), mesh=mesh, in_specs=spec, out_specs=spec, check_vma=False)
    )


whole = jax.jit(functools.partial(value_and_grads, dense))


def errors(strategy, n, zigzag, packed, heads, length, head_dim=8, backend="auto"):
    arrays, positions, segments = example(length, *heads, packed, head_dim)
    expected = whole(*arrays, positions, segments)
    order = zigzag_order(length, n) if zigzag else np.arange(length)
    actual = split(strategy, n, zigzag, backend)(*(x[:, order] for x in (*arrays, positions, segments)))
    return [
        float(jnp.max(jnp.abs(a - e[:, order])) / jnp.max(jnp.abs(e))) for a, e in zip(actual, expected, strict=True)
    ]


HEADS = ((8, 2), (8, 8))

if __name__ == "__main__":
    layouts = itertools.product(("ring", "all_gather", "ulysses"), (True, False), (2, 4, 8))
    for index, (strategy, zigzag, n) in enumerate(layouts):
        for packed in (True, False):
            case = dict(strategy=strategy, n=n, zigzag=zigzag, packed=packed, heads=HEADS[index % 2], length=64)
            print(json.dumps(case | {"errors": errors(**case)}), flush=True)
