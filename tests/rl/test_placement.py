"""Who works where changes where memory is held, and nothing else: on eight simulated devices."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from stepdr_jax.errors import UserError
from stepdr_jax.rl.placement import DevicePlacement
from tests.rl import toy


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    script = Path(__file__).with_name("on_placements.py")
    environment = {**os.environ, "JAX_PLATFORMS": "cpu", "PYTHONPATH": str(Path(__file__).parents[2])}
    command = [sys.executable, str(script), str(tmp_path_factory.mktemp("placements"))]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout.splitlines()[-1])


def test_weights_go_to_the_sampler_in_cuts_and_never_whole_through_one_device(found):
    transfer = found["transfer"]
    assert transfer["same"]
    assert transfer["limit"] < transfer["whole"] / 4
    assert 0 < transfer["most_on_the_way"] <= transfer["limit"]
    assert transfer["learner_grew"] == 0
    assert transfer["sampler_holds"] == pytest.approx(1, abs=0.02)  # norms are on both devices of a replica


def test_results_are_the_same_bits_whatever_waits_on_the_host(found):
    assert found["idle"]["sha256"] == found["plain"]["sha256"]
    assert found["idle"]["answers"] == found["plain"]["answers"]


def test_a_sampler_on_devices_of_its_own_samples_the_same_and_losses_are_those_of_another_mesh(found):
    assert found["disaggregated"]["answers"] == found["plain"]["answers"]
    np.testing.assert_allclose(found["disaggregated"]["losses"], found["plain"]["losses"], atol=1e-5)


def test_a_shared_sampler_holds_nothing_while_the_learner_works_and_an_idle_learner_nothing_while_it_samples(found):
    """In sizes of the actor: both networks with two moments each are 6."""
    plain, idle = found["plain"], found["idle"]
    assert plain["learning"]["0"] == pytest.approx(6, abs=0.1)
    assert plain["sampling"]["0"] > 7  # weights and pages of the sampler besides
    assert idle["learning"]["0"] == pytest.approx(0, abs=0.1)
    assert idle["hosted"]["0"] == pytest.approx(6, abs=0.1)
    assert plain["sampling"]["0"] - idle["sampling"]["0"] == pytest.approx(6, abs=0.1)


def test_separate_roles_share_no_device(found):
    sampling = found["disaggregated"]["sampling"]
    assert all(sampling[str(device)] > 0.5 for device in range(4, 8))  # half of the weights, and pages
    assert all(sampling[str(device)] < 0.1 for device in range(1, 4))  # the learner's parts wait on the host
    assert all(found["disaggregated"]["hosted"][str(device)] > 1.4 for device in range(4))
    assert all(found["plain"]["sampling"][str(device)] == 0 for device in range(1, 8))


@pytest.mark.parametrize(
    "fields, message",
    [
        ({"sampler.tensor": 3}, "expected at most the 1 devices of a process, got 3"),
        ({"placement.sampler": "disaggregated"}, "the 1 devices of a process, and one for the learner, got 1"),
        ({"mesh.fsdp": 2}, "product is the 1 devices"),
        ({"ppo.staleness": 1, "placement.offload": "idle"}, "its own devices; set placement.sampler=disaggregated"),
    ],
)
def test_roles_that_the_devices_cannot_have_are_named(tmp_path, fields, message):
    config = toy.config(tmp_path).copy_and_resolve_references().unlock()
    config.update_from_flattened_dict(fields)
    with pytest.raises(UserError, match=message):
        DevicePlacement.from_config(config)
