"""A step's work under shard_map: parameters and rows in parts, sums over all rows."""

import jax
from jax.sharding import Mesh

from stepdr_jax.sharding import rules

SUMS, GRADIENT, ROWS = "sums", "gradient", "rows"


def on_every_device(local, params, batch: dict, mesh: Mesh, *, gives: str = SUMS):
    """`local(params, batch)` under shard_map on each device's part.

    Args:
        local: sees the parts that `rules` give a device.
        params: parameter tree.
        batch: name -> array[B, T] or [B].
        mesh: of the axes data, fsdp, context and tensor.
        gives: what local returns. SUMS: any tree of sums, which are added over all rows. GRADIENT: (gradient, sums);
            parts of gradients are added over the axes that hold copies of a parameter, the transposes of gathers have
            added them over the others. ROWS: a tree of arrays[B, T] of its own rows.
    """
    specs = rules.param_specs(params, mesh)
    copies = tuple(axis for axis in ("data", "fsdp", "context") if mesh.shape[axis] > 1)

    def summed(axes, g):
        held = {axis for dim in axes for axis in dim}
        return jax.lax.psum(g, tuple(axis for axis in copies if axis not in held))

    def work(params, batch):
        out = local(params, batch)
        if gives == ROWS:
            return out
        if gives == SUMS:
            return jax.lax.psum(out, copies)
        return jax.tree.map(lambda g, axes: summed(axes, g), out[0], specs), jax.lax.psum(out[1], copies)

    partition = jax.tree.map(lambda s: s.spec, rules.param_shardings(params, mesh))
    rows = {name: rules.batch_sharding(mesh, ndim=a.ndim).spec for name, a in batch.items()}
    everywhere = jax.sharding.PartitionSpec()
    outputs = {SUMS: everywhere, GRADIENT: (partition, everywhere), ROWS: rules.batch_sharding(mesh).spec}
    return jax.shard_map(work, mesh=mesh, in_specs=(partition, rows), out_specs=outputs[gives], check_vma=False)(
        params, batch
    )
