"""Brief reports: several facts about one subject, with a title and one cited sentence per fact (paper section 3.4).

Planning by reverse engineering (paper section 3.1): a finished page implies a plan that could have produced it. From
its sentences the request and its plan are inferred in hindsight: what was asked, and the steps that gather it. The
results (the values) are left out of both. The plan is then known, and the report can be checked against it.
"""

import dataclasses
import random

from stepdr_jax.records import Document, PlanStep, Task, content_id
from stepdr_jax.synthesis.rubrics import Brief
from stepdr_jax.synthesis.scripted import deep_search, sentences
from stepdr_jax.synthesis.scripted.knowledge import Knowledge
from stepdr_jax.text.matching import normalize

ASK = {
    "en": (
        "Write a brief on {subject}: {points}.",
        "Write a short report on {subject}: {points}.",
        "Brief me on {subject}: {points}.",
        "Prepare a report on {subject}: {points}.",
    ),
    "zh": (
        "写一份关于{subject}的简报：{points}。",
        "写一份关于{subject}的简短报告：{points}。",
        "请介绍{subject}：{points}。",
    ),
}
RELATIONS = ("capital", "currency", "language", "region", "calling_code", "population", "area")


@dataclasses.dataclass(frozen=True)
class Project:
    """A task in hindsight: the subject, what was to be found out, and the steps."""

    subject: str
    relations: tuple[str, ...]
    plan: tuple[PlanStep, ...]


def reverse_engineer(
    document: Document, rng: random.Random, *, subject: str, relations: list[str], size: int
) -> Project:
    """Infers a project from a page: `size` of the points that it covers, in the page's order.

    Args:
        document: a finished page with one-fact sentences.
        subject: whom the page is about.
        relations: relations that may be asked for.
        size: number of points; fewer when the page covers fewer.
    """
    statements = [
        statement
        for line in document.text.splitlines()
        if (statement := sentences.parse_statement(sentences.strip_markup(line)))
    ]
    covered = list(
        dict.fromkeys(
            statement.relation
            for statement in statements
            if normalize(statement.subject) == normalize(subject) and statement.relation in relations
        )
    )
    chosen = set(rng.sample(covered, min(size, len(covered))))
    ordered = tuple(relation for relation in covered if relation in chosen)
    topics = [sentences.topic_of(relation, subject, document.lang) for relation in ordered]
    return Project(subject, ordered, tuple(PlanStep(goal=topic, query=topic) for topic in topics))


def report_task(
    knowledge: Knowledge, country: str, lang: str, rng: random.Random, as_of: str
) -> tuple[Task, Brief] | None:
    """A request for a brief of two or three facts (two in Chinese, whose characters cost more tokens)."""
    subject = knowledge.countries[country].name(lang)
    short = [
        relation
        for relation in knowledge.relations(country, lang)
        if relation in RELATIONS and len(knowledge.facts[country, relation, lang].values) <= 2
    ]
    pages = knowledge.pages.get((country, lang), ())
    if len(short) < 2 or not pages:
        return None
    size = 2 if lang == "zh" else rng.choice((2, 2, 3))
    project = reverse_engineer(pages[0], rng, subject=subject, relations=short, size=size)
    if len(project.relations) < 2:
        return None
    words = [sentences.relation_name(relation, lang) for relation in project.relations]
    points = ("、" if lang == "zh" else ", ").join(words)
    asks = rng.random() < deep_search.ASK_SOURCES_SHARE
    query = rng.choice(ASK[lang]).format(subject=subject, points=points) + (deep_search.CITE[lang] if asks else "")
    facts = [knowledge.facts[country, relation, lang] for relation in project.relations]
    task = Task(
        id=content_id("task_", "report", lang, query),
        kind="report",
        lang=lang,
        query=query,
        plan=list(project.plan),
        facts=[deep_search.fact_triple(fact) for fact in facts],
        split=knowledge.split(country),
        as_of=as_of,
        entity=country,
        metadata={"relations": list(project.relations), "subject": subject},
    )
    brief = Brief(
        kind="report",
        lang=lang,
        points=tuple(deep_search.rubric_point(knowledge, fact) for fact in facts),
        summary="; ".join(f"{step.goal}: {fact.value}" for step, fact in zip(project.plan, facts, strict=True)),
        vocabulary=sentences.relation_vocabulary(lang),
        asks_sources=asks,
    )
    return task, brief


def report_title(subject: str) -> str:
    """First line of a report."""
    return f"# {subject}"


def follows_plan(answer: str, task: Task) -> bool:
    """Whether a report has the title and then, in plan order, one sentence per step that states its relation."""
    lines = [line for line in answer.strip().splitlines() if line.strip()]
    if not lines or lines[0].strip() != report_title(task.metadata["subject"]):
        return False
    stated = [s.relation for line in lines[1:] if (s := sentences.parse_statement(line)) and not s.inverse]
    return stated == task.metadata["relations"]
