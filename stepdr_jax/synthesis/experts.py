"""Expert episodes of synthesis: run, annotated for training, and recorded in a journal that survives a kill."""

import dataclasses
import hashlib
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from stepdr_jax import files, records
from stepdr_jax.agent import prompts, runner
from stepdr_jax.agent.budget import Limits
from stepdr_jax.agent.policy import Policy
from stepdr_jax.errors import UserError
from stepdr_jax.judge.judges import ProgrammaticJudge
from stepdr_jax.judge.scored import judge_episode
from stepdr_jax.progress import Progress
from stepdr_jax.records import RubricSet, Task, Trajectory, Verdict
from stepdr_jax.synthesis import cleaning, reflection
from stepdr_jax.synthesis.teacher import Teacher
from tools_env.client import ToolsClient

INFRA_TRIES = 3  # tries of one episode whose tools or teacher broke
TEACHER_TURN_TOKENS = 4096  # least budgets of a teacher behind an endpoint
TEACHER_EPISODE_TOKENS = 32_768
MAX_LOST_SHARE = 0.05  # of episodes that may be lost to infrastructure
COMPONENTS = {
    "fact": ("deep_search_tools", "sft_deep_search"),
    "deep_search": ("deep_search_tools", "sft_deep_search"),
    "doc_walk": ("deep_search_tools", "sft_deep_search"),
    "verification": ("reflection_tools", "sft_deep_search"),
    "report": ("planning_tools", "sft_deep_research"),
}
CAPABILITY = {
    "fact": "deep_search",
    "deep_search": "deep_search",
    "doc_walk": "deep_search",
    "verification": "reflection",
    "report": "report",
}


@dataclasses.dataclass(frozen=True)
class EpisodeJob:
    """One expert episode to run: a task in one variant.

    Attributes:
        style: how the scripted expert works, a dataclass with a method `retry`.
        variant: names the style among those of the task; part of seeds and ids.
    """

    task: Task
    rubric_set: RubricSet
    style: Any
    variant: str = "clean"

    @property
    def key(self) -> str:
        return f"{self.task.id} {self.variant}"


async def run_expert_episodes(
    config: ConfigDict, client: ToolsClient, domain, corpus: Path, fingerprint: str, jobs: list[EpisodeJob]
) -> list[tuple[Trajectory, Verdict]]:
    """Runs the jobs that the journal in `corpus` lacks; returns all episodes in the order of jobs.

    Args:
        domain: makes scripted experts and knows the names of entities, see `scripted.domain.CountryDomain`.

    Raises:
        UserError: too many episodes were lost to infrastructure.
    """
    journal = corpus / "episodes.journal.jsonl"
    done = _read_journal(journal, fingerprint)
    progress = Progress("expert episodes", len(jobs), "episodes", start=sum(job.key in done for job in jobs))
    teacher = Teacher(config, domain.expert)
    judge = ProgrammaticJudge(domain.knowledge.kinds)
    specs = await client.list_tools()
    lost: list[str] = []

    async def solve(job: EpisodeJob) -> tuple[Trajectory, Verdict]:
        return await _solve(job, config, client, specs, teacher, judge)

    async def record(job: EpisodeJob, solved: tuple[Trajectory, Verdict]) -> tuple[Trajectory, Verdict] | None:
        trajectory, verdict = solved
        if verdict.reward is not None:
            row = {
                "key": job.key,
                "trajectory": trajectory.model_dump(mode="json", exclude_defaults=True),
                "verdict": verdict.model_dump(mode="json"),
            }
            files.append_jsonl(journal, row)
        else:
            lost.append(f"{job.key}: {trajectory.metadata.get('cause', trajectory.finish)}")
            if len(lost) > max(10, MAX_LOST_SHARE * len(jobs)):
                raise UserError(
                    f"{len(lost)} expert episodes were lost, the last one by {lost[-1]}; "
                    "check the tool host (and the teacher's endpoint) and run the same command again"
                )
        progress.update(1, lost=len(lost))
        return None if verdict.reward is None else solved

    try:
        episodes = await runner.run_all(
            {job.key: job for job in jobs},
            solve,
            record,
            concurrency=config.synthesis.episode_concurrency,
            recorded=done,
        )
    finally:
        await teacher.close()
    return [episode for episode in episodes.values() if episode is not None]


