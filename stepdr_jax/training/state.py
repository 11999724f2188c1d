"""Where training starts and what it leaves: initial parameters of a stage, finished parameters of any stage.

Initialisation precedence: midtrain1 starts from random parameters of (config.model, seed); midtrain2 from the end of
midtrain1; sft from the end of midtrain2; ppo from the end of sft. All of one seed.
"""

import dataclasses
from pathlib import Path

import jax
import numpy as np
import optax

from stepdr_jax import files
from stepdr_jax.errors import UserError
from stepdr_jax.models import qwen2
from stepdr_jax.sharding import rules
from stepdr_jax.training import checkpoint
from stepdr_jax.training.step import TrainState, empty_window

PARENT = {"midtrain1": "init", "midtrain2": "midtrain1", "sft": "midtrain2", "ppo": "sft"}
COMMAND = {
    "midtrain1": "python -m launch.midtrain --stage=midtrain1",
    "midtrain2": "python -m launch.midtrain --stage=midtrain2",
    "sft": "python -m launch.sft",
    "ppo": "python -m launch.ppo",
}


def stage_dir(config, seed: int, stage: str) -> Path:
    return Path(config.run_dir) / f"seed{seed}" / stage


def vocab_size(config) -> int:
    """Of the run's tokenizer. Raises UserError when it does not exist yet."""
    from stepdr_jax.tokens.tokenizer import Tokenizer  # here: trained stages know their vocabulary without it

    return Tokenizer.load(Path(config.run_dir) / "tokenizer" / "tokenizer.json").vocab_size


def initial_params(model: qwen2.Qwen2Config, seed: int) -> dict:
    """Random parameters; the same for the same seed whatever the mesh."""
    return jax.jit(qwen2.init_params, static_argnums=0)(model, jax.random.key(seed))


def load_params(config, seed: int, stage: str) -> dict:
    """Parameters at the end of a stage, on the default device.

    Args:
        config: the run's config; its model section must be the one the stage was trained with.
        seed: training seed.
        stage: init, midtrain1, midtrain2, sft or ppo.

    Raises:
        UserError: when the stage has not finished, its checkpoints are damaged, or its model is another.
    """
    if stage == "init":
        return initial_params(qwen2.Qwen2Config.from_config(config.model, vocab_size(config)), seed)
    home = stage_dir(config, seed, stage)
    if not (home / "done.json").exists():
        raise UserError(
            f"stage {stage} of seed {seed} is not finished in {home}; "
            f"run {COMMAND[stage]} --config.run_dir={config.run_dir} --config.seed={seed} first"
        )

    def abstract(metadata):
        model = qwen2.Qwen2Config(**metadata["model"])
        for name, ours in dict(config.model).items():
            theirs = getattr(model, name)
            if name not in ("dtype", "param_dtype") and theirs != ours:
                raise UserError(
                    f"{home} was trained with model.{name} = {theirs}, this config has {ours}; "
                    "give the config it was trained with, or another run_dir"
                )
        device = jax.sharding.SingleDeviceSharding(jax.devices()[0])
        return {
            "params": jax.tree.map(
                lambda s: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=device), qwen2.param_shapes(model)
            )
        }

    restored = checkpoint.restore(home / "checkpoints", abstract)
    if restored is None:
        raise UserError(
            f"{home} says done but has no checkpoint; delete {home} and run {COMMAND[stage]} "
            f"--config.run_dir={config.run_dir} --config.seed={seed}"
        )
    params = restored.tree["params"]
    if checkpoint.params_sha256(params) != files.read_json(home / "done.json")["params_sha256"]:
        raise UserError(
            f"the last checkpoint of {home} is damaged, what is left is of step {restored.step}; delete "
            f"{home / 'done.json'} and run {COMMAND[stage]} --config.run_dir={config.run_dir} --config.seed={seed}: "
            "it continues from there"
        )
    return params


def start_of(config, stage: str, model: qwen2.Qwen2Config) -> tuple[dict, str]:
    """(parameters a training stage starts from, a name for them that changes when they do)."""
    parent = PARENT[stage]
    if parent == "init":
        return initial_params(model, config.seed), f"init seed {config.seed}"
    params = load_params(config, config.seed, parent)
    done = files.read_json(stage_dir(config, config.seed, parent) / "done.json")
    return params, f"{parent} {done['params_sha256'][:16]}"


def new_state(params: dict, optimizer: optax.GradientTransformation, num_sources: int) -> TrainState:
    """State at step 0."""
    return TrainState(np.zeros((), np.int32), params, optimizer.init(params), empty_window(num_sources))


def state_shardings(state: TrainState, mesh: jax.sharding.Mesh) -> TrainState:
    """NamedSharding for each leaf: parameters and moments by rule, scalars and sums replicated."""
    everywhere = rules.replicated(mesh)
    return TrainState(
        step=everywhere,
        params=rules.param_shardings(state.params, mesh),
        optimizer=rules.param_shardings(state.optimizer, mesh),
        window=jax.tree.map(lambda _: everywhere, state.window),
    )


def as_tree(state: TrainState) -> dict:
    """The dict that a checkpoint holds."""
    return {field.name: getattr(state, field.name) for field in dataclasses.fields(state)}
