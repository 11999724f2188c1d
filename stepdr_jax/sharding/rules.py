"""Which dimension of which array is split over which mesh axis; the model's mathematics knows nothing of it.

Read beside models/qwen2.py: one field per parameter, with its shape. Kernels are split over fsdp and context on their
first dimension: a slice of it is contiguous in memory, so that gathers and reduce-scatters move whole tiles; context
comes first, which XLA for TPU makes reduce-scatters of throughout (the other order leaves all-reduces). A dimension
is split over the axes of its rule for as long as they divide it (small models on large meshes), so every rule is safe
for every size.
"""

import dataclasses
import functools

import jax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

Axis = str | tuple[str, ...] | None


@dataclasses.dataclass(frozen=True)
class ShardingRules:
    """Logical placement; each entry names the mesh axis of one dimension."""

    embedding: tuple[Axis, ...] = ("fsdp", "context")  # V D; see Placement.embed
    unembedding: tuple[Axis, ...] = (("tensor", "context", "fsdp"), None)  # V D
    final_norm: tuple[Axis, ...] = (None,)  # D
    attention_norm: tuple[Axis, ...] = (None, None)  # L D
    q_kernel: tuple[Axis, ...] = (None, ("context", "fsdp"), "tensor")  # L D H*K
    q_bias: tuple[Axis, ...] = (None, "tensor")  # L H*K
    k_kernel: tuple[Axis, ...] = (None, ("context", "fsdp"), "tensor")  # L D N*K
    k_bias: tuple[Axis, ...] = (None, "tensor")  # L N*K
    v_kernel: tuple[Axis, ...] = (None, ("context", "fsdp"), "tensor")  # L D N*K
    v_bias: tuple[Axis, ...] = (None, "tensor")  # L N*K
    output_kernel: tuple[Axis, ...] = (None, ("tensor", "context", "fsdp"), None)  # L H*K D
    mlp_norm: tuple[Axis, ...] = (None, None)  # L D
    gate_kernel: tuple[Axis, ...] = (None, ("context", "fsdp"), "tensor")  # L D F
    up_kernel: tuple[Axis, ...] = (None, ("context", "fsdp"), "tensor")  # L D F
    down_kernel: tuple[Axis, ...] = (None, ("tensor", "context", "fsdp"), None)  # L F D
    value_kernel: tuple[Axis, ...] = (None,)  # D
    value_bias: tuple[Axis, ...] = ()
    batch: tuple[Axis, ...] = (("data", "fsdp"), "context")  # B T
    rows: tuple[Axis, ...] = (("data", "fsdp"),)  # B

    def __post_init__(self):
        for field in dataclasses.fields(self):
            used = [a for axis in getattr(self, field.name) for a in ((axis,) if isinstance(axis, str) else axis or ())]
            if len(used) != len(set(used)):
                raise ValueError(f"expected each mesh axis once in rule {field.name}, got {getattr(self, field.name)}")


def fit(spec: tuple[Axis, ...], shape: tuple[int, ...], mesh: Mesh) -> tuple[tuple[str, ...], ...]:
    """Mesh axes of each dimension of an array of `shape`: those of the rule, up to the first that does not divide."""

    def axes_of(axis: Axis, dim: int) -> tuple[str, ...]:
        taken: tuple[str, ...] = ()
        for name in (axis,) if isinstance(axis, str) else axis or ():
            if dim % mesh.shape[name]:
                break
            dim //= mesh.shape[name]
            taken += (name,)
        return taken

    return tuple(axes_of(axis, dim) for axis, dim in zip(spec, shape, strict=True))


def _partition(axes: tuple[tuple[str, ...], ...]) -> PartitionSpec:
    return PartitionSpec(*(a if len(a) > 1 else a[0] if a else None for a in axes))


def param_specs(params, mesh: Mesh, rules: ShardingRules = ShardingRules()):
    """The mesh axes of each dimension of each leaf, as `fit` has them; see `param_shardings`."""

    def leaf(path, value):
        if value.ndim == 0:
            return ()
        names = [key.key for key in path if isinstance(key, jax.tree_util.DictKey)]
        if not names or not hasattr(rules, names[-1]):
            raise KeyError(f"no sharding rule for parameter {jax.tree_util.keystr(path)}; add a field to ShardingRules")
        return fit(getattr(rules, names[-1]), value.shape, mesh)

    return jax.tree_util.tree_map_with_path(leaf, params)


def param_shardings(params, mesh: Mesh, rules: ShardingRules = ShardingRules()):
    """NamedSharding for each leaf of `params` (arrays or ShapeDtypeStruct), by the last key of its path.

    Works for anything that mirrors the parameter tree, such as Adam's moments; a scalar is replicated.

    Raises:
        KeyError: when a leaf with dimensions has no rule.
    """

    specs = param_specs(params, mesh, rules)
    return jax.tree.map(lambda _, axes: NamedSharding(mesh, _partition(axes)), params, specs)


@functools.lru_cache
def batch_sharding(mesh: Mesh, rules: ShardingRules = ShardingRules(), *, ndim: int = 2) -> NamedSharding:
    """Placement of a batch array: [B, T] when ndim is 2, [B] when it is 1."""
    return NamedSharding(mesh, PartitionSpec(*(rules.batch if ndim == 2 else rules.rows)))


def replicated(mesh: Mesh) -> NamedSharding:
    return NamedSharding(mesh, PartitionSpec())