async def _solve(
    job: EpisodeJob,
    config: ConfigDict,
    client: ToolsClient,
    specs: list,
    teacher: Teacher,
    judge: ProgrammaticJudge,
) -> tuple[Trajectory, Verdict]:
    """Runs one job, reflections included; returns the episode and its verdict (reward None: lost to infrastructure)."""
    seed = int(hashlib.sha256(f"{config.data_seed} {job.key}".encode()).hexdigest()[:7], 16)
    prompt, limits = config.agent.prompt, Limits.from_config(config.agent)
    if config.teacher.endpoint:  # a large model reads full tool descriptions and may think at length
        prompt = "full"
        limits = dataclasses.replace(
            limits,
            max_turn_tokens=max(limits.max_turn_tokens, TEACHER_TURN_TOKENS),
            max_episode_tokens=max(limits.max_episode_tokens, TEACHER_EPISODE_TOKENS),
        )

    async def tools() -> ToolsClient:
        return client

    async def episode(policy: Policy, attempt: int) -> Trajectory:
        result, _ = await runner.run_with_retries(
            job.task,
            policy,
            tools,
            limits,
            prompt=prompt,
            as_of=config.offline_web.as_of,
            seed=seed + attempt,
            attempts=INFRA_TRIES,
            pause=0.2,
        )
        if prompt != config.agent.prompt and result.trajectory.messages:  # the student gets its own prompt
            told = prompts.system_prompt(config.agent.prompt, config.offline_web.as_of, specs, job.task.lang)
            result.trajectory.messages[0].content = told
        return _annotated(result.trajectory, job, policy)

    def policy_for(attempt: int) -> Policy:
        return teacher(job.task, job.style.retry() if attempt else job.style, seed + attempt)

    async def judged(trajectory: Trajectory) -> Verdict:
        scored = await judge_episode(judge, job.task, job.rubric_set, trajectory)
        return scored.verdict or Verdict(reward=None, judgments=[])

    return await reflection.solve_with_reflection(
        job.task.lang, policy_for, episode, judged, cleaning.is_correct, config.synthesis.max_reflections
    )


def _read_journal(path: Path, fingerprint: str) -> dict[str, tuple[Trajectory, Verdict]]:
    """Finished episodes of the same inputs; a journal of other inputs is started anew."""
    rows = files.read_jsonl(path) if path.exists() else []
    if not rows or rows[0].get("fingerprint") != fingerprint:
        files.write_jsonl(path, [{"fingerprint": fingerprint}])
        return {}
    # A torn last line was dropped by the reader: write the file whole again, or the next append would join it.
    files.write_jsonl(path, rows)
    return {
        row["key"]: (Trajectory.model_validate(row["trajectory"]), Verdict.model_validate(row["verdict"]))
        for row in rows[1:]
    }


def _annotated(trajectory: Trajectory, job: EpisodeJob, policy) -> Trajectory:
    """Adds the metadata that training needs; turns with an injected error are taken out of the loss."""
    acting = policy.policy if isinstance(policy, reflection.ContinuedPolicy) else policy
    turns = [message for message in trajectory.messages if message.role == "assistant"]
    for number in getattr(acting, "injected_turns", ()):
        if number < len(turns):
            turns[number].train = False
    trajectory.id = records.content_id("trajectory_", job.key, trajectory.policy)
    trajectory.capability = CAPABILITY[job.task.kind]
    trajectory.stats.pop("wall_seconds", None)  # the only thing that differs between equal runs
    trajectory.metadata |= {
        "kind": job.task.kind,
        "lang": job.task.lang,
        "style": {k: v for k, v in dataclasses.asdict(job.style).items() if v},
        "components": list(COMPONENTS[job.task.kind]),
    }
    if misspelt := getattr(acting, "misspelt", None):
        trajectory.metadata["misspelt"] = dict(misspelt)
    return trajectory
