"""All tasks of a run: kinds and languages by their shares, split by entity, rubrics beside every task.

Everything is drawn from (seed, entity), so one entity's tasks do not depend on another's.
"""

import dataclasses
import random
from collections.abc import Mapping

from stepdr_jax.records import RubricSet, Task, Trajectory
from stepdr_jax.synthesis import rubrics
from stepdr_jax.synthesis.rubrics import Brief
from stepdr_jax.synthesis.scripted import deep_search, reports, verification
from stepdr_jax.synthesis.scripted.knowledge import Fact, Knowledge

FACTS = ("capital", "currency", "language", "region", "calling_code", "population", "area", "demonym")
MAX_TRIES = 8  # draws per wanted task; entities with few facts give fewer tasks
WALK_SHARE = 0.2  # of deep-search tasks that are walks along links, where the pages have links


@dataclasses.dataclass(frozen=True)
class DrawnTask:
    task: Task
    rubric_set: RubricSet


def draw_tasks(
    knowledge: Knowledge,
    *,
    tasks_per_entity: int,
    heldout_tasks: int,
    kind_weights: Mapping[str, float],
    chinese_share: float,
    seed: int,
    as_of: str,
    hops: Mapping[str, list[tuple[Fact, Fact]]],
    walks: Mapping[str, list[deep_search.LinkWalk]],
) -> list[DrawnTask]:
    """Draws tasks for every country; held-out countries share `heldout_tasks` evenly.

    Args:
        kind_weights: fact, deep_search, verification, report -> share.
        hops: country -> pairs of facts (clue, asked) from its verified subgraph.
        walks: country -> walks that end at its page.

    Returns:
        Tasks in the order of countries, without repetitions. Sets that failed the two-step check have kept False; their
        tasks are not to be used.
    """
    held = sorted(knowledge.heldout)
    drawn: list[DrawnTask] = []
    for country in knowledge.countries:
        if country in knowledge.heldout:
            place = held.index(country)
            count = heldout_tasks // len(held) + (place < heldout_tasks % len(held))
        else:
            count = tasks_per_entity
        rng = random.Random(f"tasks {seed} {country}")
        drawn += _of_country(
            knowledge,
            country,
            count,
            kind_weights,
            chinese_share,
            rng,
            as_of,
            hops.get(country, []),
            walks.get(country, []),
        )
    return drawn


def _of_country(knowledge, country, count, kind_weights, chinese_share, rng, as_of, hops, walks) -> list[DrawnTask]:
    kinds, weights = zip(*sorted(kind_weights.items()), strict=True)
    found: dict[str, DrawnTask] = {}
    good = 0
    for _ in range(count * MAX_TRIES):
        if good >= count:
            break
        kind = rng.choices(kinds, weights)[0]
        lang = "zh" if rng.random() < chinese_share else "en"
        made = _make(knowledge, kind, country, lang, rng, as_of, hops, walks)
        if made is None or made[0].id in found:
            continue
        task, brief = made
        rubric_set = rubrics.synthesize_rubrics(task, brief)
        task.rubric_set_id = rubric_set.id
        found[task.id] = DrawnTask(task, rubric_set)
        good += rubric_set.kept
    return list(found.values())


def _make(knowledge, kind, country, lang, rng, as_of, hops, walks) -> tuple[Task, Brief] | None:
    relations = [relation for relation in knowledge.relations(country, lang) if relation in FACTS]
    if not relations:
        return None
    if kind == "fact":
        return deep_search.fact_task(knowledge, country, rng.choice(relations), lang, rng, as_of)
    if kind == "report":
        return reports.report_task(knowledge, country, lang, rng, as_of)
    if kind == "verification":
        return _claim(knowledge, country, rng.choice(relations), lang, rng, as_of)
    if kind == "deep_search":
        if rng.random() < WALK_SHARE and (own := [walk for walk in walks if walk.lang == lang]):
            return deep_search.walk_task(knowledge, rng.choice(own), rng, as_of)
        pairs = [pair for pair in hops if pair[0].lang == lang and not _crosses(knowledge, pair)]
        return deep_search.two_hop_task(knowledge, *rng.choice(pairs), rng, as_of) if pairs else None
    raise ValueError(
        f"unknown kind {kind!r} in synthesis.kind_weights; expected fact, deep_search, verification, report"
    )


def _crosses(knowledge: Knowledge, pair: tuple[Fact, Fact]) -> bool:
    """Whether the facts of a question belong to different splits."""
    return len({knowledge.split(fact.country) for fact in pair}) > 1


def _claim(knowledge, country, relation, lang, rng, as_of) -> tuple[Task, Brief] | None:
    fact = knowledge.facts[country, relation, lang]
    value = fact.value
    if rng.random() < 0.5:
        said = [
            other.value
            for other in knowledge.wrong.get((country, relation, lang), ())
            if country in knowledge.heldout or not any(value in knowledge.private for value in other.values)
        ]
        # without a page that errs, another country's value makes the claim; never one of the other split
        others = [
            other.value
            for other in (knowledge.facts.get((c, relation, lang)) for c in knowledge.countries)
            if other
            and other.value != fact.value
            and len(other.values) == 1
            and knowledge.split(other.country) == knowledge.split(country)
        ]
        value = rng.choice(said or others or [fact.value])
    return verification.claim_task(knowledge, country, relation, value, lang, rng, as_of)


def answer_fault(task: Task, trajectory: Trajectory) -> str | None:
    """Why a report or a verdict breaks the rules of its kind of task, or None."""
    if task.kind == "report" and not reports.follows_plan(trajectory.answer or "", task):
        return "report strays from its plan"
    if task.kind == "verification" and not verification.verdict_follows(task, trajectory):
        return "verdict does not follow from evidence"
    return None
