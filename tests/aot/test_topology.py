"""Names of TPU slices, their shapes and meshes. Counts and shapes: docs.cloud.google.com/tpu/docs, one page for each
TPU."""

import pytest

from stepdr_jax.errors import UserError
from stepdr_jax.sharding import topology
from stepdr_jax.sharding.hardware import SPEEDS

ONES = dict(data=1, fsdp=1, context=1, tensor=1)


@pytest.mark.parametrize(
    ("text", "shown", "chips", "devices"),
    [
        ("v5p:4x4x8", "v5p:4x4x8", 128, 128),
        ("v5p-256", "v5p:4x4x8", 128, 128),  # TensorCores are counted
        ("v5p-8", "v5p:2x2x1", 4, 4),
        ("2xv5p:8x8x8", "2xv5p:8x8x8", 1024, 1024),
        ("v5litepod-64", "v5e:8x8", 64, 64),
        ("V6E-256", "v6e:16x16", 256, 256),
        ("trillium:4x8", "v6e:4x8", 32, 32),
        ("tpu7x:4x4x4", "tpu7x:4x4x4", 64, 128),
        ("ironwood-128", "tpu7x:4x4x4", 64, 128),
        ("v5p:4x4x12", "v5p:4x4x12", 192, 192),  # whole cubes that the documentation does not list
    ],
)
def test_names_that_people_use(text, shown, chips, devices):
    parsed = topology.parse(text)
    assert (str(parsed), parsed.chips, parsed.devices) == (shown, chips, devices)
    assert topology.parse(str(parsed)) == parsed


@pytest.mark.parametrize(
    ("text", "hint"),
    [
        ("v5x:4x4", "v5p"),
        ("v6e:16x32", "v6e:16x16"),  # libtpu takes it, nobody sells it
        ("v5p:4x4x7", "v5p:4x4x8"),
        ("v5p:8x4x4", "v5p:4x4x8"),
        ("v6e-100", "v6e-128"),
        ("128 chips", "v5p:4x4x8"),
        ("0xv5p:4x4x4", "at least 1"),
        ("v5p:32x32x32", "v5p:16x16x24"),
    ],
)
def test_slices_that_do_not_exist_are_refused_with_those_near(text, hint):
    with pytest.raises(UserError, match=hint):
        topology.parse(text)


@pytest.mark.parametrize(
    ("text", "wrap"),
    [
        ("v5p:4x4x4", (True, True, True)),
        ("v5p:2x4x4", (False, False, False)),
        ("v6e:16x16", (True, True, False)),
        ("v6e:8x16", (False, False, False)),
        ("tpu7x:4x4x8", (True, True, True)),
    ],
)
def test_only_whole_cubes_and_whole_pods_wrap_around(text, wrap):
    assert topology.parse(text).wrap == wrap


def test_every_generation_has_speeds_and_documented_shapes_within_its_size():
    for generation in topology.GENERATIONS:
        assert generation.kind in SPEEDS
        for shape in generation.slices:
            assert topology.parse(f"{generation.name}:{shape}").chips <= generation.largest


def test_a_mesh_that_does_not_multiply_to_the_devices_is_refused_with_one_that_does():
    slices = topology.parse("v5p:4x4x8")
    with pytest.raises(UserError, match="128 devices.*fsdp=8, context=16") as raised:
        topology.check_mesh(slices, ONES | dict(context=16))
    assert "\n" not in str(raised.value)
    topology.check_mesh(slices, ONES | dict(fsdp=8, context=16))


def test_slices_must_divide_the_data_axis():
    with pytest.raises(UserError, match="mesh.data"):
        topology.check_mesh(topology.parse("2xv5p:4x4x4"), ONES | dict(fsdp=128))


def test_splits_cover_the_slice():
    slices = topology.parse("2xv6e:4x4")
    found = list(topology.splits(slices, tensor=(1, 8)))
    assert all(s["data"] * s["fsdp"] * s["context"] * s["tensor"] == 32 for s in found)
    assert len({tuple(s.values()) for s in found}) == len(found) == 5 + 2
