"""Held-out tasks through the one episode loop: the same tasks, budgets and judge for every stage and seed.

An episode's outcome depends on (checkpoint, task, sampling seed) only, not on what else runs at the same time, so a
killed evaluation continues with the episodes it lacks and ends with the same rows. An episode that our own system broke
is tried once more and then reported as missing, never as 0.
"""

import asyncio
import hashlib
import json
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

from ml_collections import ConfigDict

from stepdr_jax import files, records
from stepdr_jax.agent import runner
from stepdr_jax.agent.budget import Limits
from stepdr_jax.agent.policy import EnginePolicy, Policy
from stepdr_jax.agent.react import Episode
from stepdr_jax.agent.tools import Host, Tools
from stepdr_jax.errors import UserError
from stepdr_jax.evaluation import cost
from stepdr_jax.evaluation.results import Result
from stepdr_jax.judge.choose import judge_settings, make_judge
from stepdr_jax.judge.judges import Judge
from stepdr_jax.judge.scored import Scored, judge_episode
from stepdr_jax.progress import Progress
from stepdr_jax.records import RubricSet, Task, Trajectory, Verdict
from stepdr_jax.runtime import stages, storage
from stepdr_jax.runtime.layout import RunLayout

JUDGE_ATTEMPTS = 2
SAMPLES_PER_TASK = 1000  # sampling seeds set aside for one task, so that more samples later keep the earlier ones


def select_tasks(tasks: Iterable[Task], count: int) -> list[Task]:
    """The held-out tasks to evaluate: `count` of them in the proportions of (kind, language), in a stable order.

    The choice depends on the tasks' ids only, not on their order in the file; within a stratum the order is that of a
    hash, so a stratum's head is not one corner of the alphabet. A smaller count takes a prefix of each stratum.
    """
    heldout = [task for task in tasks if task.split == "heldout"]
    if count < 1:
        raise UserError(f"eval.tasks: expected at least 1, got {count}; change it in the config")
    strata: dict[tuple[str, str], list[Task]] = {}
    for task in heldout:
        strata.setdefault((task.kind, task.lang), []).append(task)
    for members in strata.values():
        members.sort(key=lambda task: hashlib.sha256(task.id.encode()).digest())
    share = min(1.0, count / len(heldout)) if heldout else 0.0
    quota = {key: int(len(members) * share) for key, members in strata.items()}
    remainders = sorted(strata, key=lambda key: (quota[key] - len(strata[key]) * share, key))
    for key in remainders[: min(count, len(heldout)) - sum(quota.values())]:
        quota[key] += 1
    return [task for key in sorted(strata) for task in strata[key][: quota[key]]]


def load_tasks(config: ConfigDict, stage: str = "") -> tuple[list[Task], dict[str, RubricSet]]:
    """The held-out tasks for a stage, or the fewer for an evaluation checkpoint, and their rubric sets by task id."""
    layout = RunLayout.from_config(config)
    count = config.eval.checkpoint_tasks if "@" in stage else config.eval.tasks
    tasks = select_tasks(records.read_records(layout.tasks, Task), count)
    if not tasks:
        raise UserError(f"{layout.tasks} has no held-out task; run {stages.command_of('synthesize', config)} again")
    rubric_sets = {rubrics.task_id: rubrics for rubrics in records.read_records(layout.rubrics, RubricSet)}
    lacking = [task.id for task in tasks if task.id not in rubric_sets]
    if lacking:
        raise UserError(
            f"{layout.rubrics} has no rubrics for held-out task {lacking[0]} ({len(lacking)} lack them); "
            f"run {stages.command_of('synthesize', config)} again"
        )
    return tasks, {task.id: rubric_sets[task.id] for task in tasks}


def sampling_seed(task_index: int, sample: int) -> int:
    """The seed of an episode's sampling: the same for every stage and training seed."""
    return task_index * SAMPLES_PER_TASK + sample


