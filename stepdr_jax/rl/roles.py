"""Which devices the learner and the sampler work on, where the learner's state is meanwhile, and how it begins.

    placement.sampler = colocated   the sampler works on the first devices of each process, by turns with the learner; it gives
                                its weights and K/V back before the learner begins (`JaxEngine.release`)
    placement.sampler = disaggregated it has the last devices of each process for itself; the learner's mesh is made of the others
    placement.offload = idle        what is not at work is in pinned host memory: the critic while the actor learns, the actor
                                while the critic does, all of the learner while the sampler works by turns with it

A process samples on devices of its own alone; a learner's mesh spans all processes. Numbers do not depend on any of this.
"""

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from stepdr_jax.errors import UserError
from stepdr_jax.models import qwen2
from stepdr_jax.models.qwen2 import Qwen2Config
from stepdr_jax.rl import learner
from stepdr_jax.rl.learner import PPOConfig
from stepdr_jax.runtime import checkpoint, distributed
from stepdr_jax.sharding import memory, rules
from stepdr_jax.sharding.mesh import make_mesh


@dataclasses.dataclass(frozen=True)
class Roles:
    """mesh: the learner's, of all processes. sampler: this process's devices that sample. by_turns: the sampler gives its
    memory back while the learner works. offload: the learner's idle state waits in pinned host memory. transfer_bytes:
    most bytes of weights on their way at once, on one device."""

    mesh: Mesh
    sampler: tuple[jax.Device, ...]
    by_turns: bool
    offload: bool
    transfer_bytes: int

    @classmethod
    def of(cls, config) -> "Roles":
        """Raises UserError for sizes that the devices do not have, naming the fields."""
        section, wanted = config.placement, config.sampler.replicas * config.sampler.tensor
        separate, here = section.sampler == "disaggregated", jax.local_devices()
        if wanted + separate > len(here):
            rest = ", and one for the learner" if separate else ""
            raise UserError(
                f"sampler.replicas * sampler.tensor: expected at most the {len(here)} devices of a process{rest}, "
                f"got {wanted}; lower them, or use placement.sampler=colocated"
            )
        if section.offload == "idle" and not memory.has_host_memory(here[0]):
            raise UserError(
                f"placement.offload: {here[0].device_kind} has no pinned host memory; use placement.offload=none"
            )
        ahead = config.ppo.staleness > 0
        if ahead and not separate and (section.offload == "idle" or len(here) > 1):
            raise UserError(
                "ppo.staleness samples while the learner works: with more than one device, or placement.offload=idle, that "
                "takes devices of its own; set placement.sampler=disaggregated"
            )
        mesh = make_mesh(**config.mesh, devices=_learners(wanted if separate else 0))
        if jax.process_count() > 1 and len({device.process_index for device in mesh.devices.flat}) == 1:
            raise UserError(
                f"config.mesh: expected the devices of all {jax.process_count()} processes, got one; set --config.mesh.*"
            )
        return cls(
            mesh=mesh,
            sampler=tuple(here[-wanted:] if separate else here[:wanted]),
            by_turns=not separate and not ahead,
            offload=section.offload == "idle",
            transfer_bytes=int(section.weight_sync_bucket_gb * 2**30),
        )

    def param_shardings(self, model: Qwen2Config) -> Any:
        """Where the learner has the actor's parameters while they are at work."""
        return rules.param_shardings(qwen2.param_shapes(model), self.mesh)


def _learners(taken: int) -> list[jax.Device]:
    """The devices of all processes, without the last `taken` of each."""
    if not taken:
        return jax.devices()
    by_process: dict[int, list[jax.Device]] = {}
    for device in jax.devices():
        by_process.setdefault(device.process_index, []).append(device)
    return [device for own in by_process.values() for device in own[:-taken]]


def abstract_state(model: Qwen2Config, learning: PPOConfig, mesh: Mesh, *, kind: str = memory.DEVICE) -> dict[str, Any]:
    """The learner's state as jax.ShapeDtypeStruct, split over `mesh`, in memory of `kind`."""

    def placed(shape, sharding):
        return jax.ShapeDtypeStruct(shape.shape, shape.dtype, sharding=sharding.with_memory_kind(kind))

    shapes = jax.eval_shape(lambda: learner.init_state(_zeros(qwen2.param_shapes(model)), learning, jax.random.key(0)))
    return jax.tree.map(placed, shapes, rules.param_shardings(shapes, mesh))


def begin(
    read_actor: Callable[[], dict], model: Qwen2Config, learning: PPOConfig, roles: Roles, directory: Path, seed: int
) -> tuple[dict[str, Any], checkpoint.Restored | None]:
    """(state, checkpoint it is of): the latest of `directory`, else `learner.init_state` of `read_actor()`, where it waits.

    With `offload` it is made part by part, so that no more than one is on the devices. Every process must call it.
    """
    kind = memory.HOST if roles.offload else memory.DEVICE
    restored = checkpoint.restore_checkpoint(directory, abstract_state(model, learning, roles.mesh, kind=kind))
    if restored is not None:
        return restored.tree, restored
    shardings = jax.tree.map(lambda a: a.sharding, abstract_state(model, learning, roles.mesh))
    actor = on_mesh(read_actor(), shardings["params"])
    state = {}
    for parts in [[name] for name in shardings] if roles.offload else [list(shardings)]:
        made = jax.jit(
            lambda actor, key, parts=parts: {name: learner.init_state(actor, learning, key)[name] for name in parts},
            out_shardings={name: shardings[name] for name in parts},
        )(actor, jax.random.key(seed))
        state |= memory.moved(made, kind)
    return state, None


def _zeros(shapes):
    return jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), shapes)


def on_mesh(params: dict, shardings: dict) -> dict:
    """Parameters that are on the mesh, or whole in every process, on the mesh."""
    placed = all(a.sharding == s for a, s in zip(*map(jax.tree.leaves, (params, shardings)), strict=True))
    return params if placed else distributed.place_global(params, shardings)
