"""The run report: one self-contained HTML file, and its numbers as JSON.

It shows whatever stages exist. Everything is inline, a content security policy forbids requests, and text from episodes
is escaped data only, so the file can be sent and opened offline.
"""

import dataclasses
import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from stepdr_jax import files, records
from stepdr_jax.evaluation import results
from stepdr_jax.pages.render import embed_json
from stepdr_jax.pages.wording import count_of, table
from stepdr_jax.progress import clock
from stepdr_jax.records import RubricSet, Task, Trajectory
from stepdr_jax.reporting import collect, viewer
from stepdr_jax.reporting.collect import Run
from stepdr_jax.reporting.sections import data, evaluation, headline, ppo, training, wording
from stepdr_jax.runtime import stages
from stepdr_jax.runtime.stages import title_of
from stepdr_jax.tokens.tokenizer import Tokenizer

CONTENTS = (
    ("result", "Result"),
    ("data", "Data"),
    ("training", "Training"),
    ("ppo", "PPO"),
    ("evaluation", "Held-out evaluation"),
    ("episodes", "Episodes"),
    ("limits", "Limitations"),
    ("reproduce", "How to reproduce"),
)
PPO_ITERATIONS = 6  # iterations of which the viewer shows episodes, spread over training
TASKS_IN_VIEWER = 40  # evaluated tasks, the same for every stage
TEACHER_EPISODES = 60
EPISODES_PER_ITERATION = 12


def write_report(config: ConfigDict, config_flags: str = "") -> Path:
    """Writes run_dir/report.html and run_dir/report.json; returns the path of the page.

    Args:
        config: only its run_dir decides what is read; the rest is printed.
        config_flags: the --config flags of the command line, repeated in the commands on the page.
    """
    run = collect.collect_run(config.run_dir)
    page, numbers = render_report(run, config, config_flags)
    run.layout.root.mkdir(parents=True, exist_ok=True)
    files.write_json(run.layout.report_json, numbers)
    files.write_atomic(run.layout.report, page)
    return run.layout.report


def render_report(run: Run, config: ConfigDict, config_flags: str = "") -> tuple[str, dict[str, Any]]:
    """Returns the page and its numbers."""

    def command(stage: str) -> str:
        return " ".join(f"python -m {stages.stage_named(stage).command} {config_flags}".split())

    machine, written = collect.describe_machine(), collect.local_time()
    summaries = {stage: results.summary(rows) for stage, rows in run.evaluated.items()}
    breakdowns = {
        stage: {field: results.breakdown(rows, field) for field in ("kind", "lang")}
        for stage, rows in run.evaluated.items()
    }
    differences = evaluation.stage_differences(run)
    verdict = headline.result_sentences(run, differences)
    seconds = stage_seconds(run)
    total = sum(value for key, value in seconds.items() if key != "report")
    episodes = episodes_for_viewer(run)
    context = dict(
        title=_title(config),
        meta=_meta(run, written, total),
        contents=CONTENTS,
        verdict=verdict,
        tiles=headline.tiles(run, summaries, total or None),
        overview=headline.overview(run, summaries),
        timing=_timing(run, seconds),
        machine=_machine_sentence(machine),
        data=data.data_section(run),
        training=training.training_sections(run, command),
        ppo=ppo.ppo_section(run),
        evaluation=evaluation.evaluation_section(run, summaries, differences, breakdowns),
        viewer=dict(
            count=len(episodes),
            first=_first(episodes),
            json=embed_json(episodes),
            vocabulary=embed_json(_vocabulary(run, episodes)),
            sentence=_viewer_sentence(run, episodes),
        ),
        limits=evaluation.LIMITS,
        run_dir=str(config.run_dir),
        commands=["bash launch/quickstart.sh", "", *(command(stage.name) for stage in stages.STAGES if stage.planned)],
        config_text=json.dumps(_plain(config), indent=1, ensure_ascii=False),
        versions=table(["", ""], [[name, value] for name, value in machine.items()], numeric=False),
        command=command,
    )
    page = viewer.render_viewer_page("report.html.j2", context)
    numbers = dict(
        name=config.name,
        written=written,
        machine=machine,
        seeds=run.seeds,
        result=verdict["sentences"],
        improved=verdict["tone"] == "good",
        stage_seconds=seconds,
        data={name: value for name, value in run.data.items() if name != "card"},
        done={str(seed): made for seed, made in run.done.items()},
        evaluation={
            stage: dict(
                summary=summaries[stage],
                by=breakdowns[stage],
                episodes=len(rows),
                missing=results.missing_causes(rows),
            )
            for stage, rows in run.evaluated.items()
        },
        differences={f"{after}-{before}": by_metric for (before, after), by_metric in differences.items()},
        config=_plain(config),
    )
    return page, _json_safe(numbers)


