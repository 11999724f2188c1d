"""Questions with one checkable answer: single facts, two hops through the graph, and walks along links.

Two-hop questions never name the entity in the middle ("the country whose capital is Vienna"), must have exactly one
answer, and may not contain it (paper section 3.2.1). Relation words stay those of the pages, so that a search query can
be copied out of the question.
"""

import collections
import dataclasses
import random

import numpy as np

from stepdr_jax.records import Answer, Document, PlanStep, Task, Triple, content_id
from stepdr_jax.synthesis import graph
from stepdr_jax.synthesis.rubrics import Brief, Point
from stepdr_jax.synthesis.scripted import sentences
from stepdr_jax.synthesis.scripted.knowledge import Fact, Knowledge
from stepdr_jax.text.matching import normalize, states_value

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
CITE_CHARS = 22  # of a citation mark after a passage
# relations whose value can stand for the country that has it
CLUES = {"en": ("capital", "calling_code", "demonym"), "zh": ("capital", "calling_code")}
ASKED = ("capital", "currency", "language", "region", "calling_code", "area", "population")


def clue_phrase(relation: str, value: str, lang: str) -> str:
    """Describes a country without naming it: "country whose capital is Vienna", "首都是维也纳的国家"."""
    if lang == "zh":
        return f"{sentences.ZH[relation]}是{value}的国家"
    return f"country whose {sentences.EN[relation]} is {value}"


def gold_answer(knowledge: Knowledge, fact: Fact) -> Answer:
    """The gold value with its aliases (the other language's wording)."""
    if len(fact.values) > 1:
        return Answer(value="; ".join(fact.values), type="list")
    other = knowledge.facts.get((fact.country, fact.relation, "en" if fact.lang == "zh" else "zh"))
    number = fact.value.replace(",", "").isdigit()
    aliases = [other.value] if other and len(other.values) == 1 and other.value != fact.value else []
    return Answer(value=fact.value, aliases=aliases, type="number" if number else "entity")


def rubric_point(knowledge: Knowledge, fact: Fact) -> Point:
    """The fact as a rubric point."""
    gold = gold_answer(knowledge, fact)
    wrong = tuple(other.value for other in knowledge.wrong.get((fact.country, fact.relation, fact.lang), ()))
    subject = knowledge.countries[fact.country].name(fact.lang)
    topic, words = (
        sentences.topic_of(fact.relation, subject, fact.lang),
        sentences.relation_forms(fact.relation, fact.lang),
    )
    if gold.type == "list":
        return Point(topic, words, subject, required=fact.values)
    return Point(topic, words, subject, accepted=(gold.value, *gold.aliases), wrong=wrong)


def fact_triple(fact: Fact) -> Triple:
    return Triple(head=fact.country, relation=fact.relation, tail=fact.value)


def fact_task(
    knowledge: Knowledge, country: str, relation: str, lang: str, rng: random.Random, as_of: str
) -> tuple[Task, Brief] | None:
    """A question that one search settles; None when it holds its own answer ("the capital of Djibouti")."""
    fact = knowledge.facts[country, relation, lang]
    topic = sentences.topic_of(relation, knowledge.countries[country].name(lang), lang)
    gold = gold_answer(knowledge, fact)
    if any(states_value(topic, value) for value in (*fact.values, *gold.aliases)):
        return None
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
    if knowledge.by_value.get((first.relation, lang, normalize(first.value)), ()) != (country,):
        return None
    described = clue_phrase(first.relation, first.value, lang)
    subject = described if lang == "zh" else "the " + described
    topic = sentences.topic_of(second.relation, subject, lang)
    asks = rng.random() < ASK_SOURCES_SHARE
    query = rng.choice(ASK[lang]).format(topic=topic) + (CITE[lang] if asks else "")
    gold = gold_answer(knowledge, second)
    if any(states_value(query, value) for value in (name, *second.values, *gold.aliases)):
        return None
    plan = [
        PlanStep(goal=described, query=described),
        PlanStep(goal=topic, query=sentences.topic_of(second.relation, "{0}", lang), depends_on=[0]),
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
        answer=gold_answer(knowledge, last),
        plan=plan,
        facts=[fact_triple(fact) for fact in facts],
        split=knowledge.split(last.country),
        as_of=as_of,
        entity=last.country,
        metadata={"relations": [fact.relation for fact in facts], "subject": name},
    )
    brief = Brief(
        kind=kind,
        lang=lang,
        points=(rubric_point(knowledge, last),),
        summary=f"{sentences.topic_of(last.relation, name, lang)}: {last.value}",
        vocabulary=sentences.relation_vocabulary(lang),
        hidden_entity=hidden,
        asks_sources=asks_sources,
    )
    return task, brief


def search_query(fact: Fact, knowledge: Knowledge) -> str:
    """What is typed to find a fact of a known subject."""
    return sentences.topic_of(fact.relation, knowledge.countries[fact.country].name(fact.lang), fact.lang)