async def run_tasks(
    tasks: Sequence[Task],
    rubric_sets: dict[str, RubricSet],
    policy: Policy,
    tools: runner.ToolsProvider,
    judge: Judge,
    limits: Limits,
    *,
    stage: str,
    seed: int,
    fingerprint: str = "",
    samples: int = 1,
    concurrency: int = 16,
    price: float = 1.0,
    prompt: str = "compact",
    as_of: str = "",
    finished: Iterable[Result] = (),
    on_result: Callable[[Result], None] = lambda result: None,
) -> list[Result]:
    """Runs every (task, sample) that `finished` lacks, up to `concurrency` at once.

    Args:
        tools: returns a client of a healthy tool host; called before every attempt, so it may restart a dead host.
        on_result: called with each new row, in the order in which episodes end.

    Returns:
        All rows, finished ones included, in index order.
    """
    jobs = {t * samples + s: (t, s) for t in range(len(tasks)) for s in range(samples)}

    async def run_job(job: tuple[int, int]) -> tuple[Episode, int]:
        task_index, sample = job
        return await runner.run_with_retries(
            tasks[task_index], policy, tools, limits, prompt=prompt, as_of=as_of, seed=sampling_seed(task_index, sample)
        )

    async def score_job(job: tuple[int, int], sampled: tuple[Episode, int]) -> Result:
        (task_index, sample), (episode, attempts) = job, sampled
        task, rubric_set = tasks[task_index], rubric_sets[tasks[task_index].id]
        scored = await judge_episode(judge, task, rubric_set, episode.trajectory, attempts=JUDGE_ATTEMPTS)
        identity = dict(
            index=task_index * samples + sample,
            task_index=task_index,
            sample=sample,
            stage=stage,
            seed=seed,
            sampling_seed=sampling_seed(task_index, sample),
            fingerprint=fingerprint,
            attempts=attempts,
        )
        return _row(identity, task, episode.trajectory, scored, price)

    rows = await runner.run_all(
        jobs,
        run_job,
        score_job,
        concurrency=concurrency,
        recorded={result.index: result for result in finished},
        on_result=lambda _, result: on_result(result),
    )
    return list(rows.values())


def _row(identity: dict, task: Task, trajectory: Trajectory, scored: Scored, price: float) -> Result:
    stats, missing = trajectory.stats, None
    verdict = scored.verdict or Verdict(reward=None, judgments=[])
    if scored.masked is not None:
        trajectory.finish = records.Finish(scored.masked)
        missing = f"{scored.masked}: {trajectory.metadata.get('cause', 'no cause given')}"
    return Result(
        **identity,
        task_id=task.id,
        kind=task.kind,
        lang=task.lang,
        query=task.query,
        trajectory=trajectory,
        verdict=verdict,
        finish=str(trajectory.finish),
        reward=verdict.reward,
        correct=verdict.correct,
        cited=verdict.cited,
        turns=int(stats.get("turns", 0)),
        tool_calls=int(stats.get("tool_calls", 0)),
        errors=int(stats.get("tool_errors", 0) + stats.get("format_errors", 0)),
        recovered=int(stats.get("recovered", 0)),
        tokens=cost.episode_tokens(stats),
        cost=cost.episode_cost(stats, price),
        wall_seconds=stats.get("wall_seconds", 0.0),
        missing=missing,
    )


# ------------------------------------------------------------------------------------------------------- one stage


def result_path(config: ConfigDict, stage: str, seed: int | None = None) -> Path:
    return RunLayout.from_config(config).evaluated(stage, seed)


def trained_stages(config: ConfigDict) -> list[str]:
    """`init` and every stage of this seed that is finished, in the recipe's order."""
    layout = RunLayout.from_config(config)
    return [stage for stage in stages.evaluated() if stage == stages.INIT or layout.stage(stage).done.exists()]


def evaluation_fingerprint(config: ConfigDict, stage: str, tasks: Sequence[Task]) -> str:
    """What the rows of a stage depend on: checkpoint, tasks, budgets and sampling, as 16 hex digits."""
    layout, (name, _, step) = RunLayout.from_config(config), stage.partition("@")
    made, tokenizer = layout.stage(name), layout.tokenizer
    if step:
        path = made.for_reading().eval_checkpoint(int(step)) / step.zfill(8) / storage.MANIFEST
    trained = storage.read_json(path if step else made.done) or {}
    parts = [
        stage,
        config.seed,
        trained.get("params_sha256", trained),  # a stage that was run again and came out the same is the same
        hashlib.sha256(tokenizer.read_bytes()).hexdigest() if tokenizer.exists() else "",
        json.loads(config.model.to_json_best_effort()),
        json.loads(config.agent.to_json_best_effort()),
        json.loads(config.tools.to_json_best_effort()),
        [config.eval.temperature, config.eval.samples, config.offline_web.as_of, judge_settings(config)],
        [task.model_dump(mode="json") for task in tasks],
    ]
    return records.content_id("", *parts)


