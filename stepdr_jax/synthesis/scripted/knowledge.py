"""What the pages say, as data: facts of authoritative pages, contradicting values of the others, and the split.

Facts are read from the pages themselves, not from the source the pages were made from: a task is only made when its
answer can be found. Held-out countries are drawn here, once; nothing about them may reach training data.
"""

import collections
import dataclasses
import functools
import random
from collections.abc import Iterable
from pathlib import Path

from stepdr_jax.records import Document
from stepdr_jax.synthesis import corpora
from stepdr_jax.synthesis.renaming import Renamer
from stepdr_jax.synthesis.scripted import sentences
from stepdr_jax.text.matching import normalize
from stepdr_jax.text.scripts import has_chinese

LANGS = ("en", "zh")
MAX_VALUES = 4  # elements of a list that is asked for; an answer must fit into one turn of a small model


@dataclasses.dataclass(frozen=True)
class Country:
    id: str
    en: str
    zh: str

    def name(self, lang: str) -> str:
        return self.zh if lang == "zh" else self.en


@dataclasses.dataclass(frozen=True)
class Fact:
    """One fact in one language, on one page."""

    country: str  # country id
    relation: str
    lang: str
    value: str  # as the page says it, unit and article removed
    values: tuple[str, ...]  # its elements
    sentence: str  # the passage
    url: str
    authority: int


@dataclasses.dataclass(frozen=True)
class Knowledge:
    """The facts of the offline web, the split, and all names.

    Attributes:
        countries: id -> Country, in a fixed order.
        facts: (country, relation, lang) -> the authoritative fact.
        wrong: (country, relation, lang) -> facts of unreliable pages whose value differs.
        heldout: ids of countries whose questions are for evaluation only.
        kinds: name -> kind, both languages, of every entity.
        private: names that would give a held-out answer away: held-out countries and what only they have.
        pages: (country, lang) -> authoritative documents about the country, richest first.
    """

    countries: dict[str, Country]
    facts: dict[tuple[str, str, str], Fact]
    wrong: dict[tuple[str, str, str], tuple[Fact, ...]]
    heldout: frozenset[str]
    kinds: dict[str, str]
    private: frozenset[str]
    pages: dict[tuple[str, str], tuple[Document, ...]]

    def split(self, country: str) -> str:
        return "heldout" if country in self.heldout else "train"

    def relations(self, country: str, lang: str) -> list[str]:
        """Relations worth asking for: stated, and with at most MAX_VALUES values."""
        return [
            relation
            for relation in sentences.RELATIONS
            if (fact := self.facts.get((country, relation, lang))) and len(fact.values) <= MAX_VALUES
        ]

    @functools.cached_property
    def by_value(self) -> dict[tuple[str, str, str], tuple[str, ...]]:
        """(relation, lang, normalised value) -> the countries that have it as one of their values."""
        index = collections.defaultdict(list)
        for (country, relation, lang), fact in self.facts.items():
            for value in fact.values:
                index[relation, lang, normalize(value)].append(country)
        return {key: tuple(found) for key, found in index.items()}

    def renamer(self) -> Renamer:
        """A renamer that knows all names and swaps in only names that belong to training countries."""
        swap = collections.defaultdict(list)
        for name, kind in self.kinds.items():
            if name not in self.private:
                swap[kind, "zh" if has_chinese(name) else "en"].append(name)
        return Renamer(self.kinds, swap)


def split_entities(ids: Iterable[str], share: float, seed: int) -> frozenset[str]:
    """Draws the held-out entities: `share` of them, rounded, at least one when share is above 0."""
    ids = sorted(ids)
    count = max(1, round(share * len(ids))) if share > 0 else 0
    return frozenset(random.Random(f"split {seed}").sample(ids, count))


def load_knowledge(world_dir: str | Path, *, heldout_share: float, seed: int) -> Knowledge:
    """Reads documents and entities of the offline web. Raises UserError when one is absent or broken."""
    return from_pages(
        corpora.read_documents(world_dir),
        corpora.read_entities(world_dir).values(),
        heldout_share=heldout_share,
        seed=seed,
    )


def from_pages(
    documents: list[Document], entities: Iterable[corpora.Entity], *, heldout_share: float, seed: int
) -> Knowledge:
    """Reads the facts out of the pages.

    Args:
        documents: pages; those with authority 2 are believed, where two of them differ the later one.
        entities: what the pages are about.
    """
    entities = sorted(entities, key=lambda entity: entity.id)
    countries = {
        entity.id: Country(entity.id, entity.en, entity.zh)
        for entity in entities
        if entity.kind == "country" and entity.en and entity.zh
    }
    ids = {normalize(country.name(lang)): country.id for country in countries.values() for lang in LANGS}
    facts: dict[tuple[str, str, str], Fact] = {}
    believed: dict[tuple[str, str, str], str] = {}
    claims = collections.defaultdict(list)
    pages = collections.defaultdict(list)
    for document in documents:
        subjects = collections.Counter()
        for line in document.text.splitlines():
            line = sentences.strip_markup(line)
            statement = sentences.parse_statement(line)
            country = ids.get(normalize(statement.subject)) if statement else None
            if country is None or statement.inverse or statement.lang != document.lang:
                continue
            subjects[country] += 1
            key = (country, statement.relation, document.lang)
            fact = Fact(*key, statement.value, statement.values, line, document.url, document.authority)
            if document.authority < 2:
                claims[key].append(fact)
            elif key not in facts or (document.published_at or "") > believed[key]:
                if key in facts and normalize(facts[key].value) == normalize(fact.value):
                    continue
                facts[key], believed[key] = fact, document.published_at or ""
        if subjects and document.authority == 2:
            country, count = subjects.most_common(1)[0]
            pages[country, document.lang].append((-count, document.url, document))
    wrong = {}
    for key, said in claims.items():
        different = {
            normalize(fact.value): fact
            for fact in said
            if key in facts and normalize(fact.value) != normalize(facts[key].value)
        }
        if different:
            wrong[key] = tuple(different.values())
    heldout = split_entities(countries, heldout_share, seed)
    kinds = {name: entity.kind for entity in entities for name in (entity.en, entity.zh) if name}
    for (_, relation, _), fact in facts.items():
        if relation in ("capital", "demonym", "currency", "language", "region"):
            for value in fact.values:
                kinds.setdefault(value, "city" if relation == "capital" else relation)
    return Knowledge(
        countries=countries,
        facts=facts,
        wrong=wrong,
        heldout=heldout,
        kinds=kinds,
        private=_private(countries, facts, heldout),
        pages={key: tuple(page for *_, page in sorted(found, key=lambda row: row[:2])) for key, found in pages.items()},
    )


def _private(countries: dict[str, Country], facts: dict, heldout: frozenset[str]) -> frozenset[str]:
    """Held-out countries' names, capitals and demonyms, unless a training country's fact has the same word."""
    held, shared = set(), set()
    for country in countries.values():
        (held if country.id in heldout else shared).update((country.en, country.zh))
    for (country, relation, _), fact in facts.items():
        if country in heldout and relation in ("capital", "demonym"):
            held.update(fact.values)
        elif country not in heldout and relation != "neighbour":
            shared.update(fact.values)
    return frozenset(held - shared)
