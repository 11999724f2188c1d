"""What a run was made from, and the refusal to continue it with something else.

A stage keeps what decides its numbers in settings.json: fields of the config, the parameters it started from, the data.
The fields named below, and sections that decide only how a run computes, are left out and may change.
"""

import dataclasses
import hashlib
import json
from collections.abc import Sequence
from typing import Any

from ml_collections import ConfigDict

from stepdr_jax import configuration, files
from stepdr_jax.errors import UserError
from stepdr_jax.runtime import stages, storage
from stepdr_jax.runtime.layout import RunLayout, StageLayout

TRAINING_MAY_CHANGE = ("checkpoint_every", "keep_checkpoints", "loss_chunk", "heldout_every", "guard.max_rollbacks")
PPO_MAY_CHANGE = ("iterations", "checkpoint_every", "keep_checkpoints", "max_masked_share", "remat", "guard")
# Settings that are digests: what to say of them instead of both values.
DIGESTS = {
    "data": "was trained on other data than the run directory has now",
    "origin": "started from another SFT checkpoint or other tasks than the run directory has now",
}


def training_settings(config: ConfigDict, stage: str, model: Any, data_fingerprint: str) -> dict[str, Any]:
    """All that decides the numbers of a stage of `training.loop`, by dotted name.

    Args:
        config: the run's config.
        stage: one of `stages.trained()`; the stage it starts from has finished.
        model: `models.qwen2.Qwen2Config`, with its vocabulary.
        data_fingerprint: of the packed data.
    """
    section = json.loads(config[stage].to_json_best_effort())
    section |= {f"guard.{name}": value for name, value in section.pop("guard").items()}
    settings = {f"{stage}.{name}": value for name, value in section.items() if name not in TRAINING_MAY_CHANGE}
    settings |= {f"model.{name}": value for name, value in dataclasses.asdict(model).items()}
    settings |= {"seed": config.seed, "data": data_fingerprint}
    parent = stages.parent_of(config, stage)
    settings["initial_checkpoint"] = config.initial_checkpoint if parent == stages.INIT else ""
    if parent != stages.INIT:
        settings[parent] = require_finished(config, parent)["params_sha256"]
    return settings


def ppo_settings(config: ConfigDict, model: Any, judge: dict[str, Any], origin: str) -> dict[str, Any]:
    """All that decides the numbers of PPO, by dotted name.

    Args:
        config: the run's config.
        model: `models.qwen2.Qwen2Config`, with its vocabulary.
        judge: `judge.choose.judge_settings(config)`.
        origin: names the policy it starts from and the tasks.
    """
    ppo, agent = (json.loads(config[section].to_json_best_effort()) for section in ("ppo", "agent"))
    # Engines differ in their random numbers and in the last bits of their logits.
    engine = {} if config.sampler.engine == "jax" else {"sampler.engine": config.sampler.engine}
    return {
        **{f"ppo.{name}": value for name, value in ppo.items() if name not in PPO_MAY_CHANGE},
        **{f"agent.{name}": value for name, value in agent.items()},
        **judge,
        **engine,
        **{f"model.{name}": value for name, value in dataclasses.asdict(model).items()},
        "seed": config.seed,
        "offline_web.as_of": config.offline_web.as_of,
        "origin": origin,
    }


def episodes_fingerprint(config: ConfigDict, settings: dict[str, Any]) -> str:
    """Names all that PPO's episodes are a function of: its `settings`, and a guard that changes what is learned."""
    guard = config.ppo.guard.to_dict() if config.ppo.guard.action == "skip" else {}
    return hashlib.sha256(json.dumps(settings | guard, sort_keys=True).encode()).hexdigest()


def config_fingerprint(config: ConfigDict, key: str, arguments: Sequence[str]) -> str:
    """Names what the quickstart asked of a stage. The whole config counts, apart from its seed and its path.

    Args:
        key: of the stage in the run, with the stage's own seed.
        arguments: of its command.
    """
    settings = json.loads(config.to_json_best_effort())
    for name in ("seed", "config_file"):
        settings.pop(name, None)
    text = json.dumps([settings, key, arguments], sort_keys=True)
    return hashlib.blake2b(text.encode(), digest_size=8).hexdigest()


