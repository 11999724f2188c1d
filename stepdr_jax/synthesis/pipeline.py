"""The synthesis run: documents to tasks, rubrics, expert episodes, cleaning, renamed copies and reading material.

Everything is a function of the world, the config and `data_seed`. Expert episodes, the only slow part, are appended to a
journal as they finish; a killed run continues from it. Final files appear whole, `card.json` last: its presence, with the
right fingerprint, means that the corpus is complete.
"""

import asyncio
import collections
import dataclasses
import hashlib
import json
import random
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from urllib.parse import urlsplit

from ml_collections import ConfigDict

from stepdr_jax import files, records
from stepdr_jax.agent import prompts, react
from stepdr_jax.agent.budget import Limits
from stepdr_jax.errors import UserError
from stepdr_jax.judge.judges import ProgrammaticJudge
from stepdr_jax.progress import Progress
from stepdr_jax.records import RubricSet, Task, Trajectory, Triple, Verdict
from stepdr_jax.synthesis import (
    cleaning,
    corpora,
    deep_search,
    knowledge,
    reading,
    reflection,
    sentences,
    tasks,
    teacher,
)
from stepdr_jax.synthesis.renaming import Renamer
from tools_env.client import ToolInfraError, ToolsClient

VERSION = "1"  # raise when the meaning of the corpus changes, so that old ones are made again
SLIP_SHARE = 0.2  # tasks that also get an episode with a mistake; cleaning keeps the exact share
INFRA_TRIES = 3  # tries of one episode whose tools or teacher broke
UNAVAILABLE_HOST = "flaky.test"  # answers 503 in the built-in web
WALK_CHARS = 0.75  # characters of opened pages for a token of an episode: half of it is pages, 0.6 tokens a character
TEACHER_TURN_TOKENS = 4096  # least budgets of a teacher behind an endpoint
TEACHER_EPISODE_TOKENS = 32_768
VERIFY_BATCH = 2  # edges checked by one tool call: what fits into one observation
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
class Job:
    """One expert episode to run: a task with a style."""

    task: Task
    rubric_set: RubricSet
    style: teacher.Style

    @property
    def key(self) -> str:
        return f"{self.task.id} {self.style.slip or 'clean'}"


def run(config: ConfigDict, address: str, *, world_dir: str | Path | None = None) -> dict:
    """Makes the corpus in run_dir/corpus and returns its card; returns at once when it is already complete.

    Args:
        config: see configs/miniature.py; `world`, `synthesis`, `agent`, `teacher` and `data_seed` decide the content.
        address: host:port of a tool host that serves the same world.
        world_dir: the built world; default run_dir/world.

    Raises:
        UserError: the world is missing, the tool host does not answer, or too many episodes were lost.
    """
    world_dir = Path(world_dir or Path(config.run_dir) / "world")
    card = finished(config, world_dir=world_dir)
    if card is not None:
        return card
    corpus = Path(config.run_dir) / "corpus"
    (corpus / "card.json").unlink(missing_ok=True)
    return asyncio.run(_run(config, address, world_dir, corpus, _fingerprint(config, world_dir)))


def finished(config: ConfigDict, *, world_dir: str | Path | None = None) -> dict | None:
    """Returns the card of a corpus that is complete and was made from the same inputs, else None."""
    corpus = Path(config.run_dir) / "corpus"
    if not (corpus / "card.json").exists():
        return None
    card = files.read_json(corpus / "card.json")
    same = card.get("fingerprint") == _fingerprint(config, Path(world_dir or Path(config.run_dir) / "world"))
    return card if same and all((corpus / name).exists() for name in card["files"]) else None


