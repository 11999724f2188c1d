"""Questions with one checkable answer: single facts, two hops through the graph, and walks along links.

Two-hop questions never name the entity in the middle ("the country whose capital is Vienna"), must have exactly one
answer, and may not contain it (paper section 3.2.1). Relation words stay those of the pages, so that a search query can
be copied out of the question.
"""

import collections
import dataclasses
import random

from stepdr_jax.judge.matching import contains, normalise
from stepdr_jax.records import Answer, Document, PlanStep, Task, Triple, content_id
from stepdr_jax.synthesis import sentences
from stepdr_jax.synthesis.knowledge import Fact, Knowledge
from stepdr_jax.synthesis.rubrics import Brief, Point

ASK = {
    "en": (
        "What is the {topic}?",
        "Tell me the {topic}.",
        "Find the {topic}.",
        "I need the {topic}.",
        "Look up the {topic}.",
        "Please find the {topic}.",
        "Do you know the {topic}?",
    ),
    "zh": (
        "{topic}是什么？",
        "请问{topic}是什么？",
        "查一下{topic}。",
        "告诉我{topic}。",
        "我想知道{topic}。",
        "请查找{topic}。",
    ),
}
CITE = {"en": " Cite the source.", "zh": "请注明来源。"}
ASK_SOURCES_SHARE = 0.3
# relations whose value can stand for the country that has it
CLUES = {"en": ("capital", "calling_code", "demonym"), "zh": ("capital", "calling_code")}
ASKED = ("capital", "currency", "language", "region", "calling_code", "area", "population")


def clue(relation: str, value: str, lang: str) -> str:
    """Describes a country without naming it: "country whose capital is Vienna", "首都是维也纳的国家"."""
    if lang == "zh":
        return f"{sentences.ZH[relation]}是{value}的国家"
    return f"country whose {sentences.EN[relation]} is {value}"


def answer(knowledge: Knowledge, fact: Fact) -> Answer:
    """The gold value with its aliases (the other language's wording)."""
    if len(fact.values) > 1:
        return Answer(value="; ".join(fact.values), type="list")
    other = knowledge.facts.get((fact.country, fact.relation, "en" if fact.lang == "zh" else "zh"))
    number = fact.value.replace(",", "").isdigit()
    aliases = [other.value] if other and len(other.values) == 1 and other.value != fact.value else []
    return Answer(value=fact.value, aliases=aliases, type="number" if number else "entity")


def point(knowledge: Knowledge, fact: Fact) -> Point:
    """The fact as a rubric point."""
    gold = answer(knowledge, fact)
    wrong = tuple(other.value for other in knowledge.wrong.get((fact.country, fact.relation, fact.lang), ()))
    subject = knowledge.countries[fact.country].name(fact.lang)
    if gold.type == "list":
        return Point(fact.relation, subject, required=fact.values, wrong=())
    return Point(fact.relation, subject, accepted=(gold.value, *gold.aliases), wrong=wrong)


def triple(fact: Fact) -> Triple:
    return Triple(head=fact.country, relation=fact.relation, tail=fact.value)


def fact_task(
    knowledge: Knowledge, country: str, relation: str, lang: str, rng: random.Random, as_of: str
) -> tuple[Task, Brief]:
    """A question that one search settles."""
    fact = knowledge.facts[country, relation, lang]
    topic = sentences.topic(relation, knowledge.countries[country].name(lang), lang)
    asks = rng.random() < ASK_SOURCES_SHARE
    query = rng.choice(ASK[lang]).format(topic=topic) + (CITE[lang] if asks else "")
    return _task(knowledge, "fact", lang, query, [fact], asks, as_of, [PlanStep(goal=topic, query=topic)])


def two_hop_task(
    knowledge: Knowledge, first: Fact, second: Fact, rng: random.Random, as_of: str
) -> tuple[Task, Brief] | None:
    """A question through a country that it does not name; None when it would be ambiguous or give itself away.

    Args:
        first: the fact whose value describes the country.
        second: the fact of the same country that is asked for.
    """
    lang, country = first.lang, first.country
    if country != second.country or lang != second.lang or len(first.values) > 1:
        raise ValueError(f"expected two facts of one country in one language, got {first} and {second}")
    name = knowledge.countries[country].name(lang)
    # Latin letters are compared without case: "demonym ... is Austrian" holds the stem of the name and is still fuzzed
    if knowledge.by_value.get((first.relation, lang, normalise(first.value)), ()) != (country,):
        return None
    described = clue(first.relation, first.value, lang)
    subject = described if lang == "zh" else "the " + described
    topic = sentences.topic(second.relation, subject, lang)
    asks = rng.random() < ASK_SOURCES_SHARE
    query = rng.choice(ASK[lang]).format(topic=topic) + (CITE[lang] if asks else "")
    gold = answer(knowledge, second)
    if any(contains(query, value) for value in (name, *second.values, *gold.aliases)):
        return None
    plan = [
        PlanStep(goal=described, query=described),
        PlanStep(goal=topic, query=sentences.topic(second.relation, "{0}", lang), depends_on=[0]),
    ]
    return _task(knowledge, "deep_search", lang, query, [first, second], asks, as_of, plan, hidden=name)


