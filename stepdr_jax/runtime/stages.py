"""The stages of a run: one row each, in the order in which they run. Every other list of stages is derived from it.

A new stage is one row here, a section of its name in the config if it trains, and the script that its command starts.
This module does not import jax: configs, --help, the report and the terminal dashboard read it.
"""

import dataclasses
import shlex
from collections.abc import Callable
from typing import Literal

from ml_collections import ConfigDict

from stepdr_jax.errors import UserError

INIT = "init"  # where the first stage starts: config.initial_checkpoint, or random parameters without one
INIT_TITLE = "Untrained"


@dataclasses.dataclass(frozen=True)
class Stage:
    """One stage.

    Attributes:
        name: its folder in the run directory, its section of the config, its name on the command line.
        title: for people.
        command: what follows `python -m`: a module and arguments.
        output: the file whose presence proves that the stage finished, relative to the folder of the seed, or of the
            run when the stage is `shared`.
        program: "train" is `training.loop`, "ppo" is `rl.loop`; "other" writes no metrics.jsonl.
        parent: the stage whose parameters it starts from; "" when it trains nothing.
        unit: of its progress, "step" or "iteration" (numbered from 0); "" when it writes no metrics.jsonl.
        seconds: it took on two cores with configs/miniature.py.
        work: amount of work in a config; the estimate of its time is proportional to it.
        shared: it runs once for all training seeds.
        planned: the quickstart runs it.
        policy: its parameters answer questions: launch.evaluate measures them, launch.research can ask them.
    """

    name: str
    title: str
    command: str
    output: str
    program: Literal["train", "ppo", "other"] = "other"
    parent: str = ""
    unit: Literal["step", "iteration", ""] = ""
    seconds: float = 5.0
    work: Callable[[ConfigDict], float] = lambda config: 1.0
    shared: bool = False
    planned: bool = True
    policy: bool = False


def _tokens(name: str) -> Callable[[ConfigDict], float]:
    return lambda config: config[name].steps * config[name].batch_size * config[name].seq_len


def _training(name: str, title: str, command: str, parent: str, seconds: float) -> Stage:
    return Stage(
        name,
        title,
        command,
        f"{name}/done.json",
        program="train",
        parent=parent,
        unit="step",
        seconds=seconds,
        work=_tokens(name),
        policy=True,
    )


def _episodes(config: ConfigDict) -> float:
    return config.ppo.iterations * config.ppo.prompts_per_iteration * config.ppo.samples_per_prompt


def _tasks(config: ConfigDict) -> float:
    return config.synthesis.tasks_per_entity


def _copies(config: ConfigDict) -> float:
    return _tasks(config) * (config.synthesis.document_copies + config.synthesis.trajectory_copies)


_PPO = dict(program="ppo", parent="sft", unit="iteration", work=_episodes)

STAGES: tuple[Stage, ...] = (
    Stage("offline_web", "Offline web", "launch.offline_web", "world/sites.json", shared=True),
    Stage("synthesize", "Synthesis", "launch.synthesize", "corpus/card.json", seconds=25, work=_tasks, shared=True),
    Stage(
        "build_data", "Data preparation", "launch.build_data", "data/card.json", seconds=55, work=_copies, shared=True
    ),
    _training("midtrain1", "Mid-training I", "launch.midtrain --stage=midtrain1", INIT, 90),
    _training("midtrain2", "Mid-training II", "launch.midtrain --stage=midtrain2", "midtrain1", 85),
    _training("sft", "SFT", "launch.sft", "midtrain2", 45),
    Stage("ppo", "PPO", "launch.ppo", "ppo/done.json", seconds=160, policy=True, **_PPO),
    Stage("ppo_replay", "PPO, replayed", "launch.ppo --replay", "ppo_replay/done.json", planned=False, **_PPO),
    Stage(
        "evaluate",
        "Evaluation",
        "launch.evaluate",
        "eval/ppo.jsonl",
        seconds=25,
        work=lambda config: config.eval.tasks * config.eval.samples,
    ),
    Stage("report", "Report", "launch.report", "report.html", shared=True),
)


def stage_named(name: str) -> Stage:
    """The row of a stage. Raises UserError for a name that has none."""
    for stage in STAGES:
        if stage.name == name:
            return stage
    raise UserError(f"expected a stage among {', '.join(stage.name for stage in STAGES)}, got {name!r}")


def trained() -> tuple[str, ...]:
    """Names of the stages that `training.loop` trains, in order: those that have packed data."""
    return tuple(stage.name for stage in STAGES if stage.program == "train")


def with_metrics() -> tuple[str, ...]:
    """Names of the stages that write metrics.jsonl, in order."""
    return tuple(stage.name for stage in STAGES if stage.unit)


def policies() -> tuple[str, ...]:
    """Names of the stages whose parameters are a policy that can answer, in order."""
    return tuple(stage.name for stage in STAGES if stage.policy)


def evaluated() -> tuple[str, ...]:
    """What is evaluated on held-out questions, in order: the parameters before training ("init"), then `policies`."""
    return (INIT, *policies())


def run_by(module: str) -> tuple[str, ...]:
    """Names of the stages whose command starts `module`, in order."""
    return tuple(stage.name for stage in STAGES if stage.command.split()[0] == module)


def title_of(name: str) -> str:
    """For people; also of "init"."""
    return INIT_TITLE if name == INIT else stage_named(name).title


def titles() -> dict[str, str]:
    """Name -> title of "init" and every stage that has parameters, in order."""
    return {name: title_of(name) for name in (INIT, *(stage.name for stage in STAGES if stage.parent))}


def parent_of(config: ConfigDict, name: str) -> str:
    """The stage that `name` starts from; "init" for config.first_stage."""
    return INIT if name == config.first_stage else stage_named(name).parent


def command_of(name: str, config: ConfigDict, *arguments: str, seed: int | None = None) -> str:
    """The complete command that runs a stage of the config's run, to be pasted into a shell; `seed`: of another."""
    stage = stage_named(name)
    flags = [] if stage.shared else [f"--config.seed={config.seed if seed is None else seed}"]
    return command_line(shlex.join([*stage.command.split(), *arguments]), config, *flags)


def command_line(words: str, config: ConfigDict, *flags: str) -> str:
    """`python -m WORDS` with the flags that name the config, whose field config_file is its path, and the run."""
    path = config.get("config_file", "")
    named = [f"--config={path}"] if path else []
    return f"python -m {words} {shlex.join([*named, f'--config.run_dir={config.run_dir}', *flags])}"
