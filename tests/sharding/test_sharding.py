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

SCRIPT = Path(__file__).with_name("sixteen_devices.py")


@pytest.fixture(scope="module")
def runs():
    done = subprocess.run([sys.executable, str(SCRIPT)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout)


@pytest.mark.parametrize(
    ("name", "alone", "share"), [("all", "one", 1 / 8), ("microbatches", "one", 1 / 8), ("tied", "tied one", 1 / 8)]
)
def test_gradients_on_a_mesh_are_those_of_one_device(runs, name, alone, share):
    one, many = runs[alone], runs[name]
    for leaf, norm in one["gradient"].items():
        assert many["gradient"][leaf] == pytest.approx(norm, rel=1e-4, abs=1e-7), leaf
    assert many["share"] == many["moment_share"] == share
    assert one["share"] == 1


def test_training_on_a_mesh_of_every_axis_has_the_losses_of_one_device(runs):
    np.testing.assert_allclose(runs["all"]["losses"], runs["one"]["losses"], rtol=0, atol=1e-5)
    np.testing.assert_allclose(runs["all"]["held_out"], runs["one"]["held_out"], rtol=0, atol=1e-5)


def test_a_mesh_that_does_not_fit_the_devices_names_the_field():
    with pytest.raises(UserError, match=r"data=3, fsdp=1, context=1, tensor=1; change --config\.mesh"):
        make_mesh(data=3, devices=jax.devices()[:1])


def test_every_parameter_has_a_rule_and_dimensions_that_do_not_divide_stay_whole():
    config = qwen2.Qwen2Config(7, 6, 1, 2, 1, 2, 5, 1e4, 1e-6, False)
    mesh = jax.sharding.AbstractMesh((1, 2, 1, 4), ("data", "fsdp", "context", "tensor"))
    shardings = param_shardings(qwen2.param_shapes(config), mesh)
    assert tuple(shardings["embedding"].spec) == (None, "context")  # 7 words do not split over fsdp 2
    assert tuple(shardings["layers"]["q_kernel"].spec) == (None, ("context", "fsdp"), "tensor")
    assert tuple(shardings["layers"]["down_kernel"].spec) == (None, None, None)  # nor 5 over tensor 4


def test_a_rule_that_uses_an_axis_twice_is_refused():
    with pytest.raises(ValueError, match="q_kernel"):
        ShardingRules(q_kernel=(None, "fsdp", "fsdp"))


def test_a_parameter_without_a_rule_is_named():
    with pytest.raises(KeyError, match="mystery"):
        param_shardings({"mystery": np.zeros((2, 2))}, make_mesh(devices=jax.devices()[:1]))