def subgraph_relations(
    knowledge: Knowledge,
    triples: list[Triple],
    *,
    seed_degree: tuple[int, int],
    nodes: tuple[int, int],
    super_node_degree: int,
    seed: int,
) -> dict[str, set[str]]:
    """Samples a subgraph around every seed entity; returns country -> relations of its facts inside some subgraph.

    A question may only use edges of a sampled subgraph (paper section 3.2.1).
    """
    whole = graph.from_triples(triples)
    rng = np.random.default_rng([seed, 0x5EED])
    found: dict[str, set[str]] = collections.defaultdict(set)
    for start in whole.seeds(seed_degree):
        sampled = graph.sample_subgraph(whole, int(start), rng, nodes=nodes, super_node_degree=super_node_degree)
        if sampled is None:
            continue
        for inside in graph.triples_within(whole, sampled, triples):
            if inside.head in knowledge.countries:
                found[inside.head].add(inside.relation)
    return dict(found)


# -------------------------------------------------------------------------------------------------------------- walks


@dataclasses.dataclass(frozen=True)
class LinkWalk:
    """A path along links from page to page, and a fact of the last page (paper section 3.2.2)."""

    lang: str
    urls: tuple[str, ...]
    names: tuple[str, ...]  # titles of these pages
    fact: Fact


def link_walks(
    knowledge: Knowledge, documents: list[Document], *, max_chars: int, page_chars: int, seed: int
) -> dict[str, list[LinkWalk]]:
    """Walks the links between authoritative pages without a goal; returns last country -> walks that end at its page.

    Walks stay within one language and one split, and are kept when an episode can hold the pages on the way; the
    shortest ones are a single page whose address is given.

    Args:
        max_chars: characters that the pages of a walk may show together.
        page_chars: characters that the tool host shows of one page.
        seed: of the walks.
    """
    pages = {document.url: document for document in documents if document.authority == 2}
    home = {found[0].url: key for key, found in knowledge.pages.items()}

    def group(url: str) -> tuple[str, bool]:
        page = pages[url]
        held = home[url][0] in knowledge.heldout if url in home else page.title in knowledge.private
        return page.lang, held

    def shown(url: str) -> int:
        return min(page_chars, sum(len(line) + CITE_CHARS for line in pages[url].text.splitlines()[1:]))

    links = {
        url: [target for target in targets if target in home and group(target) == group(url)]
        for url, targets in graph.page_links(list(pages.values())).items()
    }
    rng = np.random.default_rng([seed, 0x3A1C])
    found: dict[str, list[LinkWalk]] = collections.defaultdict(list)
    for start in sorted(links):
        path = graph.random_walk(links, start, rng, max_hops=int(rng.integers(0, 3)), min_pages=1)
        if path is None or path[-1] not in home or sum(map(shown, path)) > max_chars:
            continue
        country, lang = home[path[-1]]
        visible = {
            statement.relation
            for line in _shown_part(pages[path[-1]].text, page_chars)
            if (statement := sentences.parse_statement(sentences.strip_markup(line)))
        }
        relations = [r for r in knowledge.relations(country, lang) if r in ASKED and r in visible]
        if relations:
            fact = knowledge.facts[country, relations[int(rng.integers(len(relations)))], lang]
            found[country].append(LinkWalk(lang, tuple(path), tuple(pages[url].title for url in path), fact))
    return dict(found)


def _shown_part(text: str, chars: int) -> list[str]:
    """The passages of a page that fit into so many characters with their citation marks."""
    lines, used = [], 0
    for line in text.splitlines()[1:]:
        used += len(line) + CITE_CHARS
        if used > chars:
            break
        lines.append(line)
    return lines


def walk_task(knowledge: Knowledge, walk: LinkWalk, rng: random.Random, as_of: str) -> tuple[Task, Brief] | None:
    """The question at the end of a walk: where to start, which links to follow, what to read there."""
    lang, fact = walk.lang, walk.fact
    topic = sentences.topic_of(fact.relation, knowledge.countries[fact.country].name(lang), lang)
    if lang == "zh":
        steps = f"，沿链接到{'，再到'.join(walk.names[1:])}" if walk.names[1:] else ""
        query = f"打开{walk.urls[0]}{steps}。{topic}是什么？"
    else:
        steps = f" and follow the links to {', then to '.join(walk.names[1:])}" if walk.names[1:] else ""
        query = f"Open {walk.urls[0]}{steps}. What is the {topic}?"
    if any(states_value(topic, value) for value in fact.values):
        return None
    plan = [PlanStep(goal=name, query=url) for name, url in zip(walk.names, walk.urls, strict=True)]
    task, brief = _task(knowledge, "doc_walk", lang, query, [fact], False, as_of, plan)
    task.metadata |= {"urls": list(walk.urls), "names": list(walk.names)}
    return task, brief
