"""How a model's step is split over a mesh: the choices of `config.parallel`, resolved."""

import dataclasses

from jax.sharding import Mesh

from stepdr_jax.models import qwen2
from stepdr_jax.sharding import rules
from stepdr_jax.sharding.placement import Placement


@dataclasses.dataclass(frozen=True)
class Parallel:
    """How a step is split over a mesh; the default is one device. Fields as in `config.parallel`, "auto" resolved;
    `reason` says why so."""

    mesh: Mesh | None = None
    strategy: str = "none"
    reason: str = ""
    zigzag: bool = False
    attention: str = "auto"
    remat: str = "none"
    vocab_tiles: int = 1

    def placement(self, config: qwen2.Qwen2Config) -> Placement:
        """What one device needs to know inside shard_map."""
        if self.mesh is None or self.mesh.size == 1:
            return Placement(attention=self.attention)
        specs = rules.param_specs(qwen2.param_shapes(config), self.mesh)
        layers = {name: axes[1:] for name, axes in specs.pop("layers").items()}  # the scan takes the layer axis off
        sizes = tuple((axis, size) for axis, size in self.mesh.shape.items() if size > 1)
        return Placement(sizes, tuple((specs | layers).items()), self.strategy, self.zigzag, self.attention)


ONE_DEVICE = Parallel()
