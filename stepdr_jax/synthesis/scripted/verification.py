"""Claims to verify, and the workflow that verifies them (paper section 3.3.2).

Extract: a page is split into independent points (time, place, subject, data, causal). Plan: which points are worth
checking, and against what kind of source. Verify and replan are the expert's episode (`teacher`): search, compare,
search again when nothing authoritative came. Report: a verdict with cited evidence. A last filter holds every triple of
point, conclusion and evidence to logical consistency.
"""

import dataclasses
import random
import re

from stepdr_jax.judge.judges import stated_verdict
from stepdr_jax.records import Answer, Document, ObservedSource, PlanStep, Task, Trajectory, content_id
from stepdr_jax.synthesis.rubrics import Brief
from stepdr_jax.synthesis.scripted import deep_search, sentences
from stepdr_jax.synthesis.scripted.knowledge import Knowledge
from stepdr_jax.text.citations import cited_ids
from stepdr_jax.text.matching import normalize, states_value

POINT_TYPES = {
    "capital": "place",
    "region": "place",
    "neighbour": "place",
    "currency": "subject",
    "language": "subject",
    "demonym": "subject",
    "population": "data",
    "area": "data",
    "calling_code": "data",
}
_TIME = re.compile(r"\b(1[5-9]|20)\d\d\b|\d{4}年")
_CAUSAL = re.compile(r"\b(because|led to|caused|therefore|due to)\b|因为|导致|因此|由于")
ASK = {
    "en": (
        "A page says {claim}. Is that right?",
        "Someone claims that {claim}. Check it.",
        "Is this true: {claim}?",
    ),
    "zh": ("有网页说{claim}。对吗？", "有人说{claim}。请核实。", "{claim}，是否属实？"),
}
VERDICT = {
    "en": {"supported": "Supported.", "refuted": "Refuted."},
    "zh": {"supported": "该说法正确。", "refuted": "该说法错误。"},
}


@dataclasses.dataclass(frozen=True)
class VerificationPoint:
    """One independent statement of a text."""

    type: str  # time, place, subject, data, causal
    text: str
    statement: sentences.Statement | None
    required_authority: int  # of the source that may settle it


def extract_points(document: Document) -> list[VerificationPoint]:
    """Splits a page into verification points; sentences that state nothing checkable are left out."""
    points = []
    for line in document.text.splitlines():
        statement = sentences.parse_statement(sentences.strip_markup(line))
        if statement:
            points.append(
                VerificationPoint(POINT_TYPES[statement.relation], sentences.strip_markup(line), statement, 2)
            )
        elif _CAUSAL.search(line):
            points.append(VerificationPoint("causal", line.strip(), None, 1))
        elif _TIME.search(line) and not line.startswith("#"):
            points.append(VerificationPoint("time", line.strip(), None, 1))
    return points


def points_to_check(points: list[VerificationPoint], authority: int) -> list[VerificationPoint]:
    """Points worth checking: those whose page is less reliable than what should settle them, one per statement."""
    seen, chosen = set(), []
    for point in points:
        key = normalize(point.text)
        if point.statement and authority < point.required_authority and key not in seen:
            seen.add(key)
            chosen.append(point)
    return chosen


def claim_task(
    knowledge: Knowledge, country: str, relation: str, value: str, lang: str, rng: random.Random, as_of: str
) -> tuple[Task, Brief] | None:
    """A question whether a claim holds.

    Args:
        value: what the claim says; the verdict follows from comparing it with the authoritative fact.

    Returns:
        None for facts with several values, whose partial claims are neither right nor wrong.
    """
    fact = knowledge.facts[country, relation, lang]
    if len(fact.values) > 1:
        return None
    subject = knowledge.countries[country].name(lang)
    gold = deep_search.gold_answer(knowledge, fact)
    verdict = "supported" if normalize(value) in map(normalize, (gold.value, *gold.aliases)) else "refuted"
    said = sentences.state_fact(relation, subject, (value,), lang).rstrip(".。")
    claim = said if lang == "zh" else said[0].lower() + said[1:]
    query = rng.choice(ASK[lang]).format(claim=claim)
    topic = sentences.topic_of(relation, subject, lang)
    task = Task(
        id=content_id("task_", "verification", lang, query),
        kind="verification",
        lang=lang,
        query=query,
        answer=Answer(value=verdict, type="none"),
        plan=[PlanStep(goal=topic, query=topic)],
        facts=[deep_search.fact_triple(fact)],
        split=knowledge.split(country),
        as_of=as_of,
        entity=country,
        metadata={
            "relations": [relation],
            "subject": subject,
            "claimed": value,
            "point_type": POINT_TYPES[relation],
        },
    )
    brief = Brief(
        kind="verification",
        lang=lang,
        points=(deep_search.rubric_point(knowledge, fact),),
        summary=f"{claim}: {verdict}",
        vocabulary=sentences.relation_vocabulary(lang),
        verdict=verdict,
    )
    return task, brief


def verdict_follows(task: Task, trajectory: Trajectory) -> bool:
    """Whether (point, conclusion, evidence) fit together: the verdict must follow from a cited, observed passage."""
    conclusion = stated_verdict(trajectory.answer or "")
    sources = trajectory.sources()
    evidence: list[ObservedSource] = [sources[id_] for id_ in cited_ids(trajectory.answer or "") if id_ in sources]
    if conclusion is None or not evidence:
        return False
    relation, subject, claimed = task.metadata["relations"][0], task.metadata["subject"], task.metadata["claimed"]
    for source in evidence:
        statement = sentences.parse_statement(source.text)
        if statement and statement.relation == relation and normalize(statement.subject) == normalize(subject):
            agrees = normalize(statement.value) == normalize(claimed)
        else:
            agrees = states_value(source.text, claimed) and states_value(source.text, subject)
        if agrees != (conclusion == "supported"):
            return False
    return True