def require_same_settings(stage: StageLayout, settings: dict[str, Any]) -> None:
    """Raises UserError for the first setting in which `settings` differs from what the stage was begun with.

    Fields of the config come before digests, so that the error names the field that was changed.
    """
    if not stage.settings.exists():
        return
    before = files.read_json(stage.settings)
    names = sorted(before.keys() | settings.keys(), key=lambda name: (_is_digest(name), name == "data", name))
    for name in names:
        if before.get(name) == settings.get(name):
            continue
        what = DIGESTS.get(name, f"started from another {name} than the run directory has now")
        if not _is_digest(name):
            field, old, new = _difference(name, before.get(name), settings.get(name))
            what = f"was made with {field} = {old}, this config has {new}"
        raise UserError(
            f"{stage.directory} {what}; choose another --config.run_dir, or delete {stage.directory} to train this "
            "stage again"
        )


def _is_digest(name: str) -> bool:
    return name in DIGESTS or name in {stage.name for stage in stages.STAGES}


def _difference(name: str, old: Any, new: Any) -> tuple[str, Any, Any]:
    """Dotted name and both values where two values of a setting differ; of two sections of their first entry."""
    if isinstance(old, dict) and isinstance(new, dict):
        entry = min(key for key in old.keys() | new.keys() if old.get(key) != new.get(key))
        return _difference(f"{name}.{entry}", old.get(entry), new.get(entry))
    return name, old, new


def require_finished(config: ConfigDict, name: str, seed: int | None = None) -> dict[str, Any]:
    """done.json of a stage, of the config's seed or another. Raises UserError with its command when there is none."""
    seed = config.seed if seed is None else seed
    stage = RunLayout.from_config(config).stage(name, seed)
    if not stage.done.exists():
        raise UserError(
            f"stage {name} of seed {seed} is not finished in {stage.directory}; "
            f"run {stages.command_of(name, config, seed=seed)} first"
        )
    return files.read_json(stage.done)


def require_parent(config: ConfigDict, name: str) -> None:
    """Raises UserError when the stage that `name` starts from has not finished."""
    parent = stages.parent_of(config, name)
    if parent == stages.INIT:
        return
    stage = RunLayout.from_config(config).stage(parent)
    if not stage.done.exists():
        raise UserError(
            f"stage {name} starts from {parent}, which is not finished in {stage.directory}; run "
            f"{stages.command_of(parent, config)} first, or start {name} from --config.initial_checkpoint=DIR with "
            f"--config.first_stage={name}"
        )


def record_stage(config: ConfigDict, stage: StageLayout, settings: dict[str, Any]) -> None:
    """Writes what a stage is made from, before it begins: settings, location of checkpoints, the whole config."""
    record_location(stage)
    files.write_json(stage.settings, settings)
    configuration.save_config(config, stage.directory)


def record_location(stage: StageLayout) -> None:
    """Writes down where the stage's checkpoints lie, for `require_same_location` and readers with another config."""
    if stage.recorded_root() != stage.checkpoint_root:
        files.write_json(stage.location, {"checkpointing.directory": stage.checkpoint_root})


def require_same_location(stage: StageLayout) -> None:
    """Raises UserError when the stage's checkpoints lie elsewhere than config.checkpointing.directory says.

    They may have been moved: a location that has checkpoints is accepted.
    """
    before = stage.recorded_root()
    if before in (None, stage.checkpoint_root) or storage.saved_steps(stage.checkpoint_dir):
        return
    if storage.saved_steps(stage.recorded().checkpoint_dir):
        raise UserError(
            f"the checkpoints of {stage.directory} lie in {stage.recorded().checkpoint_dir}, there are none in "
            f"{stage.stored}; give --config.checkpointing.directory={before!r} to continue it"
        )
