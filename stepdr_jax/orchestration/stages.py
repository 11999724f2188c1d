"""The stages of a run in order: the script of each, the file that proves it finished, and how long it should take.

Estimates are the seconds that a stage of configs/miniature.py took on two cores, scaled by the amount of work in the
config at hand and, as stages finish, by how fast this machine turned out to be.
"""

import dataclasses
import hashlib
import json
from collections.abc import Callable, Iterable
from pathlib import Path

from ml_collections import ConfigDict

TRAINING = ("midtrain1", "midtrain2", "sft")


@dataclasses.dataclass(frozen=True)
class Stage:
    """One process of a run. `key` is unique in the run; `output` is relative to the run directory."""

    key: str
    title: str
    module: str
    arguments: tuple[str, ...]
    output: str
    seconds: float
    exact: bool = False  # its own progress line tells the time left of the whole stage


def _tokens(stage: str) -> Callable[[ConfigDict], float]:
    return lambda config: config[stage].steps * config[stage].batch_size * config[stage].seq_len


def _episodes(config: ConfigDict) -> float:
    return config.ppo.iterations * config.ppo.prompts_per_iteration * config.ppo.samples_per_prompt


def _tasks(config: ConfigDict) -> float:
    return config.synthesis.tasks_per_entity


def _copies(config: ConfigDict) -> float:
    return _tasks(config) * (config.synthesis.document_copies + config.synthesis.trajectory_copies)


# name: (seconds on two cores, amount of work those seconds were measured with as a function of the config)
ESTIMATES: dict[str, tuple[float, Callable[[ConfigDict], float]]] = {
    "world": (5, lambda config: 1.0),
    "synthesize": (25, _tasks),
    "build_data": (55, _copies),
    "midtrain1": (90, _tokens("midtrain1")),
    "midtrain2": (85, _tokens("midtrain2")),
    "sft": (45, _tokens("sft")),
    "ppo": (160, _episodes),
    "evaluate": (25, lambda config: config.eval.tasks * config.eval.samples),
    "report": (5, lambda config: 1.0),
}


def plan(config: ConfigDict, reference: ConfigDict, seeds: int = 1) -> list[Stage]:
    """Returns the stages of a run with `seeds` training seeds from config.seed on.

    Args:
        config: the run's config.
        reference: the config the estimates were measured with.
        seeds: data is made once; every seed trains, and is evaluated, by itself.
    """

    def stage(name: str, module: str, output: str, seed: int | None = None, *arguments: str, exact: bool = False):
        seconds, work = ESTIMATES[name]
        return Stage(
            key=name if seed is None else f"seed{seed}.{name}",
            title=name if seed is None or seeds == 1 else f"{name} seed {seed}",
            module=module,
            arguments=(*arguments, *(() if seed is None else (f"--config.seed={seed}",))),
            output=output if seed is None else f"seed{seed}/{output}",
            seconds=seconds * work(config) / max(work(reference), 1e-9),
            exact=exact,
        )

    stages = [
        stage("world", "launch.world", "world/sites.json"),
        stage("synthesize", "launch.synthesize", "corpus/card.json"),
        stage("build_data", "launch.build_data", "data/card.json"),
    ]
    for seed in range(config.seed, config.seed + seeds):
        stages += [
            stage("midtrain1", "launch.midtrain", "midtrain1/done.json", seed, "--stage=midtrain1", exact=True),
            stage("midtrain2", "launch.midtrain", "midtrain2/done.json", seed, "--stage=midtrain2", exact=True),
            stage("sft", "launch.sft", "sft/done.json", seed, exact=True),
            stage("ppo", "launch.ppo", "ppo/done.json", seed, exact=True),
            stage("evaluate", "launch.evaluate", "eval/ppo.jsonl", seed),
        ]
    return [*stages, stage("report", "launch.report", "report.html")]


def fingerprint(config: ConfigDict, stage: Stage) -> str:
    """Identifies what a stage was asked to do; a finished stage with another fingerprint is started again.

    The whole config counts, its seed apart (a stage's own seed is in its key): each script decides itself what a change
    means for it, and a script with nothing to do returns at once.
    """
    settings = json.loads(config.to_json_best_effort())
    for name in ("seed", "config_file"):
        settings.pop(name)
    text = json.dumps([settings, stage.key, stage.arguments], sort_keys=True)
    return hashlib.blake2b(text.encode(), digest_size=8).hexdigest()


def finished(run_dir: Path, stage: Stage, mark: str, ledger: dict) -> bool:
    """Whether the ledger says that the stage finished with these settings and its output is still there."""
    return ledger.get(stage.key, {}).get("fingerprint") == mark and (run_dir / stage.output).exists()


def pace(done: Iterable[tuple[float, float]]) -> float:
    """How much slower than the estimates this machine is: `done` holds (estimated, actual) seconds of finished stages.

    Ten estimated seconds at the estimates' own pace are added, so that one tiny stage does not decide.
    """
    pairs = list(done)
    return (10 + sum(actual for _, actual in pairs)) / (10 + sum(estimated for estimated, _ in pairs))
