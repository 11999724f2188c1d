"""PPO's programs with abstract arguments: the learner's on its mesh, the sampler's on one replica, the weights' way
between.

They are the functions that `rl.learner` and `engine.scheduler` call, with the static arguments that these give them.
"""

import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from ml_collections import ConfigDict

from stepdr_jax.aot import sampler
from stepdr_jax.engine import weights
from stepdr_jax.errors import UserError
from stepdr_jax.models.qwen2 import Qwen2Config
from stepdr_jax.rl import learner, placement, ppo
from stepdr_jax.sharding import topology
from stepdr_jax.sharding.mesh import AXES, make_mesh

# What each argument of a program is: the buffers that a plan adds up.
ARGUMENTS = {
    "logprobs": ("actor weights", "rows"),
    "values": ("critic weights", "rows"),
    "actor": ("actor weights", "actor gradient", "rows", "actions"),
    "critic": ("critic weights", "critic gradient", "rows", "actions"),
    "update_actor": ("actor weights", "actor moments", "actor gradient"),
    "update_critic": ("critic weights", "critic moments", "critic gradient"),
    "decode": ("sampler weights", "pages", "table", "state", "stop ids"),
    "prefill": ("sampler weights", "pages", "table", "tokens", "start", "count"),
    "transfer": ("part of actor weights", "start"),
}
SAMPLER = ("decode", "prefill")
_ACTIONS = ("weight", "share", "advantage", "old_logprob", "old_value", "return_", "reference_logprob", "importance")


def places(slices: topology.Topology, config: ConfigDict) -> tuple[Mesh, list[jax.Device]]:
    """(the learner's mesh, the devices of one replica of the sampler), on a slice as
    `rl.placement.DevicePlacement` has them there.

    The learner has all devices or, with placement.sampler=disaggregated, those that no host keeps for its own sampler:
    its last ones.

    Raises:
        UserError: the sizes of config.mesh or config.sampler are not those of the slice.
    """
    s, hosts, disaggregated = config.sampler, _hosts(slices), config.placement.sampler == "disaggregated"
    wanted, local = s.replicas * s.tensor, len(hosts[0])
    if wanted + disaggregated > local:
        most = f"at most the {local} devices of a host of {slices}, as a replica lies within a host"
        if disaggregated:
            most = (
                f"fewer than the {local} devices of a host of {slices}, as with placement.sampler=disaggregated the "
                "learner has the others"
            )
        raise UserError(f"sampler.replicas * sampler.tensor: expected {most}, got {wanted}; change config.sampler")
    taken = wanted if disaggregated else 0
    left = [device for host in hosts for device in host[: local - taken]]
    sizes = {axis: config.mesh[axis] for axis in AXES}
    if math.prod(sizes.values()) != len(left):
        shape = ", ".join(f"{axis}={size}" for axis, size in sizes.items())
        whose = f"; the samplers have {taken} of the {local} of each of {len(hosts)} hosts" if disaggregated else ""
        raise UserError(
            f"mesh: expected sizes whose product is the learner's {len(left)} devices of {slices}{whose}, got {shape} "
            f"({math.prod(sizes.values())}); change config.mesh"
        )
    return make_mesh(**sizes, devices=left), hosts[0][local - taken if disaggregated else 0 :][: s.tensor]


def _hosts(slices: topology.Topology) -> list[list]:
    """The devices of each host."""
    hosts: dict[int, list] = {}
    for device in topology.devices_of(slices):
        hosts.setdefault(device.process_index, []).append(device)
    return [hosts[host] for host in sorted(hosts)]


def host_devices(slices: topology.Topology) -> int:
    """Devices of one host."""
    return len(_hosts(slices)[0])


def build_program(name: str, config: ConfigDict, mesh: Mesh, replica: Sequence[jax.Device]):
    """(what has .lower, abstract arguments) of program `name`; nothing is allocated.

    Args:
        name: of ARGUMENTS.
        config: the run's config.
        mesh: the learner's.
        replica: devices of one replica of the sampler.
    """
    model = Qwen2Config.from_config(config.model, config.tokenizer.vocab_size)
    if name in SAMPLER:
        s, layout = config.sampler, sampler.layout_of(config, model, replica)
        max_num_seqs = s.max_num_seqs // (s.pools * s.replicas)
        if name == "decode":
            return sampler.decode(layout, replica[0], max_num_seqs=max_num_seqs, decode_steps=s.decode_steps)
        return sampler.prefill(
            layout, replica[0], prefill_batch=min(s.prefill_batch, max_num_seqs), prefill_chunk=s.prefill_chunk
        )
    learning = learner.PPOConfig.from_config(config, model, mesh)
    state = placement.abstract_state(model, learning, mesh)
    if name == "transfer":
        return _largest_cut(
            state["params"],
            sampler.layout_of(config, model, replica),
            int(config.placement.weight_sync_bucket_gb * 2**30),
        )
    network = "critic" if name in ("values", "critic", "update_critic") else "params"
    params = state[network]
    if name.startswith("update"):
        optimizer = learning.critic_optimizer if network == "critic" else learning.actor_optimizer
        return sampler.Fixed(ppo.apply_gradient, dict(optimizer=optimizer)), (
            params,
            state[f"{network}_moments"],
            params,
        )
    shape = (learning.microbatch_sequences, learning.seq_len)
    rows = dict.fromkeys(("tokens", "positions", "segment_ids", "target"), jax.ShapeDtypeStruct(shape, jnp.int32))
    if learning.order is None:  # actions are gathered; a critic's microbatch has room for all tokens (ppo.pack)
        flat = shape[0] * shape[1]
        rows |= {field: jax.ShapeDtypeStruct((flat,), jnp.int32) for field in ("target", "state")}
    actions = dict.fromkeys(_ACTIONS, jax.ShapeDtypeStruct(rows["target"].shape, jnp.float32))
    program = {
        "logprobs": ppo.logprobs,
        "values": ppo.values,
        "actor": ppo.actor_gradients,
        "critic": ppo.critic_gradients,
    }[name]
    rest = (params, rows, actions) if name in ("actor", "critic") else (rows,)
    return sampler.Fixed(program, dict(settings=learning.settings)), (params, *rest)


def _largest_cut(params, layout, limit: int):
    try:
        every = list(weights.buckets(params, layout, limit))
    except ValueError as error:
        raise UserError(f"placement.weight_sync_bucket_gb: {error}; raise it") from None
    _, program, arguments = max(every, key=lambda found: found[0].count * len(found[0].names))
    return program, arguments


def bytes_by_buffer(name: str, arguments: tuple) -> dict[str, int]:
    """Bytes on one device of each argument of a program, by what it is."""
    return {buffer: _bytes(tree) for buffer, tree in zip(ARGUMENTS[name], arguments, strict=True)}


def _bytes(tree) -> int:
    def leaf(a) -> int:
        sharding = getattr(a, "sharding", None)
        shape = sharding.shard_shape(a.shape) if sharding is not None else a.shape
        return int(np.prod(shape, dtype=np.int64)) * a.dtype.itemsize

    return sum(map(leaf, jax.tree.leaves(tree)))
