"""Where training starts and what it leaves: initial parameters of a stage, finished parameters of any stage.

Initialisation precedence: config.first_stage (midtrain1) starts from config.initial_checkpoint where there is one (Qwen2.5, converted), else
from random parameters of (config.model, seed); midtrain2 from the end of midtrain1; sft from the end of midtrain2; ppo from the end of sft. All of one seed.
"""

import dataclasses
from pathlib import Path

import jax
import numpy as np
import optax

from stepdr_jax import files
from stepdr_jax.errors import UserError
from stepdr_jax.models import qwen2
from stepdr_jax.runtime import checkpoint, storage
from stepdr_jax.sharding import rules
from stepdr_jax.training import guards
from stepdr_jax.training.step import TrainState, empty_window

PARENT = {"midtrain1": "init", "midtrain2": "midtrain1", "sft": "midtrain2", "ppo": "sft"}
COMMAND = {
    "midtrain1": "python -m launch.midtrain --stage=midtrain1",
    "midtrain2": "python -m launch.midtrain --stage=midtrain2",
    "sft": "python -m launch.sft",
    "ppo": "python -m launch.ppo",
}


def parent_of(config, stage: str) -> str:
    """The stage that `stage` starts from; "init" is config.initial_checkpoint, or random parameters without one."""
    return "init" if stage == config.first_stage else PARENT[stage]


def stage_dir(config, seed: int, stage: str) -> Path:
    return Path(config.run_dir) / f"seed{seed}" / stage


def kept_in(config, home: Path) -> Path | storage.BucketPath:
    """What holds the "checkpoints" and "milestones" of the stage whose folder is `home`: that, or its like in
    config.checkpointing.directory, a folder or a bucket. Raises UserError when the field is neither."""
    if not config.checkpointing.directory:
        return home
    return storage.location(config.checkpointing.directory) / home.parent.name / home.name


def require_place(config, home: Path) -> None:
    """Raises UserError when the checkpoints of the stage at `home` lie elsewhere than config.checkpointing.directory says.

    They may have been moved: a place that has some is taken.
    """
    before = _place_before(home)
    if before is None or before == _place(config) or checkpoint.steps(kept_in(config, home) / "checkpoints"):
        return
    there = noted_place(home) / "checkpoints"
    if checkpoint.steps(there):
        raise UserError(
            f"the checkpoints of {home} lie in {there}, there are none in {kept_in(config, home)}; give "
            f"--config.checkpointing.directory={before!r} to continue it"
        )


def found_in(config, home: Path) -> Path | storage.BucketPath:
    """`kept_in` for who only reads: where there is nothing, the place that the stage noted."""
    kept = kept_in(config, home)
    return kept if checkpoint.steps(kept / "checkpoints") else noted_place(home)


def note_place(config, home: Path) -> None:
    """Writes down where a stage's checkpoints lie, for `require_place`."""
    if _place_before(home) != _place(config):
        files.write_json(home / "place.json", {"checkpointing.directory": _place(config)})


def noted_place(home: Path) -> Path | storage.BucketPath:
    """What `kept_in` was when the stage at `home` last began."""
    before = _place_before(home)
    return storage.location(before) / home.parent.name / home.name if before else home


def _place(config) -> str:
    return str(storage.location(config.checkpointing.directory)) if config.checkpointing.directory else ""


def _place_before(home: Path) -> str | None:
    """Empty is `home` itself, as in stages that never had the field; None is a stage that has not begun."""
    if (home / "place.json").exists():
        return files.read_json(home / "place.json")["checkpointing.directory"]
    return "" if (home / "settings.json").exists() else None


def milestone_dir(kept: Path | storage.BucketPath, step: int) -> Path | storage.BucketPath:
    """Where a stage lays down its parameters of `step` for evaluation: one checkpoint, never written again.

    Args:
        kept: from `kept_in`.
    """
    return kept / "milestones" / f"{step:08d}"


def milestones(kept: Path | storage.BucketPath) -> list[int]:
    """Steps at which a stage has laid down its parameters, in increasing order."""
    found = storage.below(kept / "milestones")
    return [step for step in found if checkpoint.steps(milestone_dir(kept, step))]


def vocab_size(config) -> int:
    """Rows of the embedding: the run's tokenizer's ids, or as many as config.initial_checkpoint has (Qwen2.5 pads).

    Raises UserError when there is no tokenizer yet, or more ids than rows.
    """
    from stepdr_jax.tokens.tokenizer import Tokenizer  # here: trained stages know their vocabulary without it

    path = Path(config.run_dir) / "tokenizer" / "tokenizer.json"
    ids = Tokenizer.load(path).vocab_size
    if not config.initial_checkpoint:
        return ids
    rows = checkpoint.latest_metadata(config.initial_checkpoint)["model"]["vocab_size"]
    if rows < ids:
        raise UserError(
            f"initial_checkpoint: {config.initial_checkpoint} has {rows} words, {path} has {ids}; set tokenizer.path to "
            "the tokenizer.json beside the checkpoint"
        )
    return rows


