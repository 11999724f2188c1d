"""Splitting a step over devices changes where numbers live, not what they are."""

import json
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest

from stepdr_jax.errors import UserError
from stepdr_jax.models import qwen2
from stepdr_jax.sharding.mesh import make_mesh
from stepdr_jax.sharding.rules import ShardingRules, param_shardings

SCRIPT = Path(__file__).with_name("eight_devices.py")


def test_eight_devices_with_microbatches_give_the_losses_of_one_without():
    done = subprocess.run([sys.executable, str(SCRIPT)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    one, eight = (json.loads(done.stdout)[name] for name in ("one", "eight"))
    assert (one["devices"], eight["devices"]) == (1, 8)
    np.testing.assert_allclose(eight["losses"], one["losses"], rtol=0, atol=1e-5)
    assert one["share"] == 1
    assert eight["share"] == eight["moment_share"] == 1 / 4  # split by fsdp and tensor, whole in data


def test_a_mesh_that_does_not_fit_the_devices_names_the_field():
    with pytest.raises(UserError, match=r"data=3, fsdp=1, context=1, tensor=1; change --config\.mesh"):
        make_mesh(data=3, devices=jax.devices()[:1])


def test_every_parameter_has_a_rule_and_dimensions_that_do_not_divide_stay_whole():
    config = qwen2.Qwen2Config(7, 6, 1, 2, 1, 2, 5, 1e4, 1e-6, False)
    mesh = jax.sharding.AbstractMesh((1, 2, 1, 4), ("data", "fsdp", "context", "tensor"))
    shardings = param_shardings(qwen2.param_shapes(config), mesh)
    assert tuple(shardings["embedding"].spec) == (None, "fsdp")  # 7 words do not split over 4, 6 dimensions do over 2
    assert tuple(shardings["layers"]["q_kernel"].spec) == (None, "fsdp", "tensor")


def test_a_rule_that_uses_an_axis_twice_is_refused():
    with pytest.raises(ValueError, match="q_kernel"):
        ShardingRules(q_kernel=(None, "fsdp", "fsdp"))


def test_a_parameter_without_a_rule_is_named():
    with pytest.raises(KeyError, match="mystery"):
        param_shardings({"mystery": np.zeros((2, 2))}, make_mesh(devices=jax.devices()[:1]))