def _plain(config: ConfigDict) -> dict[str, Any]:
    return json.loads(config.to_json_best_effort())


def _json_safe(value: Any) -> Any:
    """Dataclasses as dicts, keys as text, NaN as null."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return _json_safe(dataclasses.asdict(value))
    if isinstance(value, Mapping):
        return {str(key): _json_safe(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_json_safe(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


# ----------------------------------------------------------------------------------------------------------- head


def _title(config: ConfigDict) -> str:
    return (
        "Deep research, the whole recipe in miniature"
        if config.name == "miniature"
        else f"Deep research: {config.name}"
    )


def _meta(run: Run, written: str, total: float) -> str:
    parts = [f"Written {written}"]
    if run.seeds:
        parts.append(f"training {'seeds' if len(run.seeds) > 1 else 'seed'} {', '.join(map(str, run.seeds))}")
    if total:
        parts.append(f"{clock(total)} for all stages" + (f" of {len(run.seeds)} seeds" if len(run.seeds) > 1 else ""))
    return " · ".join(parts)


def _machine_sentence(machine: Mapping[str, str]) -> str:
    parts = [machine.get("processor", ""), f"{machine['cores']} cores", machine.get("memory", ""), machine["system"]]
    parts += [f"Python {machine['python']}"] + [
        f"{name} {machine[name]}" for name in ("jax", "flax") if name in machine
    ]
    if "commit" in machine:
        parts.append(f"commit {machine['commit']}")
    return "Machine that wrote this report: " + ", ".join(part for part in parts if part) + "."


def stage_seconds(run: Run) -> dict[str, float]:
    """Seconds by ledger key ("offline_web", "seed0.sft", ...), from the quickstart's ledger or else from done.json."""
    out = {}
    for seed, made in run.done.items():
        for stage, done in made.items():
            value = next(
                (done[key] for key in ("seconds", "wall_seconds") if isinstance(done.get(key), int | float)), None
            )
            if value is not None:
                out[f"seed{seed}.{stage}"] = float(value)
    return out | {key: float(entry["seconds"]) for key, entry in run.ledger.items() if entry.get("seconds")}


def _timing(run: Run, seconds: Mapping[str, float]) -> dict[str, Any]:
    several = len(run.seeds) > 1
    head = ["Stage", *((f"seed {seed}" for seed in run.seeds) if several else ["Time"]), "Peak memory", "Output"]
    rows = []
    for stage in (stage for stage in stages.STAGES if stage.planned and stage.name != "report"):
        name = stage.name
        keys = [name] if stage.shared else [f"seed{seed}.{name}" for seed in run.seeds] or [name]
        cells = [clock(seconds[key]) if key in seconds else _state(run, key) for key in keys]
        cells += [""] * (max(len(run.seeds), 1) - len(cells))
        peak = max((run.ledger.get(key, {}).get("peak_bytes", 0) for key in keys), default=0)
        rows.append([stage.title, *cells, f"{peak / 1e9:.1f} GB" if peak else "–", _output(run, name)])
    return table(head, rows, numeric=False)


def _state(run: Run, key: str) -> str:
    """The state of a stage whose time is unknown."""
    seed, _, stage = key.rpartition(".")
    if not seed:
        return "done" if (run.layout.root / stages.stage_named(stage).output).exists() else "not run"
    number = int(seed.removeprefix("seed"))
    if stage == "evaluate":
        evaluated = [name for name, rows in run.evaluated.items() if any(row.seed == number for row in rows)]
        return "done" if "ppo" in evaluated else "partial" if evaluated else "not run"
    if stage in run.done.get(number, {}):
        return "done"
    return "partial" if stage in run.curves.get(number, {}) else "not run"


def _output(run: Run, stage: str) -> str:
    found = run.data
    if stage == "offline_web" and found.get("documents"):
        return count_of(found["documents"], "page")
    if stage == "synthesize" and found.get("tasks"):
        kept = found.get("trajectories", {}).get("kept", 0)
        tasks = sum(row["count"] for row in found["tasks"])
        return f"{count_of(tasks, 'task')}, {count_of(kept, 'trajectory', 'trajectories')}"
    if stage == "build_data" and found.get("prepared"):
        return f"{found['prepared']['tokens']:,} tokens"
    if stage == "evaluate" and run.evaluated:
        return count_of(sum(map(len, run.evaluated.values())), "episode")
    curves = run.curves.get(run.first_seed, {}).get(stage)
    if curves and curves.x:
        return wording.progress_text(curves, stages.stage_named(stage).unit)
    return "–"


# --------------------------------------------------------------------------------------------------------- episodes


