"""The ring's transfers run under its kernels, read from the schedule that XLA's TPU compiler makes."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent
needs_libtpu = pytest.mark.skipif(not importlib.util.find_spec("libtpu"), reason="needs libtpu: pip install -e .[tpu]")


def hops(*programs):
    """The permutes of each program's transfers."""
    environment = {**os.environ, "PYTHONPATH": str(HERE.parents[1])}
    command = [sys.executable, str(HERE / "ring_schedule.py"), *programs]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stderr
    found = [json.loads(line) for line in done.stdout.splitlines()]
    return [[t for t in transfers if t["kind"] == "collective-permute"] for transfers in found]


def exposed(permutes):
    return [hop for hop in permutes if hop["synchronous"] or not hop["kernels"]]


def passes(permutes):
    """How many permutes have a forward kernel, and how many one of the backward pass, between start and done."""
    kernels = [" ".join(hop["kernels"]) for hop in permutes]
    return sum("_fwd_" in names for names in kernels), sum("_dkv_" in names for names in kernels)


def check(permutes):
    """Every hop is hidden, in the forward pass, the rematerialised one and the backward pass, in and outside loops."""
    assert not exposed(permutes)
    forward, backward = passes(permutes)
    assert forward == 4  # first hop and loop, twice; the backward pass shares the second's first hop
    assert backward == 3  # keys and their gradients in the loop, the way home
    assert len({hop["inside"] for hop in permutes}) == 4  # three loops and the program around them


@needs_libtpu
def test_every_hop_runs_under_a_kernel_and_only_because_of_the_barrier():
    with_barrier, without = hops("v5p:2x2x2:1", "v5p:2x2x2:0")
    check(with_barrier)
    assert len(exposed(without)) > 2


@needs_libtpu
@pytest.mark.parametrize("topology", ["v6e:2x4", pytest.param("v5p:2x2x4", marks=pytest.mark.aot)])
def test_every_hop_runs_under_a_kernel_on_other_topologies(topology):
    (permutes,) = hops(f"{topology}:1")
    check(permutes)
