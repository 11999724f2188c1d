"""Which settings a stage's numbers depend on, and the refusal to continue a run with others."""

import dataclasses
import json
from pathlib import Path

from stepdr_jax import files
from stepdr_jax.errors import UserError
from stepdr_jax.models.qwen2 import Qwen2Config
from stepdr_jax.training import state

# These change when a run stops, logs and how it computes, not what it computes.
FREE = ("checkpoint_every", "keep_checkpoints", "loss_chunk", "heldout_every", "guard.max_rollbacks")


def of(config, stage: str, model: Qwen2Config, fingerprint: str) -> dict:
    """Field -> value of all that decides a stage's numbers: kept beside it and compared on every start.

    Args:
        config: the run's config.
        stage: midtrain1, midtrain2 or sft.
        model: with its vocabulary.
        fingerprint: of the data.
    """
    section = json.loads(config[stage].to_json_best_effort())
    section |= {f"guard.{name}": value for name, value in section.pop("guard").items()}
    flat = {f"{stage}.{name}": value for name, value in section.items() if name not in FREE}
    flat |= {f"model.{name}": value for name, value in dataclasses.asdict(model).items()}
    flat["seed"] = config.seed
    flat["data"] = fingerprint
    parent = state.parent_of(config, stage)
    flat["initial_checkpoint"] = config.initial_checkpoint if parent == "init" else ""
    if parent != "init":
        flat[parent] = files.read_json(state.stage_dir(config, config.seed, parent) / "done.json")["params_sha256"]
    return flat


def require_parent(config, stage: str) -> None:
    """Raises UserError when the stage that `stage` starts from is not finished."""
    parent = state.parent_of(config, stage)
    if parent == "init":
        return
    home = state.stage_dir(config, config.seed, parent)
    if not (home / "done.json").exists():
        raise UserError(
            f"stage {stage} starts from {parent}, which is not finished in {home}; run {state.COMMAND[parent]} "
            f"--config.run_dir={config.run_dir} --config.seed={config.seed} first, or start {stage} from "
            f"--config.initial_checkpoint=DIR with --config.first_stage={stage}"
        )


def require_same(before: dict, asked: dict, home: Path) -> None:
    """Raises UserError for the first field in which two results of `of` differ."""
    for name in sorted(before.keys() | asked.keys()):
        old, new = before.get(name), asked.get(name)
        if old == new:
            continue
        if name == "data":
            what = "was trained on other data than the run directory has now"
        elif name in state.COMMAND:
            what = f"started from another {name} than the run directory has now"
        else:
            what = f"was made with {name} = {old}, this config has {new}"
        raise UserError(f"{home} {what}; choose another --config.run_dir, or delete {home} to train this stage again")
