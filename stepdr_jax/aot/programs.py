"""Which programs a config has. Each is (jitted function, abstract arguments), ready to lower for any mesh.

To add one (PPO's, the sampler's): a builder here with the signature of `_train`, and its line in PROGRAMS.
"""

from collections.abc import Callable

import jax
from ml_collections import ConfigDict

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


def build(name: str, config: ConfigDict, stage: str, mesh: jax.sharding.Mesh) -> Built:
    """The program `name` of a stage on `mesh`; nothing is allocated.

    Raises:
        UserError: a size that does not divide; the message names the field.
    """
    return PROGRAMS[name](config, stage, mesh)