def finished(config: ConfigDict, stage: str) -> Path | None:
    """The path of a stage's rows when all of them are there and belong to the checkpoint and settings at hand."""
    tasks, _ = load_tasks(config, stage)
    path, fingerprint = result_path(config, stage), evaluation_fingerprint(config, stage, tasks)
    if not path.exists():
        return None
    rows = [row for row in files.read_jsonl(path) if row.get("fingerprint") == fingerprint]
    return path if len(rows) == len(tasks) * config.eval.samples else None


def evaluate(config: ConfigDict, stage: str, host: Host | None) -> Path:
    """Evaluates one stage of `config.seed` and returns the path of its rows; at once when they are there already.

    `stage` may be STAGE@STEP of an evaluation checkpoint, with config.eval.checkpoint_tasks tasks. `host` is our own
    tool host, or None to use the one at config.tools.address.

    Raises:
        UserError: the stage is unknown or not trained, the corpus is missing, or no episode could be measured.
    """
    if stage.partition("@")[0] not in (known := stages.evaluated()):
        raise UserError(f"expected a stage among {', '.join(known)}, got {stage!r}; change --stages")
    if path := finished(config, stage):
        return path
    tasks, rubric_sets = load_tasks(config, stage)
    path, fingerprint = result_path(config, stage), evaluation_fingerprint(config, stage, tasks)
    total = len(tasks) * config.eval.samples
    partial = path.with_name(f"{stage}.partial.jsonl")
    kept = _kept(partial, fingerprint)
    files.write_jsonl(partial, (_as_row(row) for row in kept))  # drops rows of other settings and torn lines

    progress = Progress(f"evaluate {stage} seed {config.seed}", total, "episodes", start=len(kept))
    seen = [row.reward for row in kept]

    def on_result(result: Result) -> None:
        files.append_jsonl(partial, _as_row(result))
        if result.reward is not None:
            seen.append(result.reward)
        progress.update(1, reward=sum(seen) / max(len(seen), 1), missing=progress.done + 1 - len(seen))

    rows = asyncio.run(_evaluate(config, stage, tasks, rubric_sets, fingerprint, host, kept, on_result))
    measured = [row for row in rows if row.missing is None]
    if not measured:
        raise UserError(
            f"evaluation of {stage}: none of {total} episodes could be measured; first cause: {rows[0].missing}"
        )
    files.write_jsonl(path, (_as_row(row) for row in rows))
    partial.unlink()
    return path


def _as_row(result: Result) -> dict:
    return result.model_dump(mode="json", exclude_defaults=True)


def _kept(partial: Path, fingerprint: str) -> list[Result]:
    """Rows of an interrupted evaluation that still count; missing ones are tried again."""
    rows = files.read_jsonl(partial) if partial.exists() else []
    return [
        Result.model_validate(row) for row in rows if row.get("fingerprint") == fingerprint and not row.get("missing")
    ]


async def _evaluate(config, stage, tasks, rubric_sets, fingerprint, host, kept, on_result) -> list[Result]:
    from stepdr_jax.engine.remote import RemoteEngine  # here, so that selecting and reading work without jax
    from stepdr_jax.training import sampler

    engine, tokenizer = sampler.load_stage_engine(config, stage)
    policy = EnginePolicy(engine, tokenizer, config.eval.temperature, name=stage)
    tools, judge = (
        Tools.from_config(config, host),
        make_judge(config, entity_names(RunLayout.from_config(config).entities)),
    )
    try:
        return await run_tasks(
            tasks,
            rubric_sets,
            policy,
            tools.client,
            judge,
            Limits.from_config(config.agent),
            stage=stage,
            seed=config.seed,
            fingerprint=fingerprint,
            samples=config.eval.samples,
            concurrency=config.sampler.max_num_seqs,
            price=config.eval.price_per_million_tokens,
            prompt=config.agent.prompt,
            as_of=config.offline_web.as_of,
            finished=kept,
            on_result=on_result,
        )
    finally:
        await tools.close()
        await judge.close()
        if isinstance(engine, RemoteEngine):
            await engine.stop()


def entity_names(path: Path) -> list[str]:
    """Names of everything the world knows, so that the judge does not find "Guinea" inside "Equatorial Guinea"."""
    rows = files.read_jsonl(path) if path.exists() else []
    return sorted({row[lang] for row in rows for lang in ("en", "zh") if row.get(lang)})
