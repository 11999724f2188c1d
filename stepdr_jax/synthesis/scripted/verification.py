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
from stepdr_jax.records import Answer, Document, PlanStep, Source, Task, Trajectory, content_id
from stepdr_jax.synthesis.rubrics import Brief
from stepdr_jax.synthesis.scripted import deep_search, sentences
from stepdr_jax.synthesis.scripted.knowledge import Knowledge
from stepdr_jax.text.citations import cited_ids
from stepdr_jax.text.matching import contains, normalise

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


def extract(document: Document) -> list[VerificationPoint]:
    """Splits a page into verification points; sentences that state nothing checkable are left out."""
    points = []
    for line in document.text.splitlines():
        statement = sentences.parse(sentences.plain(line))
        if statement:
            points.append(VerificationPoint(POINT_TYPES[statement.relation], sentences.plain(line), statement, 2))
        elif _CAUSAL.search(line):
            points.append(VerificationPoint("causal", line.strip(), None, 1))
        elif _TIME.search(line) and not line.startswith("#"):
            points.append(VerificationPoint("time", line.strip(), None, 1))
    return points


def plan(points: list[VerificationPoint], authority: int) -> list[VerificationPoint]:
    """Points worth checking: those whose page is less reliable than what should settle them, one per statement."""
    seen, chosen = set(), []
    for point in points:
        key = normalise(point.text)
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
    gold = deep_search.answer(knowledge, fact)
    verdict = "supported" if normalise(value) in map(normalise, (gold.value, *gold.aliases)) else "refuted"
    said = sentences.sentence(relation, subject, (value,), lang).rstrip(".。")
    claim = said if lang == "zh" else said[0].lower() + said[1:]
    query = rng.choice(ASK[lang]).format(claim=claim)
    topic = sentences.topic(relation, subject, lang)
    task = Task(
        id=content_id("task_", "verification", lang, query),
        kind="verification",
        lang=lang,
        query=query,
        answer=Answer(value=verdict, type="none"),
        plan=[PlanStep(goal=topic, query=topic)],
        facts=[deep_search.triple(fact)],
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
        points=(deep_search.point(knowledge, fact),),
        summary=f"{claim}: {verdict}",
        vocabulary=sentences.vocabulary(lang),
        verdict=verdict,
    )
    return task, brief


def consistent(task: Task, trajectory: Trajectory) -> bool:
    """Whether (point, conclusion, evidence) fit together: the verdict must follow from a cited, observed passage."""
    conclusion = stated_verdict(trajectory.answer or "")
    sources = trajectory.sources()
    evidence: list[Source] = [sources[id_] for id_ in cited_ids(trajectory.answer or "") if id_ in sources]
    if conclusion is None or not evidence:
        return False
    relation, subject, claimed = task.metadata["relations"][0], task.metadata["subject"], task.metadata["claimed"]
    for source in evidence:
        statement = sentences.parse(source.text)
        if statement and statement.relation == relation and normalise(statement.subject) == normalise(subject):
            agrees = normalise(statement.value) == normalise(claimed)
        else:
            agrees = contains(source.text, claimed) and contains(source.text, subject)
        if agrees != (conclusion == "supported"):
            return False
    return True
