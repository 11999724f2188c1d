"""Will a config fit on a TPU slice, and how fast might it be: compiles its programs for the real TPU, without one.

Memory and schedule are the compiler's; times are an estimate (docs/plans.md). Needs libtpu: pip install -e .[tpu]
    python -m launch.plan --config=configs/midtrain_128k.py --topology=v5p:4x4x8
    python -m launch.plan --config=configs/ppo_128k.py --stage=ppo --topology=v5p:4x4x8
"""

import sys
from pathlib import Path

from absl import flags

from launch import entry
from stepdr_jax import files
from stepdr_jax.errors import UserError
from stepdr_jax.runtime import stages

STAGES = (*stages.trained(), "ppo")
_TOPOLOGY = flags.DEFINE_string("topology", "", "TPU slice: v5p:4x4x8, v5p-256, 2xv5p:8x8x8, v6e-64, tpu7x:4x4x4 ...")
_SLICES = flags.DEFINE_integer("slices", 1, "equal slices joined by the data-centre network; axis data crosses it")
_STAGE = flags.DEFINE_string(
    "stage", "", f"one of {', '.join(STAGES)}; empty = the training stage with the longest sequences"
)
_PROGRAMS = flags.DEFINE_string(
    "programs", "train,eval", "of a training stage: programs to compile, separated by commas"
)
_JSON = flags.DEFINE_string("json", "", "file to write the plan to")
_SAVE = flags.DEFINE_string("save", "", "folder for serialized executables; they load on the TPU slice only")
_QUICK = flags.DEFINE_boolean("quick", False, "stop before code is generated: same memory and schedule, in seconds")
_SEARCH = flags.DEFINE_boolean("search", False, "try meshes, remat, strategies and batches; print the Pareto front")
_TRIES = flags.DEFINE_integer("tries", 8, "with --search: how many candidates to compile")
_TABLE = flags.DEFINE_boolean("table", False, "compile every row of docs/plans.md and print its table")
_EPISODE = flags.DEFINE_integer("episode_tokens", 0, "ppo: mean tokens of an episode; 0 = a quarter of the longest")
_SAMPLED = flags.DEFINE_integer("sampled_tokens", 0, "ppo: of these sampled, the others prefilled; 0 = a quarter")
_TIMEOUT = flags.DEFINE_float("timeout", 900.0, "seconds that one compilation may take")
_CACHE = flags.DEFINE_string("cache", "runs/plans", "folder of finished results; empty = none")


def main(config) -> int:
    stage = _STAGE.value or max(stages.trained(), key=lambda name: config[name].seq_len)
    if stage not in STAGES:
        raise UserError(f"--stage: expected one of {', '.join(STAGES)}, got {stage!r}")
    if not _TOPOLOGY.value and not _TABLE.value:
        raise UserError("--topology: expected a TPU slice, for example --topology=v5p:4x4x8")
    from stepdr_jax.aot import (
        plan,
        ppo_plan,
        ppo_report,
        programs,
        report,
        search,
        table,
    )  # after the flags: these import jax
    from stepdr_jax.sharding import topology

    if stage == "ppo" and (_SEARCH.value or _PROGRAMS.present):
        raise UserError("--search and --programs are for training stages; --stage=ppo compiles all programs of PPO")
    named = [word for word in _PROGRAMS.value.split(",") if word]
    unknown = [word for word in named if word not in programs.PROGRAMS]
    if unknown or not named:
        raise UserError(f"--programs: expected some of {', '.join(programs.PROGRAMS)}, got {_PROGRAMS.value!r}")
    settings = plan.Settings(
        quick=_QUICK.value,
        limit=_TIMEOUT.value,
        cache=Path(_CACHE.value) if _CACHE.value else None,
        save=Path(_SAVE.value) if _SAVE.value else None,
    )
    if _TABLE.value and stage == "ppo":
        plans = table.make_ppo(settings, _EPISODE.value, _SAMPLED.value)
        print(
            "\n".join(
                [ppo_report.markdown_header(), *(row for made in plans for row in ppo_report.markdown_rows(made))]
            )
        )
        return _write(plans)
    if _TABLE.value:
        plans = table.make_table(settings)
        print("\n".join([report.markdown_header(), *map(report.markdown_row, plans)]))
        return _write(plans)
    slices = topology.parse(_TOPOLOGY.value, _SLICES.value)
    if _SEARCH.value:
        found = search.search(config, stage, slices, settings, tries=_TRIES.value)
        print(search.text(found))
        return _write(found)
    if stage == "ppo":
        made = ppo_plan.plan(
            config, slices, settings, ppo_plan.Load.from_config(config, _EPISODE.value, _SAMPLED.value)
        )
        print(ppo_report.text(made))
    else:
        made = plan.plan(config, stage, slices, named, settings)
        print(report.text(made))
    _write(made)
    return 0 if made["fits"] else 1


def _write(made) -> int:
    if _JSON.value:
        path = Path(_JSON.value)
        path.parent.mkdir(parents=True, exist_ok=True)
        files.write_json(path, made)
        print(f"written to {path}", file=sys.stderr)
    return 0


if __name__ == "__main__":
    entry.run(main, __doc__)