def _fingerprint(config: ConfigDict, world_dir: Path) -> str:
    documents = world_dir / "documents.jsonl"
    if not documents.exists():
        raise UserError(f"{documents} does not exist; build the world first (python -m launch.synthesize does)")
    digest = hashlib.sha256(documents.read_bytes())
    parts = [
        VERSION,
        config.data_seed,
        *(config[name].to_dict() for name in ("world", "synthesis", "agent", "teacher")),
    ]
    parts.append([config.tools.topk, config.tools.max_observation_chars])
    digest.update(json.dumps(parts, sort_keys=True, default=str).encode())
    return digest.hexdigest()[:16]


async def _run(config: ConfigDict, address: str, world_dir: Path, corpus: Path, fingerprint: str) -> dict:
    began = time.monotonic()
    settings = config.synthesis
    known = knowledge.load(world_dir, heldout_share=config.world.heldout_share, seed=config.data_seed)
    documents = corpora.documents(world_dir)
    records.write(corpus / "documents.jsonl", documents)
    triples = corpora.triples(world_dir)
    records.write(corpus / "triples.jsonl", triples)

    client = ToolsClient(address, call_timeout=config.tools.call_timeout)
    try:
        await client.wait_ready(30.0)
        pairs = _hop_pairs(config, known, triples)
        hops, unverified = await _verified(client, known, pairs)
        drawn = tasks.draw(
            known,
            tasks_per_entity=settings.tasks_per_entity,
            heldout_tasks=settings.heldout_tasks,
            kind_weights=settings.kind_weights.to_dict(),
            chinese_share=settings.chinese_share,
            seed=config.data_seed,
            as_of=config.world.as_of,
            hops=hops,
            walks=deep_search.walks(
                known,
                documents,
                max_chars=int(WALK_CHARS * config.agent.max_episode_tokens),
                page_chars=config.tools.max_observation_chars,
                seed=config.data_seed,
            ),
        )
        usable = [item for item in drawn if item.rubric_set.kept]
        records.write(corpus / "tasks.jsonl", [item.task for item in usable])
        records.write(corpus / "rubrics.jsonl", [item.rubric_set for item in drawn])
        jobs = _jobs(usable, config.data_seed)
        episodes = await _episodes(config, client, known, world_dir, corpus, fingerprint, jobs)
    except ToolInfraError as error:
        raise UserError(
            f"the tool host at {address} failed ({error}); start it again and run the same command"
        ) from None
    finally:
        await client.close()

    by_id = {item.task.id: item.task for item in usable}
    trajectories = _cleaned(episodes, by_id, settings.noise_share, config.data_seed)
    renamer = known.renamer()
    reading_rows, reading_counts = [], collections.Counter()
    for row in reading.rows(
        known, copies=settings.reading_copies, chinese_share=settings.chinese_share, seed=config.data_seed
    ):
        reading_rows.append(row)
        reading_counts[row["component"]] += 1
    files.write_jsonl(corpus / "reading.jsonl", reading_rows)
    trajectory_counts: collections.Counter = collections.Counter()
    rows = _rows(trajectories, renamer, known.private, settings.trajectory_copies, config.data_seed, trajectory_counts)
    files.write_jsonl(corpus / "trajectories.jsonl", rows)

    card = {
        "fingerprint": fingerprint,
        "files": [
            "documents.jsonl",
            "triples.jsonl",
            "tasks.jsonl",
            "rubrics.jsonl",
            "trajectories.jsonl",
            "reading.jsonl",
        ],
        "entities": {"train": len(known.countries) - len(known.heldout), "heldout": len(known.heldout)},
        "documents": len(documents),
        "triples": len(triples),
        "edges": {"verified": sum(map(len, hops.values())), "unverified": unverified},
        "tasks": tasks.counts(drawn),
        "rubric_sets_dropped": _count(item.rubric_set.drop_reason for item in drawn if not item.rubric_set.kept),
        "episodes": _episode_card(trajectories, by_id),
        "trajectories": dict(sorted(trajectory_counts.items())),
        "reading": dict(sorted(reading_counts.items())),
        "teacher": config.teacher.model or "offline expert",
        "seconds": round(time.monotonic() - began, 1),
    }
    files.write_json(corpus / "card.json", card)
    return card


