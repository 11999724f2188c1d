"""All that decides the numbers of PPO, kept beside it and compared when it is continued."""

import dataclasses
import hashlib
import json
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from stepdr_jax import files
from stepdr_jax.errors import UserError
from stepdr_jax.judge.choose import settings_of
from stepdr_jax.rl.sampling import Parts

# These change when a run ends, saves and how it computes, not what it computes.
FREE = ("iterations", "checkpoint_every", "keep_checkpoints", "max_masked_share", "remat", "guard")


def of(config: ConfigDict, parts: Parts) -> dict[str, Any]:
    """All that decides the numbers of the stage; kept beside it and compared on every start."""

    def flat(section: str) -> dict[str, Any]:
        return {f"{section}.{name}": value for name, value in json.loads(config[section].to_json_best_effort()).items()}

    settings = {name: value for name, value in flat("ppo").items() if name.removeprefix("ppo.") not in FREE}
    settings |= (
        flat("agent")
        | settings_of(config)
        | {f"model.{name}": value for name, value in dataclasses.asdict(parts.model).items()}
    )
    if config.sampler.engine != "jax":  # engines differ in their random numbers and in the last bits of their logits
        settings["sampler.engine"] = config.sampler.engine
    return settings | {"seed": config.seed, "offline_web.as_of": config.offline_web.as_of, "origin": parts.origin}


def mark(config: ConfigDict, asked: dict[str, Any]) -> str:
    """Names all that episodes are a function of: `asked`, and a guard that changes what is learned."""
    guard = config.ppo.guard.to_dict() if config.ppo.guard.action == "skip" else {}
    return hashlib.sha256(json.dumps(asked | guard, sort_keys=True).encode()).hexdigest()


def require_same(home: Path, asked: dict[str, Any], *, begun: bool) -> None:
    """Raises UserError, naming the field, when the stage at `home` has checkpoints (`begun`) made with other settings."""
    if not begun or not (home / "settings.json").exists():
        return
    before = files.read_json(home / "settings.json")
    for name in sorted(before.keys() | asked.keys()):
        if before.get(name) != asked.get(name):
            what = (
                "started from another SFT checkpoint or other tasks than the run directory has now"
                if name == "origin"
                else f"was made with {name} = {before.get(name)}, this config has {asked.get(name)}"
            )
            raise UserError(
                f"{home} {what}; choose another --config.run_dir, or delete {home} to train this stage again"
            )