def episodes_for_viewer(run: Run, max_bytes: int = viewer.MAX_BYTES) -> list[dict[str, Any]]:
    """A bounded sample: the same held-out tasks at every stage, PPO episodes with token detail, and the teacher's."""
    tasks = _by(run.layout.tasks, Task, "id")
    rubrics = _by(run.layout.rubrics, RubricSet, "task_id")
    groups = [*_evaluated(run, tasks, rubrics), *_rollouts(run, tasks, rubrics), _teacher_episodes(run, tasks)]
    return viewer.take_in_turn([group for group in groups if group], max_bytes)


def _by(path: Path, kind: type, field: str) -> dict[str, Any]:
    return {getattr(row, field): row for row in records.read_records(path, kind)} if path.exists() else {}


def _evaluated(run: Run, tasks, rubrics) -> list[list[dict[str, Any]]]:
    if not run.evaluated:
        return []
    last = [row for row in run.evaluated[list(run.evaluated)[-1]] if row.sample == 0 and row.seed == run.first_seed]
    order = viewer.stratify(
        last, lambda row: (row.kind, row.lang, row.correct, row.reward is not None and row.reward >= 1)
    )
    wanted = {row.task_id: rank for rank, row in enumerate(order[:TASKS_IN_VIEWER])}
    groups = []
    for stage, rows in reversed(run.evaluated.items()):
        for seed in run.seeds:
            chosen = [row for row in rows if row.seed == seed and row.sample == 0 and row.task_id in wanted]
            chosen.sort(key=lambda row: wanted[row.task_id])
            groups.append(
                [
                    viewer.evaluated_episode(
                        row, tasks.get(row.task_id), rubrics.get(row.task_id), f"held out, {title_of(stage)}"
                    )
                    for row in (chosen if seed == run.first_seed else chosen[:8])
                ]
            )
    return groups


def _rollouts(run: Run, tasks, rubrics) -> list[list[dict[str, Any]]]:
    """PPO episodes of some iterations, with values and advantages per token."""
    groups = []
    for seed in run.seeds:
        paths = run.iterations.get(seed, [])
        count = min(len(paths), PPO_ITERATIONS if seed == run.first_seed else 2)
        picked = [paths[round(i * (len(paths) - 1) / max(count - 1, 1))] for i in range(count)]
        for file in dict.fromkeys(reversed(picked)):
            rows = viewer.stratify(files.read_jsonl(file), _rollout_stratum)
            rows.sort(key=lambda row: "tokens" not in row)  # few rows have token detail; those come first
            rows = [{"iteration": int(file.stem)} | row for row in rows[:EPISODES_PER_ITERATION]]
            groups.append([viewer.rollout_episode(row, None, seed=seed, tasks=tasks, rubrics=rubrics) for row in rows])
    return groups


def _rollout_stratum(row: Mapping[str, Any]) -> tuple:
    reward = (row.get("verdict") or {}).get("reward")
    return (
        row["trajectory"]["finish"],
        reward is None,
        reward is not None and reward >= 1,
        reward is not None and reward > 0.5,
    )


def _teacher_episodes(run: Run, tasks) -> list[dict[str, Any]]:
    rows = viewer.stratify(
        run.teacher_episodes,
        lambda row: (row.get("capability"), row.get("kept", True), str(row.get("drop_reason"))[:24]),
    )
    return [
        viewer.episode_row(
            Trajectory.model_validate(row), None, where="teacher", seed=None, task=tasks.get(row["task_id"])
        )
        for row in rows[:TEACHER_EPISODES]
    ]


def _vocabulary(run: Run, episodes: list[dict[str, Any]]) -> dict[str, Any]:
    ids = {id_ for row in episodes if "tokens" in row for id_ in row["tokens"]["ids"]}
    path = run.layout.tokenizer
    return viewer.token_texts(ids, Tokenizer.load(path).piece) if ids and path.exists() else {}


def _first(episodes: list[dict[str, Any]]) -> int:
    """The episode to show first: of the last stage, with full reward, with the most steps."""

    def rank(index: int) -> tuple:
        row = episodes[index]
        good = row["outcome"] in ("correct", "full reward") and row.get("reward") == 1
        return (row["where"] == episodes[0]["where"], good, len(row["steps"]))

    return max(range(len(episodes)), key=rank, default=0)


def _viewer_sentence(run: Run, episodes: list[dict[str, Any]]) -> str:
    places = len({row["where"] for row in episodes})
    detailed = sum("tokens" in row for row in episodes)
    sentence = (
        f"{count_of(len(episodes), 'episode')} from {count_of(places, 'place')} in the recipe, a sample that keeps "
        f"this file small; the others are in {run.layout.root}. Citations link to passages that the episode observed."
    )
    if detailed:
        sentence += (
            " Some episodes of PPO iterations also show, for every sampled token, the critic's value, the advantage "
            "and the log-probabilities of sampler and trainer; choose an iteration under “where”. For all PPO episodes "
            "run python -m launch.trajectories."
        )
    return sentence
