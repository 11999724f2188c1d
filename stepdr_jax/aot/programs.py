"""Which programs a config has. Each is (jitted function, abstract arguments), ready to lower for any mesh.

Those of training are here, those of PPO in `aot.ppo`.
"""

from collections.abc import Callable, Sequence

import jax
from ml_collections import ConfigDict

from stepdr_jax.aot import ppo
from stepdr_jax.sharding import topology
from stepdr_jax.training import program as training

Built = tuple[jax.stages.Wrapped, tuple]


def _sources(config: ConfigDict, stage: str) -> int:
    return sum(rate > 0 for rate in config[stage].mixture.values())


def _train(config: ConfigDict, stage: str, mesh: jax.sharding.Mesh) -> Built:
    program, state, batch = training.train_program(
        config, stage, mesh, vocab_size=config.tokenizer.vocab_size, num_sources=_sources(config, stage)
    )
    return program, (state, batch)


def _eval(config: ConfigDict, stage: str, mesh: jax.sharding.Mesh) -> Built:
    program, params, batch = training.eval_program(
        config, stage, mesh, vocab_size=config.tokenizer.vocab_size, num_sources=_sources(config, stage)
    )
    return program, (params, batch)


PROGRAMS: dict[str, Callable[[ConfigDict, str, jax.sharding.Mesh], Built]] = {"train": _train, "eval": _eval}


def places(config: ConfigDict, stage: str, slices: topology.Topology) -> tuple[jax.sharding.Mesh, list[jax.Device]]:
    """(the mesh of the stage's programs, the devices of a replica of the sampler, none but for ppo).

    Raises:
        UserError: the sizes are not those of the slice.
    """
    return ppo.places(slices, config) if stage == "ppo" else (topology.mesh_of(slices, config.mesh), [])


def build_program(
    name: str, config: ConfigDict, stage: str, mesh: jax.sharding.Mesh, replica: Sequence[jax.Device] = ()
) -> Built:
    """The program `name` of a stage on `mesh`, or of the sampler on `replica`; nothing is allocated.

    Raises:
        UserError: a size that does not divide; the message names the field.
    """
    if stage == "ppo":
        return ppo.build_program(name, config, mesh, replica)
    return PROGRAMS[name](config, stage, mesh)
