"""The synthesis run: documents to tasks, rubrics, expert episodes, cleaning, renamed copies and synthetic documents.

Everything is a function of the offline web, the config and `data_seed`. Expert episodes, the only slow part, are
appended to a journal as they finish; a killed run continues from it. Final files are written atomically, `card.json`
last: its presence, with the right fingerprint, means that the corpus is complete.
"""

import asyncio
import collections
import hashlib
import json
import random
import time
from collections.abc import Iterable, Iterator
from pathlib import Path

from ml_collections import ConfigDict

from stepdr_jax import configuration, files, records
from stepdr_jax.errors import UserError
from stepdr_jax.records import Task, Trajectory, Verdict
from stepdr_jax.runtime import stages
from stepdr_jax.runtime.layout import RunLayout
from stepdr_jax.synthesis import cleaning, corpora, experts
from stepdr_jax.synthesis.scripted.domain import CountryDomain
from tools_env.client import ToolInfraError, ToolsClient

VERSION = "1"  # raise when the meaning of the corpus changes, so that old ones are made again


def synthesize_corpus(config: ConfigDict, address: str, *, world_dir: str | Path | None = None) -> dict:
    """Makes the corpus in run_dir/corpus and returns its card; returns at once when it is already complete.

    Args:
        config: `offline_web`, `synthesis`, `agent`, `teacher` and `data_seed` decide the content.
        address: host:port of a tool host that serves the same offline web.
        world_dir: the built offline web; default run_dir/world.

    Raises:
        UserError: the offline web is missing, the tool host does not answer, or too many episodes were lost.
    """
    world_dir = Path(world_dir or RunLayout.from_config(config).offline_web)
    card = finished_card(config, world_dir=world_dir)
    if card is not None:
        return card
    corpus = RunLayout.from_config(config).corpus
    (corpus / "card.json").unlink(missing_ok=True)
    configuration.save_config(config, corpus)
    return asyncio.run(_run(config, address, world_dir, corpus, _fingerprint(config, world_dir)))


def finished_card(config: ConfigDict, *, world_dir: str | Path | None = None) -> dict | None:
    """Returns the card of a corpus that is complete and was made from the same inputs, else None."""
    corpus = RunLayout.from_config(config).corpus
    if not (corpus / "card.json").exists():
        return None
    card = files.read_json(corpus / "card.json")
    same = card.get("fingerprint") == _fingerprint(config, Path(world_dir or RunLayout.from_config(config).offline_web))
    return card if same and all((corpus / name).exists() for name in card["files"]) else None


def _fingerprint(config: ConfigDict, world_dir: Path) -> str:
    documents = world_dir / "documents.jsonl"
    if not documents.exists():
        command = stages.command_of("offline_web", config)
        raise UserError(f"{documents} does not exist; build the offline web first: {command}")
    digest = hashlib.sha256(documents.read_bytes())
    parts = [
        VERSION,
        config.data_seed,
        *(config[name].to_dict() for name in ("offline_web", "synthesis", "agent", "teacher")),
    ]
    parts.append([config.tools.topk, config.tools.max_observation_chars])
    digest.update(json.dumps(parts, sort_keys=True, default=str).encode())
    return digest.hexdigest()[:16]


