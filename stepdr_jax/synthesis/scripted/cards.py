"""Cards: what one page states about one subject, real or invented, and how an observation shows it."""

import collections.abc
import dataclasses
import random
from collections.abc import Iterator, Mapping

from stepdr_jax.synthesis.renaming import citation_id, invented_name, invented_number
from stepdr_jax.synthesis.scripted import deep_search, sentences
from stepdr_jax.synthesis.scripted.knowledge import Knowledge

HOSTS = ("atlas.test", "gazette.test", "travelnotes.test", "quickfacts.test", "mirror.test")
RELIABLE = ("atlas.test", "gazette.test")
BORROWED_SHARE = 0.2  # of an invented subject's values that are another real subject's


@dataclasses.dataclass(frozen=True)
class Card:
    """What one page says about one subject: relation -> values, real or invented."""

    subject: str
    lang: str
    values: Mapping[str, tuple[str, ...]]

    def sentence(self, relation: str) -> str:
        return sentences.state_fact(relation, self.subject, self.values[relation], self.lang)

    def topic(self, relation: str) -> str:
        return sentences.topic_of(relation, self.subject, self.lang)


def real_card(knowledge: Knowledge, country: str, lang: str) -> Card:
    """The facts of a country as its pages state them."""
    values = {
        relation: knowledge.facts[country, relation, lang].values for relation in knowledge.relations(country, lang)
    }
    return Card(knowledge.countries[country].name(lang), lang, values)


def invented_value(relation: str, rng: random.Random, lang: str) -> str:
    """A value that fits a relation and is in no encyclopaedia."""
    if relation in ("population", "area", "calling_code"):
        digits = {"population": rng.randint(4, 9), "area": rng.randint(2, 7), "calling_code": rng.randint(2, 4)}[
            relation
        ]
        return invented_number(rng, "9" * digits)
    return invented_name(rng, lang, capitalized=relation != "currency" or lang == "zh")


class _Invented(collections.abc.Mapping):
    """The values of an invented subject, made when they are looked at: a row shows few of them."""

    def __init__(self, model: Card, rng: random.Random, swap: list[Card]) -> None:
        self._model, self._rng, self._swap = model, rng, swap
        self._made: dict[str, tuple[str, ...]] = {}

    def __getitem__(self, relation: str) -> tuple[str, ...]:
        if relation not in self._made:
            self._made[relation] = self._make(relation, self._model.values[relation])
        return self._made[relation]

    def __iter__(self) -> Iterator[str]:
        return iter(self._model.values)

    def __len__(self) -> int:
        return len(self._model.values)

    def _make(self, relation: str, old: tuple[str, ...]) -> tuple[str, ...]:
        if self._rng.random() < BORROWED_SHARE:
            other = self._rng.choice(self._swap)
            if relation in other.values:
                return other.values[relation]
        return tuple(invented_value(relation, self._rng, self._model.lang) for _ in old[:3])


def renamed_card(card: Card, rng: random.Random, swap: list[Card]) -> Card:
    """The same kind of facts about an invented subject; some values are borrowed from real cards of the language."""
    return Card(invented_name(rng, card.lang), card.lang, _Invented(card, rng, swap))


@dataclasses.dataclass(frozen=True)
class Shown:
    """One passage in an observation."""

    card: Card
    relation: str
    host: str
    id: str

    @property
    def quote(self) -> str:
        return f"{self.card.sentence(self.relation)} \\cite{{{self.id}}}"


def _date(rng: random.Random) -> str:
    return f"{rng.randint(2018, 2026)}-{rng.randint(1, 12):02d}-{rng.randint(1, 28):02d}"


def shown_passage(card: Card, relation: str, rng: random.Random, hosts: tuple[str, ...] = HOSTS) -> Shown:
    host = rng.choice(hosts) if rng.random() < 0.7 else invented_name(rng, capitalized=False) + ".test"
    return Shown(card, relation, host, citation_id(rng))


def render_search_results(shown: list[Shown], rng: random.Random) -> str:
    """Passages as a search shows them."""
    return "\n".join(
        f"{number}. {item.card.subject} | {item.host} | {_date(rng)}\n{item.quote}"
        for number, item in enumerate(shown, 1)
    )


def render_page(shown: list[Shown], rng: random.Random) -> str:
    """Passages as an opened page shows them."""
    first = shown[0]
    slug = "".join(letter if letter.isalnum() else "-" for letter in first.card.subject.lower())
    header = f"{first.card.subject} | http://{first.host}/{first.card.lang}/{slug} | {_date(rng)}"
    return "\n".join([header, *(item.quote for item in shown)])


def question_on(card: Card, relation: str, rng: random.Random) -> str:
    return rng.choice(deep_search.ASK[card.lang]).format(topic=card.topic(relation))
