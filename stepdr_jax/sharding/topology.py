"""TPU slices as they are sold, by name and shape; a mesh over one that nobody has to own.

`parse` reads the names that people use, `mesh_of` makes the mesh that `training.program` takes. libtpu must be
installed for the latter (pip install -e .[tpu]); no TPU is needed.
"""

import dataclasses
import difflib
import functools
import itertools
import math
import re
from collections.abc import Mapping

import jax

from stepdr_jax.errors import UserError
from stepdr_jax.sharding.hardware import GENERATIONS, Generation
from stepdr_jax.sharding.mesh import AXES, make_mesh


@dataclasses.dataclass(frozen=True)
class Topology:
    """One or more equal slices."""

    generation: Generation
    shape: tuple[int, ...]
    slices: int = 1

    def __str__(self) -> str:
        text = f"{self.generation.name}:{'x'.join(map(str, self.shape))}"
        return f"{self.slices}x{text}" if self.slices > 1 else text

    @property
    def chips(self) -> int:
        """Of all slices."""
        return math.prod(self.shape) * self.slices

    @property
    def devices(self) -> int:
        """jax devices of all slices."""
        return self.chips * self.generation.devices_per_chip

    @property
    def wrap(self) -> tuple[bool, bool, bool]:
        """Which dimensions are rings. Slices of whole cubes wrap everywhere, flat ones only as a full pod of 16x16."""
        if self.generation.cubes:
            return (all(size % 4 == 0 for size in self.shape),) * 3
        full = self.shape == (16, 16)
        return (full, full, False)

    def describe(self):
        """jax's TopologyDescription. Raises UserError without libtpu."""
        from jax.experimental import topologies

        name = f"{self.generation.name}:{'x'.join(map(str, self.shape))}"
        try:
            return topologies.get_topology_desc(name, "tpu", wrap=self.wrap, num_slices=self.slices)
        except Exception as error:
            if "libtpu" not in str(error).lower():
                raise
            raise UserError("libtpu is not installed; install it with: pip install -e .[tpu]") from error


def parse(text: str, slices: int = 1) -> Topology:
    """Reads v5p:4x4x8, 2xv5p:8x8x8, or a name as Google Cloud has it: v5p-256, v5litepod-64, 4xv6e-256.

    Args:
        text: the name; a number before it counts slices.
        slices: how many slices, unless the name says.

    Raises:
        UserError: no such slice is sold; the message names those near it.
    """
    found = re.fullmatch(r"(?:(\d+)x)?([a-z][a-z0-9]*?)[:=_-](\d+(?:x\d+)*)", text.strip().lower())
    if not found:
        raise UserError(f"topology: expected a TPU slice such as v5p:4x4x8, v5p-256 or 2xv5p:8x8x8, got {text!r}")
    count, word, size = int(found[1] or slices), found[2], found[3]
    known = {name: generation for generation in GENERATIONS for name in generation.names}
    if word not in known:
        close = difflib.get_close_matches(word, known, 3, 0.4) or [generation.name for generation in GENERATIONS]
        raise UserError(f"topology: no TPU is called {word!r}; did you mean {' or '.join(close)}?")
    generation = known[word]
    if count < 1:
        raise UserError(f"topology: expected at least 1 slice, got {count}")
    if "x" not in size:
        return Topology(generation, _shape_of_count(generation, int(size), text), count)
    shape = tuple(int(part) for part in size.split("x"))
    if not _sold(generation, shape):
        raise UserError(f"topology: {generation.name} is not sold as {size}; near it: {_near(generation, shape)}")
    return Topology(generation, shape, count)


def _dims(text: str) -> tuple[int, ...]:
    return tuple(int(part) for part in text.split("x"))


def _sold(generation: Generation, shape: tuple[int, ...]) -> bool:
    if shape in map(_dims, generation.slices):
        return True
    in_cubes = len(shape) == 3 and all(size % 4 == 0 and size for size in shape) and list(shape) == sorted(shape)
    return generation.cubes and in_cubes and math.prod(shape) <= generation.largest


def _near(generation: Generation, shape: tuple[int, ...]) -> str:
    chips = math.prod(shape) or 1
    by_size = sorted(generation.slices, key=lambda text: abs(math.log(math.prod(_dims(text)) / chips)))
    return ", ".join(f"{generation.name}:{text}" for text in by_size[:3])


def _shape_of_count(generation: Generation, count: int, text: str) -> tuple[int, ...]:
    for shape in map(_dims, generation.slices):
        if math.prod(shape) * generation.counts == count:
            return shape
    sizes = [math.prod(_dims(s)) * generation.counts for s in generation.slices]
    near = sorted(sizes, key=lambda size: abs(math.log(size / max(count, 1))))[:3]
    named = ", ".join(f"{generation.name}-{size}" for size in sorted(near))
    unit = "TensorCores" if generation.counts == 2 else "chips"
    raise UserError(f"topology: {text} is not a slice with a documented shape ({unit} are counted); near it: {named}")


def check_mesh(topology: Topology, sizes: Mapping[str, int]) -> None:
    """Raises UserError when mesh `sizes` (by axis) do not multiply to the devices, or slices do not divide data."""
    shape = ", ".join(f"{axis}={sizes[axis]}" for axis in AXES)
    product = math.prod(sizes[axis] for axis in AXES)
    if min(sizes[axis] for axis in AXES) < 1 or product != topology.devices:
        raise UserError(
            f"mesh: expected sizes whose product is the {topology.devices} devices of {topology}, got {shape} "
            f"({product}); change config.mesh, for example {_example(topology, sizes)}"
        )
    if sizes["data"] % topology.slices:
        raise UserError(
            f"mesh.data: expected a multiple of the {topology.slices} slices, because only data crosses the slower "
            f"network between them, got {sizes['data']}"
        )


def _example(topology: Topology, sizes: Mapping[str, int]) -> str:
    """The same context and tensor where they fit, and what is left as fsdp."""
    left, words = topology.devices // topology.slices, []
    for axis in ("tensor", "context"):
        size = math.gcd(max(sizes[axis], 1), left)
        left //= size
        words.append(f"{axis}={size}")
    return ", ".join([f"data={topology.slices}", f"fsdp={left}", *reversed(words)])


@functools.lru_cache(maxsize=8)
def devices_of(topology: Topology):
    """The described devices. Raises UserError without libtpu."""
    return topology.describe().devices


def mesh_of(topology: Topology, sizes: Mapping[str, int]) -> jax.sharding.Mesh:
    """The mesh of `sizes` (by axis) over the described devices, as `make_mesh` has it on such a slice.

    Raises:
        UserError: as check_mesh; or no libtpu.
    """
    check_mesh(topology, sizes)
    return make_mesh(**{axis: sizes[axis] for axis in AXES}, devices=devices_of(topology))


def splits(topology: Topology, *, tensor: tuple[int, ...] = (1,), fixed_data: int | None = None):
    """Yields every mesh (sizes by axis) of powers of two over `topology`, data being the number of slices by
    default."""
    data = topology.slices if fixed_data is None else fixed_data
    left = topology.devices // data
    powers = [2**power for power in range(left.bit_length())]
    for context, model in itertools.product(powers, tensor):
        if left % (context * model) == 0:
            yield dict(data=data, fsdp=left // (context * model), context=context, tensor=model)
