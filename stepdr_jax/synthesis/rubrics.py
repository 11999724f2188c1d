"""Rubrics by two-step reverse synthesis (paper section 4.3.1), in programmatic form.

Step 1 starts from the hidden brief of a task (what is really wanted) and writes atomic rubrics with a role each:
`explicit` (the task asks for it in words), `implicit` (good work includes it) or `negative` (a flaw). Step 2 sees the
rubrics without their roles, and the task as the user reads it, and assigns roles again with a reason: an explicit
rubric must point at a span of the task. Any difference discards the sample. A consistency check of brief, rubrics and
task follows. Rubrics are atomic, verifiable, and carry the check that a programmatic judge runs.
"""

import dataclasses
import re

from stepdr_jax.records import Rubric, RubricSet, Task, content_id
from stepdr_jax.text.matching import normalize, states_value

FLAWS = frozenset({"unresolved_citation", "degenerate", "states_wrong"})
SOURCE_REQUEST = re.compile(r"[Cc]ite[^.?!]*source|[Cc]ite[^.?!]*evidence|注明来源|给出依据")
VERDICT_REQUEST = re.compile(
    r"[Ii]s (?:that|this) (?:right|true)|[Cc]heck (?:it|this)|[Tt]rue or false|对吗|核实|是否属实"
)


@dataclasses.dataclass(frozen=True)
class Point:
    """One fact the brief wants. `wrong`: values that other pages give; stating one is a flaw."""

    topic: str  # what is asked for, with its subject: "capital of Austria"
    words: tuple[str, ...]  # by which a request asks for it: "neighbour", "neighbours"
    subject: str
    accepted: tuple[str, ...] = ()  # any of these states the fact
    required: tuple[str, ...] = ()  # or all of these, for lists
    wrong: tuple[str, ...] = ()


@dataclasses.dataclass(frozen=True)
class Brief:
    """The hidden task summary: what a task wants, before it is written as a request."""

    kind: str
    lang: str
    points: tuple[Point, ...]
    summary: str
    vocabulary: tuple[str, ...]  # words by which requests in this language ask for any fact
    hidden_entity: str = ""  # a middle entity that the task may not name and a good answer does
    verdict: str = ""  # supported or refuted, for claims
    asks_sources: bool = False


def _value_check(kind: str, point: Point) -> dict:
    check: dict = {"kind": kind}
    if point.required and kind == "states":
        check["all"] = list(point.required)
    else:
        check["any"] = list(point.accepted or point.required)
    if kind == "cites_support":
        check["about"] = [point.subject]
    return check


def step_one(brief: Brief) -> list[Rubric]:
    """Writes the rubrics of a brief, roles included. Weights follow how much of the request a rubric stands for."""
    rows: list[tuple[str, float, str, str, dict]] = []  # criterion, weight, role, dimension, check
    several = len(brief.points) > 1
    if brief.verdict:
        rows.append(
            (
                f"Judges the claim as {brief.verdict}",
                5,
                "explicit",
                "instruction following",
                {"kind": "verdict", "value": brief.verdict},
            )
        )
    for point in brief.points:
        stated = "; ".join(point.required or point.accepted[:1])
        weight = 2 if brief.verdict else 3 if several else 5
        role = "implicit" if brief.verdict else "explicit"  # a claim's true value is good form, not asked for
        rows.append(
            (f"States the {point.topic}: {stated}", weight, role, "completeness", _value_check("states", point))
        )
        rows.append(
            (
                f"Cites a passage that supports the {point.topic}",
                2 if several else 3,
                "explicit" if brief.asks_sources else "implicit",
                "references",
                _value_check("cites_support", point),
            )
        )
        if point.wrong and not brief.verdict:
            rows.append(
                (
                    f"States a wrong value for the {point.topic}",
                    -2,
                    "negative",
                    "accuracy",
                    {"kind": "states_wrong", "any": list(point.wrong)},
                )
            )
    if brief.hidden_entity:
        rows.append(
            (
                f"Names {brief.hidden_entity}",
                1,
                "implicit",
                "synthesis",
                {"kind": "states", "any": [brief.hidden_entity]},
            )
        )
    rows.append(("Cites authoritative sources only", 2, "implicit", "references", {"kind": "authoritative"}))
    rows.append(("Cites a source that was never seen", -3, "negative", "references", {"kind": "unresolved_citation"}))
    rows.append(("Repeats itself or is padded", -2, "negative", "communication", {"kind": "degenerate"}))
    return [
        Rubric(rid=f"r{number}", criterion=criterion, weight=weight, role=role, dimension=dimension, check=check)
        for number, (criterion, weight, role, dimension, check) in enumerate(rows, 1)
    ]