def _count(values: Iterable[str | None]) -> dict[str, int]:
    return dict(sorted(collections.Counter(value for value in values if value).items()))


# ------------------------------------------------------------------------------------------------------------- graph


def _hop_pairs(
    config: ConfigDict, known: knowledge.Knowledge, triples: list[Triple]
) -> dict[str, list[tuple[knowledge.Fact, knowledge.Fact]]]:
    """Country -> (clue, asked) pairs whose edges lie in the subgraph around the country (paper section 3.2.1)."""
    pairs = {}
    for country, relations in deep_search.subgraph_relations(
        known,
        triples,
        seed_degree=tuple(config.synthesis.seed_degree),
        nodes=tuple(config.synthesis.subgraph_nodes),
        super_node_degree=config.synthesis.super_node_degree,
        seed=config.data_seed,
    ).items():
        pairs[country] = [
            (known.facts[country, clue, lang], known.facts[country, asked, lang])
            for lang in knowledge.LANGS
            for clue in deep_search.CLUES[lang]
            for asked in deep_search.ASKED
            if clue != asked and {clue, asked} <= relations and {clue, asked} <= set(known.relations(country, lang))
        ]
    return pairs


async def _verified(
    client: ToolsClient, known: knowledge.Knowledge, pairs: dict[str, list]
) -> tuple[dict[str, list], int]:
    """Keeps the pairs of which both edges are found by a search; returns them and the number of edges that failed."""
    wanted: dict[tuple, tuple[str, tuple]] = {}  # edge -> query, fact
    for listed in pairs.values():
        for clue, asked in listed:
            wanted[clue, "clue"] = deep_search.clue(clue.relation, clue.value, clue.lang), _stated(clue.sentence)
            wanted[asked, "asked"] = deep_search.search_query(asked, known), _stated(asked.sentence)
    edges = list(wanted)
    supported: set[tuple] = set()
    session = await client.open_session("verify-edges")
    try:
        batches = [edges[start : start + VERIFY_BATCH] for start in range(0, len(edges), VERIFY_BATCH)]

        async def verify(number: int, batch: list) -> None:
            queries = list(dict.fromkeys(wanted[edge][0] for edge in batch))
            result = await session.call("batch_web_surfer", {"queries": queries, "topk": 2}, call_id=f"edges-{number}")
            shown = {_stated(source.text) for source in result.sources if source.authority == 2}
            supported.update(edge for edge in batch if wanted[edge][1] in shown)

        await _all(lambda item: verify(*item), list(enumerate(batches)), 16)
    finally:
        await session.close()
    kept = {
        country: [(c, a) for c, a in listed if (c, "clue") in supported and (a, "asked") in supported]
        for country, listed in pairs.items()
    }
    return kept, len(edges) - len(supported)


def _stated(text: str) -> tuple | None:
    statement = sentences.parse(text)
    return statement.fact if statement else None


# ---------------------------------------------------------------------------------------------------------- episodes


def _jobs(usable: list[tasks.Drawn], seed: int) -> list[Job]:
    """A clean episode for every training task, and for some a second one with a mistake to recover from."""
    jobs = []
    for item in usable:
        if item.task.split != "train":
            continue
        rng = random.Random(f"style {seed} {item.task.id}")
        style = teacher.draw_style(item.task, rng, slip_share=SLIP_SHARE)
        jobs.append(Job(item.task, item.rubric_set, dataclasses.replace(style, slip="")))
        if style.slip:
            jobs.append(Job(item.task, item.rubric_set, style))
    return jobs


