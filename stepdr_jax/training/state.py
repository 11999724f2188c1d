"""Parameters that a stage starts from, parameters that a stage has left, and the state of training.

config.first_stage starts from config.initial_checkpoint where there is one (Qwen2.5, converted), else from random parameters of
(config.model, seed); every other stage from the end of its parent (`runtime.stages`) of the same seed.
"""

import dataclasses
from pathlib import Path

import jax
import jax.numpy as jnp
import optax

from stepdr_jax.errors import UserError
from stepdr_jax.models import qwen2
from stepdr_jax.runtime import checkpoint, provenance, stages, storage
from stepdr_jax.runtime.layout import RunLayout
from stepdr_jax.sharding import rules
from stepdr_jax.training import guards
from stepdr_jax.training.step import TrainState, empty_window


def vocab_size(config) -> int:
    """Rows of the embedding: the run's tokenizer's ids, or as many as config.initial_checkpoint has (Qwen2.5 pads).

    Raises UserError when there is no tokenizer yet, or more ids than rows.
    """
    from stepdr_jax.tokens.tokenizer import Tokenizer  # here: trained stages know their vocabulary without it

    path = RunLayout.from_config(config).tokenizer
    ids = Tokenizer.load(path).vocab_size
    if not config.initial_checkpoint:
        return ids
    rows = checkpoint.latest_metadata(config.initial_checkpoint)["model"]["vocab_size"]
    if rows < ids:
        raise UserError(
            f"initial_checkpoint: {config.initial_checkpoint} has {rows} tokens, {path} has {ids}; set tokenizer.path to "
            "the tokenizer.json beside the checkpoint"
        )
    return rows


def initial_params(model: qwen2.Qwen2Config, seed: int, shardings: dict | None = None) -> dict:
    """Random parameters; the same for the same seed whatever the mesh. With `shardings` each device makes its part."""
    return jax.jit(qwen2.init_params, static_argnums=0, out_shardings=shardings)(model, jax.random.key(seed))


def load_params(config, seed: int, stage: str, shardings: dict | None = None) -> dict:
    """Parameters at the end of a stage, placed by `shardings`, else on the default device.

    Args:
        config: the run's config; its model section must be the one the stage was trained with.
        seed: training seed.
        stage: "init" or a stage's name; or STAGE@STEP for an evaluation checkpoint of it.
        shardings: tree of NamedSharding, as the parameters.

    Raises:
        UserError: when the stage has not finished, its checkpoints are damaged, or its model is another.
    """
    if stage == stages.INIT:
        return _initial(config, qwen2.Qwen2Config.from_config(config.model, vocab_size(config)), seed, shardings)
    name, _, step = stage.partition("@")
    layout = RunLayout.from_config(config).stage(name, seed).for_reading()
    if step:
        restored = _restore_params(config, layout.eval_checkpoint(int(step)), shardings)
        if restored is None:
            there = layout.eval_steps() or "none"
            raise UserError(f"{layout.stored} has no evaluation checkpoint of step {step}; it has {there}")
        return restored.tree["params"]
    done = provenance.require_finished(config, name, seed)
    again = stages.command_of(name, config, seed=seed)
    restored = _restore_params(config, layout.checkpoint_dir, shardings)
    if restored is None:
        raise UserError(
            f"{layout.done} exists but {layout.checkpoint_dir} has no checkpoint; delete "
            f"{layout.directory} and run {again}"
        )
    params = restored.tree["params"]
    if checkpoint.params_sha256(params) != done["params_sha256"]:
        raise UserError(
            f"the last checkpoint of {layout.directory} is damaged, what is left is of step {restored.step}; "
            f"delete {layout.done} and run {again}: it continues from there"
        )
    return params


def starting_params(config, stage: str, model: qwen2.Qwen2Config, shardings: dict | None = None) -> dict:
    """Parameters that a training stage starts from."""
    parent = stages.parent_of(config, stage)
    if parent == stages.INIT:
        return _initial(config, model, config.seed, shardings)
    return load_params(config, config.seed, parent, shardings)


def _initial(config, model: qwen2.Qwen2Config, seed: int, shardings: dict | None) -> dict:
    if not config.initial_checkpoint:
        return initial_params(model, seed, shardings)
    checkpoint.latest_metadata(config.initial_checkpoint)  # raises when there is none
    restored = _restore_params(config, storage.location(config.initial_checkpoint), shardings)
    assert restored is not None
    return restored.tree["params"]


def _restore_params(config, directory: Path | storage.BucketPath, shardings: dict | None) -> checkpoint.Restored | None:
    """The parameters of the latest checkpoint in `directory`, whose model must be config.model."""

    def abstract(metadata):
        model = qwen2.Qwen2Config(**metadata["model"])
        for name, ours in dict(config.model).items():
            theirs = getattr(model, name)
            if name not in ("dtype", "param_dtype") and theirs != ours:
                raise UserError(
                    f"{directory} is of a model with model.{name} = {theirs}, this config has {ours}; "
                    "give the config it was trained with, or another run_dir"
                )
        shapes = qwen2.param_shapes(model)
        device = jax.sharding.SingleDeviceSharding(jax.devices()[0])
        placed = shardings or jax.tree.map(lambda _: device, shapes)
        return {"params": jax.tree.map(lambda s, p: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=p), shapes, placed)}

    return checkpoint.restore_checkpoint(directory, abstract)


def new_state(params: dict, optimizer: optax.GradientTransformation, num_sources: int) -> TrainState:
    """State at step 0."""
    return TrainState(
        jnp.zeros((), jnp.int32), params, optimizer.init(params), guards.empty_norm_stats(), empty_window(num_sources)
    )


def state_shardings(state: TrainState, mesh: jax.sharding.Mesh) -> TrainState:
    """NamedSharding for each leaf: parameters and moments by rule, scalars and sums replicated."""
    everywhere = rules.replicated(mesh)
    return TrainState(
        step=jax.tree.map(lambda _: everywhere, state.step),
        params=rules.param_shardings(state.params, mesh),
        optimizer=rules.param_shardings(state.optimizer, mesh),
        guard=jax.tree.map(lambda _: everywhere, state.guard),
        window=jax.tree.map(lambda _: everywhere, state.window),
    )


def as_tree(state: TrainState) -> dict:
    """The dict that a checkpoint holds."""
    return {field.name: getattr(state, field.name) for field in dataclasses.fields(state)}
