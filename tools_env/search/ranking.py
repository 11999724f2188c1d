"""Ranking of passages: by relevance, and by authority between passages of comparable relevance.

Full-text scores alone confuse similar passages ("The capital of Guinea ...", "The capital of Papua New Guinea ...").
Relevance here adds the share of the query that the passage covers, the share of adjacent query words that stay
adjacent, and the share of the page's title that the query names.
"""

import dataclasses
from collections.abc import Callable, Sequence

from tools_env.search.text import is_cjk

TITLE_ONLY = 0.5  # credit for a query token that is in the page's title but not in the passage
ADJACENT = 0.2  # weight of the query's word pairs that stay together
TITLE = 0.2  # weight of the title's share that the query names
FULL_TEXT = 0.1  # weight of the engine's own score, which prefers the shorter of two passages
LATE = (
    0.002  # subtracted for each word before the last such pair: "The capital of X is X" before "X is the capital of X"
)
AUTHORITY = 0.05  # one level of authority outweighs at most this share of relevance
MIN_COVERAGE = 0.4  # a passage that covers less of the query is irrelevant ...
RARE = 0.5  # ... unless it has a query token whose weight is at least this share of an unseen token's


def weights(query: Sequence[str], idf: Callable[[str], float], unseen: float) -> dict[str, float]:
    """Returns each query token's weight. A token that no passage has weighs `unseen`.

    An unseen pair of CJK characters between two seen pairs weighs nothing, because it spans two words.
    """
    known = [idf(token) for token in query]
    weight = {}
    for i, (token, value) in enumerate(zip(query, known, strict=True)):
        straddles = is_cjk(token) and 0 < i < len(query) - 1 and known[i - 1] and known[i + 1]
        weight[token] = value or (0.0 if straddles else unseen)
    return weight


@dataclasses.dataclass(frozen=True, slots=True)
class Features:
    """Ranking features of a passage."""

    body: frozenset[str]  # tokens of the passage
    title: frozenset[str]  # tokens of its page's title
    title_weight: float  # their summed inverse document frequencies
    pairs: dict[tuple[str, str], int]  # adjacent tokens of the passage and their first position


def features(body: Sequence[str], title: Sequence[str], title_idf: Callable[[str], float]) -> Features:
    """Returns the features of a passage from its tokens and its title's, both in order."""
    pairs: dict[tuple[str, str], int] = {}
    for at, pair in enumerate(zip(body, body[1:], strict=False)):
        pairs.setdefault(pair, at)
    names = frozenset(title)
    return Features(frozenset(body), names, sum(map(title_idf, sorted(names))) or 1.0, pairs)


def relevance(
    query: Sequence[str],
    weight: dict[str, float],
    passage: Features,
    title_idf: Callable[[str], float],
    full_text: float,
    unseen: float,
) -> float:
    """Returns the relevance of one passage, 0 when it covers too little of the query.

    Args:
      query: tokens of the query, in order.
      weight: each query token's weight.
      passage: its features.
      title_idf: inverse document frequency of a title token.
      full_text: the engine's score divided by the best one's, in [0, 1].
      unseen: weight of a token that no passage has.
    """
    in_body, in_title = passage.body, passage.title
    covered, rare = 0.0, False
    for token, value in weight.items():
        if token in in_body:
            covered += value
            rare = rare or value >= RARE * unseen
        elif token in in_title:
            covered += TITLE_ONLY * value
    covered /= sum(weight.values()) or 1.0
    if covered < MIN_COVERAGE and not rare:
        return 0.0
    found = [passage.pairs[pair] for pair in zip(query, query[1:], strict=False) if pair in passage.pairs]
    adjacent = len(found) / (len(query) - 1) if found else 0.0
    late = min(max(found), 10) if found else 0
    named = sum(title_idf(token) for token in weight if token in in_title)
    return covered + ADJACENT * adjacent + TITLE * named / passage.title_weight + FULL_TEXT * full_text - LATE * late


def boosted(relevance: float, authority: int) -> float:
    """Returns the sort key: authority decides only when relevances differ by a small share."""
    return relevance * (1.0 + AUTHORITY * authority)


FUSION = 60  # reciprocal-rank fusion's constant (Cormack, Clarke and Buettcher, SIGIR 2009)


def fused(rankings: Sequence[Sequence[str]]) -> list[str]:
    """Returns all ranked items in order of summed reciprocal ranks; ties go by name."""
    score: dict[str, float] = {}
    for ranking in rankings:
        for rank, name in enumerate(ranking, 1):
            score[name] = score.get(name, 0.0) + 1.0 / (FUSION + rank)
    return sorted(score, key=lambda name: (-round(score[name], 9), name))


def promoted(order: Sequence[str], measures: Callable[[str], Sequence[float]], authority: Callable[[str], int]):
    """Returns `order` with passages of higher authority moved up past comparable ones.

    Ranks do not show how much two passages differ. So a passage passes another only if by every measure of relevance
    its boosted value is at least the other's.
    """
    done: list[str] = []
    for name in order:
        at = len(done)
        while at and authority(name) > authority(done[at - 1]) and _comparable(name, done[at - 1], measures, authority):
            at -= 1
        done.insert(at, name)
    return done


def _comparable(name: str, other: str, measures, authority) -> bool:
    pairs = zip(measures(name), measures(other), strict=True)
    return all(boosted(own, authority(name)) >= boosted(its, authority(other)) for own, its in pairs)