async def _episodes(
    config: ConfigDict,
    client: ToolsClient,
    known: knowledge.Knowledge,
    world_dir: Path,
    corpus: Path,
    fingerprint: str,
    jobs: list[Job],
) -> list[tuple[Trajectory, Verdict]]:
    """Runs the jobs that the journal lacks; returns all episodes in the order of jobs."""
    journal = corpus / "episodes.journal.jsonl"
    done = _read_journal(journal, fingerprint)
    open_jobs = [job for job in jobs if job.key not in done]
    progress = Progress("expert episodes", len(jobs), "episodes", start=len(jobs) - len(open_jobs))
    teach = teacher.Teacher(config, _authority(world_dir), lambda task: _bad_urls(known, task))
    judge = ProgrammaticJudge(known.kinds)
    limits = Limits.from_config(config.agent)
    prompt = config.agent.prompt
    if config.teacher.endpoint:  # a large model is told its tools at length and may think at length
        prompt = "full"
        limits = dataclasses.replace(
            limits,
            max_turn_tokens=max(limits.max_turn_tokens, TEACHER_TURN_TOKENS),
            max_episode_tokens=max(limits.max_episode_tokens, TEACHER_EPISODE_TOKENS),
        )
    specs = await client.list_tools()
    lost: list[str] = []

    async def one(job: Job) -> None:
        seed = int(hashlib.sha256(f"{config.data_seed} {job.key}".encode()).hexdigest()[:7], 16)

        async def episode(policy, attempt: int) -> Trajectory:
            for again in range(INFRA_TRIES):
                result = await react.run_episode(
                    job.task,
                    policy,
                    client,
                    limits,
                    prompt=prompt,
                    as_of=config.world.as_of,
                    seed=seed + attempt,
                )
                if result.trajectory.finish.is_policy_outcome:
                    break
                await asyncio.sleep(0.2 * 2**again)
            if prompt != config.agent.prompt and result.trajectory.messages:  # the student gets its own prompt
                told = prompts.system_prompt(config.agent.prompt, config.world.as_of, specs, job.task.lang)
                result.trajectory.messages[0].content = told
            return _annotated(result.trajectory, job, policy)

        def policy_for(attempt: int):
            style = job.style
            if attempt:  # a second try compares its sources
                style = dataclasses.replace(style, slip="", open_page=False, check_again=True)
            return teach(job.task, style, seed + attempt)

        trajectory, verdict = await reflection.solve(
            job.task.lang,
            policy_for,
            episode,
            lambda t: judge.judge(job.task, job.rubric_set, t),
            lambda v: bool(v.correct) if v.correct is not None else (v.reward or 0) >= cleaning.MIN_REPORT_REWARD,
            config.synthesis.max_reflections,
        )
        if trajectory.finish.is_policy_outcome:
            row = {
                "key": job.key,
                "trajectory": trajectory.model_dump(mode="json", exclude_defaults=True),
                "verdict": verdict.model_dump(mode="json"),
            }
            files.append_jsonl(journal, row)
            done[job.key] = trajectory, verdict
        else:
            lost.append(f"{job.key}: {trajectory.metadata.get('cause', trajectory.finish)}")
            if len(lost) > max(10, MAX_LOST_SHARE * len(jobs)):
                raise UserError(
                    f"{len(lost)} expert episodes were lost, the last one by {lost[-1]}; "
                    "check the tool host (and the teacher's endpoint) and run the same command again"
                )
        progress.update(1, lost=len(lost))

    try:
        await _all(one, open_jobs, config.synthesis.episode_concurrency)
    finally:
        await teach.close()
    return [done[job.key] for job in jobs if job.key in done]


async def _all(work, items: list, concurrency: int) -> None:
    """Runs `work(item)` for all items, `concurrency` at a time; the first exception stops the rest and is raised."""
    queue = iter(items)

    async def worker() -> None:
        for item in queue:
            await work(item)

    try:
        async with asyncio.TaskGroup() as group:
            for _ in range(min(concurrency, len(items))):
                group.create_task(worker())
    except* Exception as errors:
        raise errors.exceptions[0] from None


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


