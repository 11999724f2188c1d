"""An update on a mesh is that of one device: rows over data and fsdp, tokens over context, heads over tensor."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest


@pytest.fixture(scope="module")
def found():
    script = Path(__file__).with_name("on_eight_devices.py")
    environment = {**os.environ, "JAX_PLATFORMS": "cpu", "PYTHONPATH": str(Path(__file__).parents[2])}
    done = subprocess.run([sys.executable, str(script)], env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize("mesh", ["rows", "every"])
def test_an_iteration_of_ppo_on_a_mesh_is_that_of_one_device(found, mesh):
    one = found[mesh]
    assert max(one["details"].values()) < 1e-4  # log-probabilities, values and advantages of every token
    assert max(one["state"].values()) < 1e-4  # weights and moments of actor and critic
    assert one["state"]["params_moments"] < 1e-5  # of which Adam's hide nothing: gradients are summed right
    assert one["metrics"] < 1e-3
