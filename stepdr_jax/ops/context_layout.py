"""How a sequence is cut over the mesh axis `context`, what each strategy of attention then costs, and which to take.

A row of L tokens goes to n devices plainly (device r has the r-th of n parts) or in zigzag: of 2n chunks device r has
chunk r and chunk 2n-1-r, which gives every device the same causal work. Zigzag is a permutation of the batch, done
once; nothing but attention needs to know. The formulas are those of docs/long_context.md.
"""

from typing import NamedTuple

import numpy as np

from stepdr_jax.errors import UserError

_LANES = 128  # what the TPU kernel's tiles are multiples of
STRATEGIES = ("ring", "all_gather", "ulysses", "none")


def zigzag_order(length: int, shards: int) -> np.ndarray:
    """int32[length]: row[order], cut in `shards` contiguous parts, is the zigzag layout; argsort(order) undoes it.

    Raises:
        UserError: 2 * shards does not divide length.
    """
    if length % (2 * shards):
        raise UserError(f"context: expected a multiple of {2 * shards} (2 x mesh.context) for zigzag, got {length}")
    chunks = np.arange(length, dtype=np.int32).reshape(2 * shards, -1)
    pairs = [[shard, 2 * shards - 1 - shard] for shard in range(shards)]
    return chunks[np.array(pairs).ravel()].ravel()


def check_layout(
    length: int, heads: int, kv_heads: int, *, strategy: str, axis_size: int, zigzag: bool, backend: str = "auto"
) -> None:
    """Raises UserError, naming the config field, where a strategy cannot serve a shape; for configs and call sites.

    heads, kv_heads: those of one device, that is divided by mesh.tensor.
    """
    if strategy not in STRATEGIES:
        raise UserError(f"parallel.context_strategy: expected one of {', '.join(STRATEGIES)}, got {strategy!r}")
    if backend not in ("auto", "blockwise", "splash"):
        raise UserError(
            f"parallel.attention: expected auto, blockwise or splash where mesh.context > 1, got {backend!r}"
        )
    unit = {"ring": 2 * axis_size, "all_gather": axis_size}.get(strategy, 1) * _LANES
    if backend == "splash" and length % unit:
        raise UserError(
            f"context: expected a multiple of {unit} tokens for attention backend splash, strategy {strategy}, "
            f"mesh.context={axis_size}, got {length}; set parallel.attention=blockwise to use any length"
        )
    if axis_size == 1:
        return
    if strategy == "none":
        raise UserError(
            f"parallel.context_strategy: none needs mesh.context=1, got {axis_size}; set ring, all_gather or ulysses"
        )
    parts = 2 * axis_size if zigzag or strategy == "ring" else axis_size
    if length % parts:
        raise UserError(
            f"context: expected a multiple of {parts} tokens for mesh.context={axis_size}, "
            f"strategy {strategy}{' in zigzag' if zigzag else ''}, got {length}; "
            f"the next that fits is {length + -length % parts}"
        )
    if strategy == "ulysses":
        if heads % axis_size:
            raise UserError(
                f"parallel.context_strategy: ulysses needs query heads divisible by mesh.context, got {heads} heads "
                f"and mesh.context={axis_size}; set ring or all_gather"
            )
        if kv_heads % axis_size and axis_size % kv_heads:
            raise UserError(
                f"parallel.context_strategy: ulysses needs kv heads that divide mesh.context or are divided by it, got "
                f"{kv_heads} kv heads and mesh.context={axis_size}; set ring or all_gather"
            )


