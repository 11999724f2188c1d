"""Which devices the learner and the sampler use, where the learner's state rests, and how it is initialized.

    placement.sampler = colocated       the sampler uses the first devices of each process, alternating with the
                                        learner: it frees its weights and K/V before the learner starts
                                        (`JaxEngine.sleep`)
    placement.sampler = disaggregated   the sampler has the last devices of each process; the learner's mesh is made of
                                        the others
    placement.offload = idle            idle state rests in pinned host memory: the critic while the actor learns, the
                                        actor while the critic learns, the whole learner while a colocated sampler works

A process samples on its own devices only; the learner's mesh spans all processes. Results do not depend on any of this.
"""

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from ml_collections import ConfigDict

from stepdr_jax.errors import UserError
from stepdr_jax.models import qwen2
from stepdr_jax.models.qwen2 import Qwen2Config
from stepdr_jax.rl import learner
from stepdr_jax.rl.learner import LearnerState, Params, PPOConfig
from stepdr_jax.runtime import checkpoint, distributed, storage
from stepdr_jax.sharding import memory, rules
from stepdr_jax.sharding.mesh import make_mesh


@dataclasses.dataclass(frozen=True)
class DevicePlacement:
    """Devices and memory of the learner and the sampler.

    mesh: the learner's, over all processes. sampler_devices: of this process. sampler_sleeps: the sampler frees its
    memory while the learner works. offload: the learner's idle state rests in pinned host memory. bucket_bytes: at most
    this many bytes of weights are in transit at once to one device.
    """

    mesh: Mesh
    sampler_devices: tuple[jax.Device, ...]
    sampler_sleeps: bool
    offload: bool
    bucket_bytes: int

    @classmethod
    def from_config(cls, config: ConfigDict) -> "DevicePlacement":
        """Raises UserError for sizes that the devices do not have, naming the fields."""
        section, servers = config.placement, config.sampler.engine != "jax"
        wanted = 0 if servers else config.sampler.replicas * config.sampler.tensor
        disaggregated, local = section.sampler == "disaggregated", jax.local_devices()
        if wanted + disaggregated > len(local):
            learners = ", and one for the learner" if disaggregated else ""
            raise UserError(
                f"sampler.replicas * sampler.tensor: expected at most the {len(local)} devices of a process{learners}, "
                f"got {wanted}; lower them, or use placement.sampler=colocated"
            )
        if section.offload == "idle" and not memory.has_host_memory(local[0]):
            raise UserError(
                f"placement.offload: {local[0].device_kind} has no pinned host memory; use placement.offload=none"
            )
        concurrent = config.ppo.staleness > 0
        if concurrent and not disaggregated and not servers and (section.offload == "idle" or len(local) > 1):
            raise UserError(
                "ppo.staleness samples while the learner works: with more than one device, or "
                "placement.offload=idle, the sampler needs its own devices; set placement.sampler=disaggregated"
            )
        mesh = make_mesh(**config.mesh, devices=_learner_devices(wanted if disaggregated else 0))
        if jax.process_count() > 1 and len({device.process_index for device in mesh.devices.flat}) == 1:
            raise UserError(
                f"config.mesh: expected the devices of all {jax.process_count()} processes, got one; "
                "set --config.mesh.*"
            )
        return cls(
            mesh=mesh,
            sampler_devices=tuple(local[-wanted:] if disaggregated else local[:wanted]),
            sampler_sleeps=not disaggregated and not concurrent,
            offload=section.offload == "idle",
            bucket_bytes=int(section.weight_sync_bucket_gb * 2**30),
        )

    def param_shardings(self, model: Qwen2Config) -> Params:
        """Shardings of the actor's parameters on the learner's mesh."""
        return rules.param_shardings(qwen2.param_shapes(model), self.mesh)


def _learner_devices(reserved: int) -> list[jax.Device]:
    """The devices of all processes, without the last `reserved` of each."""
    if not reserved:
        return jax.devices()
    by_process: dict[int, list[jax.Device]] = {}
    for device in jax.devices():
        by_process.setdefault(device.process_index, []).append(device)
    return [device for own in by_process.values() for device in own[:-reserved]]


def abstract_state(model: Qwen2Config, learning: PPOConfig, mesh: Mesh, *, kind: str = memory.DEVICE) -> dict[str, Any]:
    """The learner's state as a tree of jax.ShapeDtypeStruct, sharded over `mesh`, in memory of `kind`."""

    def leaf(shape: jax.ShapeDtypeStruct, sharding: jax.sharding.NamedSharding) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(shape.shape, shape.dtype, sharding=sharding.with_memory_kind(kind))

    def zeros() -> Params:
        return jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), qwen2.param_shapes(model))

    shapes = jax.eval_shape(lambda: learner.init_state(zeros(), learning, jax.random.key(0)))
    return jax.tree.map(leaf, shapes, rules.param_shardings(shapes, mesh))


def restore_or_init_state(
    read_actor: Callable[[], Params],
    model: Qwen2Config,
    learning: PPOConfig,
    placement: DevicePlacement,
    directory: Path | storage.BucketPath,
    seed: int,
) -> tuple[LearnerState, checkpoint.Restored | None]:
    """(state, checkpoint) of the latest checkpoint in `directory`, else (`learner.init_state` of `read_actor()`, None).

    With `offload` the state is initialized part by part, so that only one part is on the devices at a time. Every
    process must call it.
    """
    kind = memory.HOST if placement.offload else memory.DEVICE
    restored = checkpoint.restore_checkpoint(directory, abstract_state(model, learning, placement.mesh, kind=kind))
    if restored is not None:
        return restored.tree, restored
    shardings = jax.tree.map(lambda a: a.sharding, abstract_state(model, learning, placement.mesh))
    actor = on_mesh(read_actor(), shardings["params"])
    state: LearnerState = {}
    for names in [[name] for name in shardings] if placement.offload else [list(shardings)]:
        part = jax.jit(
            lambda actor, key, names=names: {name: learner.init_state(actor, learning, key)[name] for name in names},
            out_shardings={name: shardings[name] for name in names},
        )(actor, jax.random.key(seed))
        state |= memory.moved(part, kind)
    return state, None


def on_mesh(params: Params, shardings: Params) -> Params:
    """Puts parameters on the mesh, unless they are there. Otherwise every process must have the whole tree."""
    placed = all(a.sharding == s for a, s in zip(*map(jax.tree.leaves, (params, shardings)), strict=True))
    return params if placed else distributed.place_global(params, shardings)
