"""The device mesh: one shape of four named axes for every program, most of them of size 1 on a laptop."""

from collections.abc import Sequence

import jax
import numpy as np
from jax.experimental import mesh_utils

from stepdr_jax.errors import UserError

AXES = ("data", "fsdp", "context", "tensor")


def make_mesh(
    data: int = 1, fsdp: int = 1, context: int = 1, tensor: int = 1, *, devices: Sequence[jax.Device] | None = None
) -> jax.sharding.Mesh:
    """A mesh over axes data (batch), fsdp (batch and parameters), context (sequence), tensor (heads, ffn, vocabulary).

    On TPUs axes lie on rings of links where they can, and only data crosses slices. Elsewhere, and where the devices
    are no cuboid, neighbours on the last axis are neighbours in the device list: the chattiest axis (tensor) stays
    closest.

    Args:
        data, fsdp, context, tensor: sizes of the axes.
        devices: devices to use; default all. A single-device mesh may be made from a larger list.

    Raises:
        UserError: when the sizes do not multiply to the number of devices, or slices do not divide data.
    """
    sizes = (data, fsdp, context, tensor)
    devices = list(jax.devices() if devices is None else devices)
    need = int(np.prod(sizes))
    if min(sizes) < 1 or (need != len(devices) and need != 1):
        shape = ", ".join(f"{axis}={size}" for axis, size in zip(AXES, sizes, strict=True))
        raise UserError(
            f"expected config.mesh sizes whose product is the {len(devices)} devices here, got {shape}; change "
            "--config.mesh.*"
        )
    return jax.sharding.Mesh(_arranged(devices[:need], sizes), AXES)


def _arranged(devices: list[jax.Device], sizes: tuple[int, ...]) -> np.ndarray:
    listed = np.array(devices).reshape(sizes)
    if devices[0].platform != "tpu" or len(devices) == 1:
        return listed
    slices = len({getattr(device, "slice_index", 0) for device in devices})
    if sizes[0] % slices:
        raise UserError(
            f"config.mesh.data: expected a multiple of the {slices} slices, because only data crosses the slower "
            f"network between them, got {sizes[0]}; change --config.mesh.*"
        )

    def placed(**options) -> np.ndarray:
        if slices == 1:
            return mesh_utils.create_device_mesh(sizes, devices, **options)
        inside = (sizes[0] // slices, *sizes[1:])
        return mesh_utils.create_hybrid_device_mesh(inside, (slices, 1, 1, 1), devices, **options)

    try:
        return placed()
    except NotImplementedError:  # an axis that is not a product of whole physical ones
        return placed(allow_split_physical_axes=True)
    except AssertionError:  # no cuboid: some chips of every host have another role
        return listed
