"""Every context strategy equals dense attention on simulated devices, does equal work, and refuses what it cannot do."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from stepdr_jax.errors import UserError
from stepdr_jax.ops.context_parallel import check_layout, zigzag_order

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
    ],
)
def test_shapes_that_a_strategy_cannot_serve_are_refused(message, change):
    shape = dict(length=128, heads=16, kv_heads=8, strategy="all_gather", axis_size=8, zigzag=True)
    check_layout(**shape)
    with pytest.raises(UserError, match=message):
        check_layout(**shape | change)