def _annotated(trajectory: Trajectory, job: Job, policy) -> Trajectory:
    """Adds what training needs to know; turns that are deliberate slips are taken out of the loss."""
    acting = policy.policy if isinstance(policy, reflection.Continued) else policy
    mistakes = getattr(acting, "mistakes", set())
    turns = [message for message in trajectory.messages if message.role == "assistant"]
    for number in mistakes:
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


def _authority(world_dir: Path) -> dict[str, int]:
    hosts = files.read_json(world_dir / "sites.json")["hosts"]
    return {name: int(site.get("authority", 0)) for name, site in hosts.items()}


def _bad_urls(known: knowledge.Knowledge, task: Task) -> dict[str, str]:
    """Addresses that look right for a task and cannot be read: a page that does not exist, a host that does not answer."""
    url = known.pages[task.entity, task.lang][0].url
    return {"dead_link": url.rstrip("/") + "/history", "unavailable": f"http://{UNAVAILABLE_HOST}{urlsplit(url).path}"}


# ---------------------------------------------------------------------------------------------------------- cleaning


def _cleaned(
    episodes: list[tuple[Trajectory, Verdict]], by_id: dict[str, Task], noise_share: float, seed: int
) -> list[Trajectory]:
    """Applies the rules to every episode, then selects; recovered and corrected ones also train reflection."""
    trajectories = []
    for trajectory, verdict in episodes:
        reason = cleaning.drop_reason(by_id[trajectory.task_id], trajectory, verdict)
        trajectory.kept, trajectory.drop_reason = reason is None, reason
        trajectory.metadata["reward"] = verdict.reward
        if (cleaning.has_recovery(trajectory) or trajectory.attempt) and reason is None:
            components = trajectory.metadata["components"]
            trajectory.metadata["components"] = list(dict.fromkeys([*components, "reflection_tools"]))
        trajectories.append(trajectory)
    cleaning.select(trajectories, noise_share, random.Random(f"noise {seed}"))
    return trajectories


def _rows(
    trajectories: list[Trajectory],
    renamer: Renamer,
    private: frozenset[str],
    copies: int,
    seed: int,
    counts: collections.Counter,
) -> Iterator[dict]:
    """Serialises all episodes, kept ones with their renamed copies.

    Names that belong to held-out countries only (a second hit of a search may show them) are replaced everywhere.
    """
    for trajectory in trajectories:
        rng = random.Random(f"rename {seed} {trajectory.id}")
        row = trajectory.model_dump(mode="json", exclude_defaults=True)
        names = renamer.names_in_row(row)
        if hidden := [name for name in names if name in private]:
            row = renamer.mask(row, rng, hidden)
            row["metadata"] = {**row["metadata"], "masked": True}
            counts["masked names of held-out entities"] += 1
        yield row
        counts["kept" if trajectory.kept else "dropped"] += 1
        if not trajectory.kept:
            continue
        if hidden:
            names = renamer.names_in_row(row)
        for copy in range(copies):
            renamed = renamer.rename_row(row, rng, names=names)
            renamed["id"] = f"{trajectory.id}.{copy + 1}"
            renamed["metadata"] = {**renamed["metadata"], "copy_of": trajectory.id}
            counts["renamed copies"] += 1
            yield renamed


def _episode_card(trajectories: list[Trajectory], by_id: dict[str, Task]) -> dict:
    kept = [trajectory for trajectory in trajectories if trajectory.kept]
    return {
        "run": len(trajectories),
        "kept": _count(f"{by_id[t.task_id].kind} {by_id[t.task_id].lang}" for t in kept),
        "dropped": _count(t.drop_reason for t in trajectories),
        "kept_with_recovery": sum(cleaning.has_recovery(t) for t in kept),
        "kept_after_reflection": sum(t.attempt > 0 for t in kept),
        "components": _count(component for t in kept for component in t.metadata["components"]),
    }