def hop_pairs(length: int, *, strategy: str, axis_size: int, zigzag: bool) -> list[int]:
    """Query-key pairs per query head that the busiest device computes at each hop, its own keys first.

    A forward pass takes 4 * head_dim FLOPs for each. Causality asks for length * (length + 1) / 2 in all; the sum here
    times axis_size over that is the price of imbalance. `ulysses` is counted as if each device had all heads.
    """
    T, n = length // axis_size, axis_size
    own = T * (T + 1) // 2
    if strategy == "ring":
        return [own] + [T * T // 2 if zigzag else T * T] * (n - 1)
    if strategy == "all_gather" and not zigzag:
        return [own + (n - 1) * T * T]
    return [length * (length + 1) // 2 // n]


class Speeds(NamedTuple):
    """Of one device: FLOP/s (bfloat16), HBM bytes/s, bytes/s of one link one way, can permutes run under kernels."""

    flops: float
    hbm: float
    link: float
    overlaps: bool


_EVEN = 1.1  # costs this near are taken as equal: the estimate is no better
_KERNEL_SHARE = 0.5  # of peak FLOP/s that an attention kernel is taken to reach


def layer_seconds(
    length: int, heads: int, kv_heads: int, head_dim: int, *, strategy: str, axis_size: int, speeds: Speeds
) -> float:
    """Estimate of what a strategy adds to one layer of one row: forward, forward again, and backward, in zigzag.

    Exposed transfers on a ring of links used both ways, and for the ring the traffic to HBM of merging and stacking.
    """
    T, n = length / axis_size, axis_size
    kv_bytes, q_bytes = 4 * T * kv_heads * head_dim, 2 * T * heads * head_dim
    if strategy == "all_gather":  # three gathers and one reduce-scatter
        return 4 * (n - 1) * kv_bytes / (2 * speeds.link)
    if strategy == "ulysses":  # three exchanges of q, k, v and o, over n / 4 links on average
        kv_bytes *= max(1, n / kv_heads)
        return 3 * (2 * q_bytes + kv_bytes) * n / 8 / speeds.link
    compute = 4 * heads * head_dim * T * T / 2 / (speeds.flops * _KERNEL_SHARE)
    forward, backward = kv_bytes / speeds.link, 3 * kv_bytes / speeds.link  # gradients travel in float32
    hidden = (compute, 2.5 * compute) if speeds.overlaps else (0.0, 0.0)
    exposed = 2 * max(0.0, forward - hidden[0]) + max(0.0, backward - hidden[1])
    return (n - 1) * (exposed + 26 * q_bytes / speeds.hbm)


def gathered_bytes(length: int, kv_heads: int, head_dim: int) -> int:
    """Keys, values and their gradients of one row of one layer in bfloat16: what all_gather holds at its worst."""
    return 2 * 4 * length * kv_heads * head_dim


def choose(
    length: int,
    heads: int,
    kv_heads: int,
    head_dim: int,
    *,
    axis_size: int,
    zigzag: bool = True,
    speeds: Speeds | None = None,
    device_kind: str = "",
    rows: int = 1,
    free_bytes: float | None = None,
) -> tuple[str, str]:
    """The cheapest strategy that fits, and why, for `auto`.

    heads, kv_heads: those of one device. rows: sequences of one device's microbatch. free_bytes: memory that attention
    may use; None for no limit. speeds: of a device, from `sharding.hardware`; None where they are not known.
    device_kind: its name, for the reason. Estimates, not measurements: see layer_seconds. Raises UserError if no
    strategy can serve the shape.
    """
    if axis_size == 1:
        return "none", "mesh.context is 1"
    possible, refusals = [], []
    for strategy in STRATEGIES[:3]:
        try:
            check_layout(length, heads, kv_heads, strategy=strategy, axis_size=axis_size, zigzag=zigzag)
            possible.append(strategy)
        except UserError as error:
            refusals.append(error)
    if not possible:
        raise refusals[0]
    held = rows * gathered_bytes(length, kv_heads, head_dim)
    if free_bytes is not None and held > free_bytes and "ring" in possible:
        return "ring", f"all gathered keys would take {held / 2**30:.2f} GiB of {free_bytes / 2**30:.2f} free"
    if speeds is None or not zigzag:
        best = "all_gather" if "all_gather" in possible else possible[0]
        why = "the ring needs zigzag to be balanced" if speeds else f"no link speeds of {device_kind} are known"
        return best, why
    costs = {
        s: layer_seconds(length, heads, kv_heads, head_dim, strategy=s, axis_size=axis_size, speeds=speeds)
        for s in possible
    }
    listed = ", ".join(f"{s} {1e3 * cost:.2f} ms" for s, cost in sorted(costs.items(), key=lambda item: item[1]))
    why = f"estimated cost per layer and row on {device_kind}: {listed}"
    if not speeds.overlaps:
        why += "; permutes are synchronous here"
    best = min(costs, key=lambda strategy: costs[strategy])
    if best != "ring" and costs.get("ring", float("inf")) <= _EVEN * costs[best]:
        return "ring", f"{why}; so near, the ring for its memory: gathered keys would take {held / 2**30:.2f} GiB"
    return best, why