async def _run(config: ConfigDict, address: str, world_dir: Path, corpus: Path, fingerprint: str) -> dict:
    began = time.monotonic()
    domain = CountryDomain(config, world_dir)
    documents, triples = corpora.read_documents(world_dir), corpora.read_triples(world_dir)
    records.write_records(corpus / "documents.jsonl", documents)
    records.write_records(corpus / "triples.jsonl", triples)

    client = ToolsClient(address, call_timeout=config.tools.call_timeout)
    try:
        await client.wait_ready(30.0)
        drawn, edge_counts = await domain.draw_tasks(client, documents, triples)
        usable = [item for item in drawn if item.rubric_set.kept]
        records.write_records(corpus / "tasks.jsonl", [item.task for item in usable])
        records.write_records(corpus / "rubrics.jsonl", [item.rubric_set for item in drawn])
        jobs = domain.episode_jobs(usable)
        episodes = await experts.run_expert_episodes(config, client, domain, corpus, fingerprint, jobs)
    except ToolInfraError as error:
        raise UserError(
            f"the tool host at {address} failed ({error}); start it again and run the same command"
        ) from None
    finally:
        await client.close()

    by_id = {item.task.id: item.task for item in usable}
    trajectories = _cleaned(episodes, by_id, domain, config.synthesis.noise_share, config.data_seed)
    document_rows = list(domain.document_rows())
    files.write_jsonl(corpus / "synthetic_documents.jsonl", document_rows)
    counts: collections.Counter = collections.Counter()
    rows = _rows(trajectories, domain, config.synthesis.trajectory_copies, config.data_seed, counts)
    files.write_jsonl(corpus / "trajectories.jsonl", rows)

    names = ("documents", "triples", "tasks", "rubrics", "trajectories", "synthetic_documents")
    heldout = len(domain.knowledge.heldout)
    card = {
        "fingerprint": fingerprint,
        "files": [f"{name}.jsonl" for name in names],
        "entities": {"train": len(domain.knowledge.countries) - heldout, "heldout": heldout},
        "documents": len(documents),
        "triples": len(triples),
        "edges": edge_counts,
        "tasks": _task_counts(drawn),
        "rubric_sets_dropped": _count(item.rubric_set.drop_reason for item in drawn if not item.rubric_set.kept),
        "episodes": _episode_card(trajectories, by_id),
        "trajectories": dict(sorted(counts.items())),
        "synthetic_documents": _count(row["component"] for row in document_rows),
        "teacher": config.teacher.model or "offline expert",
        "seconds": round(time.monotonic() - began, 1),
    }
    files.write_json(corpus / "card.json", card)
    return card


def _count(values: Iterable[str | None]) -> dict[str, int]:
    return dict(sorted(collections.Counter(value for value in values if value).items()))


def _task_counts(drawn: list) -> dict[str, dict[str, int]]:
    """Kept tasks by split, by kind and language."""
    table: dict[str, collections.Counter] = collections.defaultdict(collections.Counter)
    for item in drawn:
        if item.rubric_set.kept:
            table[item.task.split][f"{item.task.kind} {item.task.lang}"] += 1
    return {split: dict(sorted(row.items())) for split, row in sorted(table.items())}


def _cleaned(
    episodes: list[tuple[Trajectory, Verdict]],
    by_id: dict[str, Task],
    domain: CountryDomain,
    noise_share: float,
    seed: int,
) -> list[Trajectory]:
    """Applies the rules to every episode, then selects; recovered and corrected ones also train reflection."""
    trajectories = []
    for trajectory, verdict in episodes:
        reason = cleaning.drop_reason(by_id[trajectory.task_id], trajectory, verdict, domain.answer_fault)
        trajectory.kept, trajectory.drop_reason = reason is None, reason
        trajectory.metadata["reward"] = verdict.reward
        if (cleaning.has_recovery(trajectory) or trajectory.attempt) and reason is None:
            components = trajectory.metadata["components"]
            trajectory.metadata["components"] = list(dict.fromkeys([*components, "reflection_tools"]))
        trajectories.append(trajectory)
    cleaning.select_episodes(trajectories, noise_share, random.Random(f"noise {seed}"))
    return trajectories


def _rows(
    trajectories: list[Trajectory], domain: CountryDomain, copies: int, seed: int, counts: collections.Counter
) -> Iterator[dict]:
    """Serializes all episodes, kept ones with their renamed copies.

    Names that belong to held-out countries only (a second hit of a search may show them) are replaced everywhere.
    """
    renamer, private = domain.knowledge.renamer(), domain.knowledge.private
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