@dataclasses.dataclass(frozen=True)
class Reassessment:
    role: str
    why: str
    span: str | None = None


def step_two(criterion: str, check: dict, query: str, vocabulary: tuple[str, ...]) -> Reassessment:
    """Assigns a role from the task's text alone: the rubric's own role and weight are not shown here."""
    kind = check.get("kind")
    if kind in FLAWS:
        return Reassessment("negative", "the criterion describes a flaw")
    if kind == "verdict":
        if match := VERDICT_REQUEST.search(query):
            return Reassessment("explicit", "the task asks for a verdict", match.group())
        return Reassessment("implicit", "no verdict is asked for")
    if kind == "cites_support":
        if match := SOURCE_REQUEST.search(query):
            return Reassessment("explicit", "the task asks for sources", match.group())
        return Reassessment("implicit", "good research cites, the task does not say so")
    if kind == "states":
        values = [*check.get("any", ()), *check.get("all", ())]
        if VERDICT_REQUEST.search(query):
            return Reassessment("implicit", "the task asks whether a claim holds, not for the value")
        if any(states_value(query, value) for value in values):
            return Reassessment("explicit", "the task names it", next(v for v in values if states_value(query, v)))
        head = criterion.split(":")[0]
        asked = [word for word in vocabulary if states_value(head, word) and states_value(query, word)]
        if asked:
            return Reassessment("explicit", "the task asks for it by name", max(asked, key=len))
        return Reassessment("implicit", "the task does not name it")
    return Reassessment("implicit", "a property of good work that the task does not mention")


def consistency(brief: Brief, rubrics: list[Rubric], query: str) -> dict:
    """Checks brief, rubrics and task against each other.

    Returns `summary_task` (1 to 5: how much of the brief the task's words carry), `relevant` (share of value rubrics
    whose relation the task or the brief names) and `contradiction` (a value both wanted and punished).
    """
    named = [point for point in brief.points if any(states_value(query, word) for word in point.words)]
    share = len(named) / max(len(brief.points), 1)
    wanted = {normalize(v) for r in rubrics if r.weight > 0 for v in [*r.check.get("any", ()), *r.check.get("all", ())]}
    punished = {normalize(v) for r in rubrics if r.check.get("kind") == "states_wrong" for v in r.check["any"]}
    about_values = [r for r in rubrics if r.check.get("kind") == "cites_support"]
    relevant = sum(any(point.topic in r.criterion for point in brief.points) for r in about_values) / max(
        len(about_values), 1
    )
    return {
        "summary_task": 1 + round(4 * share),
        "relevant": relevant,
        "contradiction": sorted(wanted & punished),
    }


def synthesize_rubrics(task: Task, brief: Brief) -> RubricSet:
    """Runs both steps and the consistency check; `kept` and `drop_reason` say what came of it."""
    rubrics = step_one(brief)
    first = {rubric.rid: rubric.role for rubric in rubrics}
    again = {rubric.rid: step_two(rubric.criterion, rubric.check, task.query, brief.vocabulary) for rubric in rubrics}
    second = {rid: assessment.role for rid, assessment in again.items()}
    checks = consistency(brief, rubrics, task.query)
    checks["summary"] = brief.summary
    checks["spans"] = {rid: assessment.span for rid, assessment in again.items() if assessment.span}
    different = [rid for rid in first if first[rid] != second[rid]]
    reason = None
    if different:
        reason = "roles disagree"
        checks["disagreement"] = {rid: [first[rid], second[rid], again[rid].why] for rid in different}
    elif checks["contradiction"]:
        reason = "rubrics contradict"
    elif checks["summary_task"] < 4 or checks["relevant"] < 0.95:
        reason = "brief and task differ"
    return RubricSet(
        id=content_id("rubrics_", task.id),
        task_id=task.id,
        rubrics=rubrics,
        step1_roles=first,
        step2_roles=second,
        consistency=checks,
        kept=reason is None,
        drop_reason=reason,
    )