def _task(
    knowledge: Knowledge,
    kind: str,
    lang: str,
    query: str,
    facts: list[Fact],
    asks_sources: bool,
    as_of: str,
    plan: list[PlanStep],
    hidden: str = "",
) -> tuple[Task, Brief]:
    last = facts[-1]
    name = knowledge.countries[last.country].name(lang)
    task = Task(
        id=content_id("task_", kind, lang, query),
        kind=kind,
        lang=lang,
        query=query,
        answer=answer(knowledge, last),
        plan=plan,
        facts=[triple(fact) for fact in facts],
        split=knowledge.split(last.country),
        as_of=as_of,
        entity=last.country,
        metadata={"relations": [fact.relation for fact in facts], "subject": name},
    )
    brief = Brief(
        kind=kind,
        lang=lang,
        points=(point(knowledge, last),),
        summary=f"{sentences.topic(last.relation, name, lang)}: {last.value}",
        hidden_entity=hidden,
        asks_sources=asks_sources,
    )
    return task, brief


def search_query(fact: Fact, knowledge: Knowledge) -> str:
    """What is typed to find a fact of a known subject."""
    return sentences.topic(fact.relation, knowledge.countries[fact.country].name(fact.lang), fact.lang)


# -------------------------------------------------------------------------------------------------------------- walks


@dataclasses.dataclass(frozen=True)
class Walk:
    """A path along links from page to page, and a fact of the last page (paper section 3.2.2)."""

    lang: str
    urls: tuple[str, ...]
    names: tuple[str, ...]  # of the countries whose pages these are
    fact: Fact


def walks(knowledge: Knowledge, documents: list[Document], rng: random.Random) -> dict[str, list[Walk]]:
    """Walks the links between country pages without a goal; returns last country -> walks that end there.

    A walk starts at a random page, takes one or two links, never returns to a page, and stays within one split.
    """
    home = {page.url: (country, lang) for (country, lang), pages in knowledge.pages.items() for page in pages[:1]}
    links = {
        document.url: list(
            dict.fromkeys(link.url for link in document.links if link.url in home and link.url != document.url)
        )
        for document in documents
        if document.url in home
    }
    found = collections.defaultdict(list)
    for start in sorted(links):
        path = [start]
        for _ in range(rng.choice((1, 1, 2))):
            country, lang = home[path[-1]]
            onward = [
                url
                for url in links.get(path[-1], [])
                if url not in path
                and home[url][1] == lang
                and knowledge.split(home[url][0]) == knowledge.split(country)
            ]
            if not onward:
                break
            path.append(rng.choice(onward))
        country, lang = home[path[-1]]
        relations = [r for r in knowledge.relations(country, lang) if r in ASKED]
        if len(path) < 2 or not relations:
            continue
        names = tuple(knowledge.countries[home[url][0]].name(lang) for url in path)
        found[country].append(Walk(lang, tuple(path), names, knowledge.facts[country, rng.choice(relations), lang]))
    return dict(found)


def walk_task(knowledge: Knowledge, walk: Walk, rng: random.Random, as_of: str) -> tuple[Task, Brief]:
    """The question at the end of a walk: where to start, which links to follow, what to read there."""
    lang, fact = walk.lang, walk.fact
    if lang == "zh":
        steps = "，再到".join(walk.names[1:])
        query = f"打开{walk.urls[0]}，沿链接到{steps}。{sentences.topic(fact.relation, walk.names[-1], lang)}是什么？"
    else:
        steps = ", then to ".join(walk.names[1:])
        query = (
            f"Open {walk.urls[0]} and follow the links to {steps}. "
            f"What is the {sentences.topic(fact.relation, walk.names[-1], lang)}?"
        )
    plan = [PlanStep(goal=name, query=url) for name, url in zip(walk.names, walk.urls, strict=True)]
    task, brief = _task(knowledge, "doc_walk", lang, query, [fact], False, as_of, plan)
    task.metadata |= {"urls": list(walk.urls), "names": list(walk.names)}
    return task, brief
