"""What the quickstart runs, in order: the stages of `runtime.stages`, shared or for each seed, with time estimates.

Estimates are scaled by the amount of work in the config at hand and, as stages finish, by how fast this machine turned
out to be.
"""

import dataclasses
import itertools
from collections.abc import Iterable

from ml_collections import ConfigDict

from stepdr_jax.runtime import stages
from stepdr_jax.runtime.layout import RunLayout


@dataclasses.dataclass(frozen=True)
class PlannedStage:
    """One process of a run. `key` is unique in the run; `output` is relative to the run directory."""

    key: str
    title: str
    module: str
    arguments: tuple[str, ...]
    output: str
    seconds: float
    exact: bool = False  # its own progress line tells the time left of the whole stage


def plan(config: ConfigDict, reference: ConfigDict, seeds: int = 1) -> list[PlannedStage]:
    """Returns the stages of a run with `seeds` training seeds from config.seed on.

    Args:
        config: the run's config.
        reference: the config the estimates were measured with.
        seeds: shared stages run once; every seed trains, and is evaluated, by itself.
    """

    def planned(stage: stages.Stage, seed: int) -> PlannedStage:
        module, *arguments = stage.command.split()
        return PlannedStage(
            key=stage.name if stage.shared else f"seed{seed}.{stage.name}",
            title=stage.name if stage.shared or seeds == 1 else f"{stage.name} seed {seed}",
            module=module,
            arguments=(*arguments, *(() if stage.shared else (f"--config.seed={seed}",))),
            output=stage.output if stage.shared else f"seed{seed}/{stage.output}",
            seconds=stage.seconds * stage.work(config) / max(stage.work(reference), 1e-9),
            exact=bool(stage.unit),
        )

    out = []
    rows = (stage for stage in stages.STAGES if stage.planned)
    for shared, group in itertools.groupby(rows, key=lambda stage: stage.shared):
        group = list(group)
        for seed in range(config.seed, config.seed + (1 if shared else seeds)):
            out += [planned(stage, seed) for stage in group]
    return out


def finished(layout: RunLayout, stage: PlannedStage, fingerprint: str, ledger: dict) -> bool:
    """Whether the ledger says that the stage finished with these settings and its output is still there."""
    return ledger.get(stage.key, {}).get("fingerprint") == fingerprint and (layout.root / stage.output).exists()


def pace(done: Iterable[tuple[float, float]]) -> float:
    """How much slower than the estimates this machine is: `done` holds (estimated, actual) seconds of finished stages.

    Ten estimated seconds at the estimates' own pace are added, so that one tiny stage does not decide.
    """
    pairs = list(done)
    return (10 + sum(actual for _, actual in pairs)) / (10 + sum(estimated for estimated, _ in pairs))
