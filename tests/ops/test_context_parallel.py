"""Every context strategy equals dense attention on simulated devices, does equal work, and refuses what it cannot
do."""

import json
import os
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AbstractMesh
from jax.sharding import PartitionSpec as P

from stepdr_jax.errors import UserError
from stepdr_jax.ops import context_parallel
from stepdr_jax.ops.context_parallel import check_layout, choose, context_attention, hop_pairs, zigzag_order
from stepdr_jax.ops.flash import Kernel
from stepdr_jax.sharding.hardware import SPEEDS

HERE = Path(__file__).parent


def wrong_cases(script, *arguments, count, tolerance):
    """Cases that the script prints whose errors are too large."""
    environment = {**os.environ, "PYTHONPATH": str(HERE.parents[1]), "JAX_PLATFORMS": "cpu"}
    command = [sys.executable, str(HERE / script), *arguments]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stderr
    cases = [json.loads(line) for line in done.stdout.splitlines()]
    assert len(cases) == count
    return [case for case in cases if not max(case["errors"]) < tolerance]


def test_strategies_equal_dense_attention_on_eight_devices():
    """Values and gradients: strategy x packed or not x zigzag or plain x 2, 4, 8 devices, with and without GQA."""
    assert not wrong_cases("eight_devices.py", count=36, tolerance=2e-6)


@pytest.mark.parametrize("cases, count", [("quick", 2), pytest.param("slow", 4, marks=pytest.mark.slow)])
def test_splash_interpreted_equals_dense_attention(cases, count):
    assert not wrong_cases("splash_interpreted.py", cases, count=count, tolerance=5e-6)


@pytest.mark.parametrize("shards", [1, 2, 8])
def test_zigzag_gives_each_shard_one_early_and_one_late_chunk(shards):
    order = zigzag_order(48, shards)
    chunk = 48 // (2 * shards)
    for shard, rows in enumerate(order.reshape(shards, 2, chunk)):
        assert rows[0].tolist() == list(range(shard * chunk, (shard + 1) * chunk))
        late = 2 * shards - 1 - shard
        assert rows[1].tolist() == list(range(late * chunk, (late + 1) * chunk))
    row = np.arange(48) * 7
    assert (row[order][np.argsort(order)] == row).all()


@pytest.mark.parametrize(
    "message, change",
    [
        ("context: expected a multiple of 16 .* got 100; the next that fits is 112", dict(length=100)),
        ("context: expected a multiple of 8 ", dict(length=100, zigzag=False)),
        ("ulysses needs query heads divisible by mesh.context, got 12", dict(heads=12, strategy="ulysses")),
        ("ulysses needs kv heads", dict(heads=24, kv_heads=6, strategy="ulysses")),
        ("none needs mesh.context=1", dict(strategy="none")),
        ("parallel.context_strategy: expected one of", dict(strategy="rings")),
        ("parallel.attention: expected", dict(backend="cudnn")),
        ("multiple of 2048 tokens for attention backend splash", dict(strategy="ring", backend="splash", length=1024)),
        ("multiple of 1024 tokens for attention backend splash", dict(backend="splash", length=1536)),
    ],
)
def test_shapes_that_a_strategy_cannot_serve_are_refused(message, change):
    shape = dict(length=128, heads=16, kv_heads=8, strategy="all_gather", axis_size=8, zigzag=True)
    check_layout(**shape)
    with pytest.raises(UserError, match=message):
        check_layout(**shape | change)


def compiled_pairs(monkeypatch, strategy, n, zigzag, length=64):
    """The program that all devices run, and the query-key pairs of each kernel call in it, device by device."""
    calls = []

    def forward(q, k, v, query_segments, key_segments, order):
        tiles, T, S = q.shape[0], q.shape[2], k.shape[2]  # one row: the rest of the batch are tiles
        calls.append([T * S * tiles] if order is None else [int(rows.sum()) + T for rows in order.table])
        return q, q[..., 0]

    monkeypatch.setattr(context_parallel, "kernel", lambda backend: Kernel(forward, None))

    def run(*arguments):
        return context_attention(*arguments, strategy=strategy, axis_size=n, zigzag=zigzag)

    split = jax.shard_map(
        run,
        mesh=AbstractMesh((n,), ("context",)),
        in_specs=P(None, "context"),
        out_specs=P(None, "context"),
        check_vma=False,
    )
    tokens = jax.ShapeDtypeStruct((1, length), jnp.int32)
    arrays = jax.ShapeDtypeStruct((1, length, 16, 4), jnp.float32)
    return str(jax.make_jaxpr(split)(arrays, arrays, arrays, tokens, tokens)), calls


@pytest.mark.parametrize("n", [4, 8])
@pytest.mark.parametrize("zigzag", [True, False])
def test_ring_positions_run_one_program_with_the_work_of_the_formula(monkeypatch, n, zigzag):
    program, (own, loop) = compiled_pairs(monkeypatch, "ring", n, zigzag)
    assert "cond[" not in program
    first, *others = hop_pairs(64, strategy="ring", axis_size=n, zigzag=zigzag)
    assert own == [first]
    assert loop == [others[0]]
    assert len(others) == n - 1 and len(set(others)) == 1 and f"length={n - 1}" in program


def test_gathered_keys_in_zigzag_are_equal_work_and_plain_ones_are_not(monkeypatch):
    for zigzag in (True, False):
        _, (work,) = compiled_pairs(monkeypatch, "all_gather", 8, zigzag)
        assert len(work) == 8
        assert (len(set(work)) == 1) == zigzag
        assert [max(work)] == hop_pairs(64, strategy="all_gather", axis_size=8, zigzag=zigzag)


@pytest.mark.parametrize("strategy", ["ring", "all_gather", "ulysses"])
@pytest.mark.parametrize("n", [8, 16, 64])
def test_zigzag_wastes_no_causal_work(strategy, n):
    length = 131072
    causal = length * (length + 1) // 2
    assert 1 <= n * sum(hop_pairs(length, strategy=strategy, axis_size=n, zigzag=True)) / causal < 1.05
    plain = n * sum(hop_pairs(length, strategy="ring", axis_size=n, zigzag=False)) / causal
    assert plain > 1.8


def of(device_kind):
    return dict(speeds=SPEEDS.get(device_kind), device_kind=device_kind)


def test_choice_follows_links_memory_and_heads():
    shape = dict(length=131072, heads=40, kv_heads=8, head_dim=128)
    assert choose(**shape, axis_size=1)[0] == "none"
    assert choose(**shape, axis_size=16, **of("TPU v5"))[0] == "ring"
    strategy, reason = choose(**shape, axis_size=16, **of("TPU v5 lite"))
    assert strategy == "all_gather" and "synchronous" in reason
    strategy, reason = choose(**shape, axis_size=16, **of("TPU v5 lite"), free_bytes=2**28)
    assert strategy == "ring" and "1.00 GiB of 0.25 free" in reason
    assert choose(**shape, axis_size=16, **of("cpu"))[0] == "all_gather"
    few_groups = dict(length=131072, heads=8, kv_heads=8, head_dim=128)
    assert choose(**few_groups, axis_size=4, **of("TPU v5 lite"))[0] == "ulysses"
    with pytest.raises(UserError, match="context: expected a multiple of 32"):
        choose(131080, 40, 8, 128, axis_size=16)
