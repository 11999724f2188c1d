"""The device mesh: one shape of four named axes for every program, most of them of size 1 on a laptop."""

from collections.abc import Sequence

import jax
import numpy as np

from stepdr_jax.errors import UserError

AXES = ("data", "fsdp", "context", "tensor")


def make_mesh(
    data: int = 1, fsdp: int = 1, context: int = 1, tensor: int = 1, *, devices: Sequence[jax.Device] | None = None
) -> jax.sharding.Mesh:
    """A mesh over axes data (batch), fsdp (batch and parameters), context (sequence), tensor (heads, ffn, vocabulary).

    Neighbours on the last axis are neighbours in the device list, so the chattiest axis (tensor) stays closest.

    Args:
        data, fsdp, context, tensor: sizes of the axes.
        devices: devices to use; default all. A single-device mesh may be made from a larger list.

    Raises:
        UserError: when the sizes do not multiply to the number of devices.
    """
    sizes = (data, fsdp, context, tensor)
    devices = list(jax.devices() if devices is None else devices)
    need = int(np.prod(sizes))
    if min(sizes) < 1 or (need != len(devices) and need != 1):
        shape = ", ".join(f"{axis}={size}" for axis, size in zip(AXES, sizes, strict=True))
        raise UserError(
            f"expected config.mesh sizes whose product is the {len(devices)} devices here, got {shape}; change --config.mesh.*"
        )
    return jax.sharding.Mesh(np.array(devices[:need]).reshape(sizes), AXES)