def initial_params(model: qwen2.Qwen2Config, seed: int, shardings: dict | None = None) -> dict:
    """Random parameters; the same for the same seed whatever the mesh. With `shardings` each device makes its part."""
    return jax.jit(qwen2.init_params, static_argnums=0, out_shardings=shardings)(model, jax.random.key(seed))


def done_of(config, seed: int, stage: str) -> dict:
    """done.json of a stage. Raises UserError when it has not finished."""
    home = stage_dir(config, seed, stage)
    if not (home / "done.json").exists():
        raise UserError(
            f"stage {stage} of seed {seed} is not finished in {home}; "
            f"run {COMMAND[stage]} --config.run_dir={config.run_dir} --config.seed={seed} first"
        )
    return files.read_json(home / "done.json")


def load_params(config, seed: int, stage: str, shardings: dict | None = None) -> dict:
    """Parameters at the end of a stage, placed by `shardings`, else on the default device.

    Args:
        config: the run's config; its model section must be the one the stage was trained with.
        seed: training seed.
        stage: init, midtrain1, midtrain2, sft or ppo; or STAGE@STEP for a milestone of it.
        shardings: tree of NamedSharding, as the parameters.

    Raises:
        UserError: when the stage has not finished, its checkpoints are damaged, or its model is another.
    """
    if stage == "init":
        return _start(config, qwen2.Qwen2Config.from_config(config.model, vocab_size(config)), seed, shardings)
    stage, _, step = stage.partition("@")
    home = stage_dir(config, seed, stage)
    kept = found_in(config, home)
    if step:
        restored = _restore_params(config, milestone_dir(kept, int(step)), shardings)
        if restored is None:
            raise UserError(f"{kept} has no milestone of step {step}; it has {milestones(kept) or 'none'}")
        return restored.tree["params"]
    done = done_of(config, seed, stage)
    restored = _restore_params(config, kept / "checkpoints", shardings)
    if restored is None:
        raise UserError(
            f"{home} says done but {kept} has no checkpoint; delete {home} and run {COMMAND[stage]} "
            f"--config.run_dir={config.run_dir} --config.seed={seed}"
        )
    params = restored.tree["params"]
    if checkpoint.params_sha256(params) != done["params_sha256"]:
        raise UserError(
            f"the last checkpoint of {home} is damaged, what is left is of step {restored.step}; delete "
            f"{home / 'done.json'} and run {COMMAND[stage]} --config.run_dir={config.run_dir} --config.seed={seed}: "
            "it continues from there"
        )
    return params


def start_of(config, stage: str, model: qwen2.Qwen2Config, shardings: dict | None = None) -> dict:
    """Parameters that a training stage starts from."""
    parent = parent_of(config, stage)
    if parent == "init":
        return _start(config, model, config.seed, shardings)
    return load_params(config, config.seed, parent, shardings)


def _start(config, model: qwen2.Qwen2Config, seed: int, shardings: dict | None) -> dict:
    if not config.initial_checkpoint:
        return initial_params(model, seed, shardings)
    checkpoint.latest_metadata(config.initial_checkpoint)
    return _restore_params(config, storage.location(config.initial_checkpoint), shardings).tree["params"]


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

    return checkpoint.restore(directory, abstract)


def new_state(params: dict, optimizer: optax.GradientTransformation, num_sources: int) -> TrainState:
    """State at step 0."""
    return TrainState(
        np.zeros((), np.int32), params, optimizer.init(params), guards.empty_norms(), empty_window(num_sources)
    )


def state_shardings(state: TrainState, mesh: jax.sharding.Mesh) -> TrainState:
    """NamedSharding for each leaf: parameters and moments by rule, scalars and sums replicated."""
    everywhere = rules.replicated(mesh)
    return TrainState(
        step=everywhere,
        params=rules.param_shardings(state.params, mesh),
        optimizer=rules.param_shardings(state.optimizer, mesh),
        guard=jax.tree.map(lambda _: everywhere, state.guard),
        window=jax.tree.map(lambda _: everywhere, state.window),
    )


def as_tree(state: TrainState) -> dict:
    """The dict that a checkpoint holds."""
    return {field.name: getattr(state, field.name) for field in dataclasses.fields(state)}
