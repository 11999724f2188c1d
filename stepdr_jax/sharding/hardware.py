"""Facts about accelerators, in this file alone: peak FLOP/s, memory, links, and the TPU slices that are sold."""

import dataclasses

from stepdr_jax.ops.context_layout import Speeds

# TPUs by jax's device_kind. Figures: Google Cloud's TPU pages and "How to Scale Your Model" (links); overlap: compiled
# here.
SPEEDS = {
    "TPU v5": Speeds(459e12, 2765e9, 90e9, True),
    "TPU v5 lite": Speeds(197e12, 819e9, 45e9, False),
    "TPU v6 lite": Speeds(918e12, 1640e9, 90e9, True),
    "TPU7x": Speeds(1153e12, 3690e9, 90e9, True),
}

# GPUs by jax's device_kind: peak dense bfloat16 FLOP/s, memory bytes/s. From NVIDIA's data sheets.
GPUS = {
    "NVIDIA A100-SXM4-40GB": (312e12, 1555e9),
    "NVIDIA A100-SXM4-80GB": (312e12, 2039e9),
    "NVIDIA H100 80GB HBM3": (989e12, 3352e9),
    "NVIDIA H200": (989e12, 4800e9),
}


def peak_flops(device_kind: str) -> float | None:
    """Peak dense bfloat16 FLOP/s of one device; None where the kind is not known (CPUs)."""
    if device_kind in SPEEDS:
        return SPEEDS[device_kind].flops
    return GPUS[device_kind][0] if device_kind in GPUS else None


def memory_bandwidth(device_kind: str) -> float | None:
    """Memory bytes/s of one device; None where the kind is not known."""
    if device_kind in SPEEDS:
        return SPEEDS[device_kind].hbm
    return GPUS[device_kind][1] if device_kind in GPUS else None


@dataclasses.dataclass(frozen=True)
class Generation:
    """A kind of TPU.

    name: libtpu's. kind: jax's device_kind, the key of SPEEDS. devices_per_chip: jax devices on a chip.
    hbm: bytes that a program may use on one device, as libtpu 0.0.51 states in its out-of-memory message (what it
        reserves for itself is taken off). host: bytes of host memory per device, on the largest host type.
    dcn: bytes/s of one chip to other slices. links: links of one chip. largest: most chips in a slice.
    slices: documented shapes. names: words that people use for it; counts: what N counts in NAME-N, per chip.
    """

    name: str
    kind: str
    devices_per_chip: int
    hbm: float
    host: float
    dcn: float
    links: int
    largest: int
    slices: tuple[str, ...]
    names: tuple[str, ...]
    counts: int

    @property
    def speeds(self) -> Speeds:
        """Of one device: FLOP/s, HBM and link bytes/s."""
        return SPEEDS[self.kind]

    @property
    def cubes(self) -> bool:
        """Slices are three-dimensional; whole cubes of 4x4x4 are combined at will and wrap around."""
        return self.links == 6


_GIB = 2**30
_FLAT = ("1x1", "2x2", "2x4", "4x4", "4x8", "8x8", "8x16", "16x16")
_CUBES = ("2x2x1", "2x2x2", "2x2x4", "2x4x4", "4x4x4", "4x4x8", "4x8x8", "8x8x8", "8x8x16", "8x16x16", "16x16x16")
# Shapes, host memory and DCN: docs.cloud.google.com/tpu/docs/{v5p,v5e,v6e,tpu7x} (DCN is quoted there in Gbit/s per
# chip or per pod). Memory: measured by compiling. FLOP/s, HBM and links: SPEEDS above.
GENERATIONS = (
    Generation(
        name="v5p",
        kind="TPU v5",
        devices_per_chip=1,
        hbm=95.73 * _GIB,
        host=448e9 / 4,
        dcn=50e9 / 8,
        links=6,
        largest=6144,
        slices=(*_CUBES, "16x16x24"),
        names=("v5p", "v5"),
        counts=2,  # TensorCores
    ),
    Generation(
        name="v5e",
        kind="TPU v5 lite",
        devices_per_chip=1,
        hbm=15.75 * _GIB,
        host=384e9 / 8,
        dcn=6.4e12 / 8 / 256,
        links=4,
        largest=256,
        slices=_FLAT,
        names=("v5e", "v5litepod", "v5lite"),
        counts=1,
    ),
    Generation(
        name="v6e",
        kind="TPU v6 lite",
        devices_per_chip=1,
        hbm=31.24 * _GIB,
        host=1536 * _GIB / 8,
        dcn=25.6e12 / 8 / 256,
        links=4,
        largest=256,
        slices=_FLAT,
        names=("v6e", "trillium", "v6"),
        counts=1,
    ),
    Generation(
        name="tpu7x",
        kind="TPU7x",
        devices_per_chip=2,
        hbm=94.74 * _GIB,
        host=960e9 / 8,
        dcn=100e9 / 8,
        links=6,
        largest=9216,
        slices=_CUBES,
        names=("tpu7x", "ironwood", "v7x", "tpu7", "v7"),
        counts=2,  # TensorCores, each a device
    ),
)
