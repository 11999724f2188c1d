"""The order of found passages: relevance first, authority only between passages of comparable relevance.

Full-text scores alone confuse same-shaped passages ("The capital of Guinea ...", "The capital of Papua New Guinea
..."). Relevance here adds how much of the query the passage covers, how many of the query's neighbouring words stay
neighbours, and how much of the page's title the query names.
"""

from collections.abc import Callable, Sequence

from tools_env.search.text import is_cjk

TITLE_ONLY = 0.5  # credit for a query token that stands in the page's title but not in the passage
ADJACENT = 0.2  # weight of the query's word pairs that stay together
TITLE = 0.2  # weight of the title's share that the query names
FULL_TEXT = 0.1  # weight of the engine's own score, which prefers the shorter of two passages
AUTHORITY = 0.05  # a step of authority wins over at most this share of relevance
MIN_COVERAGE = 0.4  # a passage that covers less of the query is about something else ...
RARE = 0.5  # ... unless it has a query token whose weight is at least this share of an unseen token's


def weights(query: Sequence[str], idf: Callable[[str], float], unseen: float) -> dict[str, float]:
    """Returns each query token's weight. A token that no passage has weighs `unseen`: the query asks for it in vain.

    An unseen pair of CJK characters between two seen pairs weighs nothing: it straddles two words.
    """
    known = [idf(token) for token in query]
    weight = {}
    for i, (token, value) in enumerate(zip(query, known, strict=True)):
        straddles = is_cjk(token) and 0 < i < len(query) - 1 and known[i - 1] and known[i + 1]
        weight[token] = value or (0.0 if straddles else unseen)
    return weight


def relevance(
    query: Sequence[str],
    weight: dict[str, float],
    body: Sequence[str],
    title: Sequence[str],
    title_weight: Callable[[str], float],
    full_text: float,
    unseen: float,
) -> float:
    """Returns the relevance of one passage, 0 when it covers too little of the query.

    Args:
      query: tokens of the query, in order.
      weight: each query token's weight.
      body: tokens of the passage, in order.
      title: tokens of its page's title.
      title_weight: inverse document frequency of a title token.
      full_text: the engine's score divided by the best one's, in [0, 1].
      unseen: weight of a token that no passage has.
    """
    in_body, in_title = set(body), set(title)
    total = sum(weight.values()) or 1.0
    covered = sum(w if t in in_body else TITLE_ONLY * w if t in in_title else 0.0 for t, w in weight.items()) / total
    if covered < MIN_COVERAGE and not any(w >= RARE * unseen and t in in_body for t, w in weight.items()):
        return 0.0
    pairs = [(a, b) for a, b in zip(query, query[1:], strict=False)]
    kept = set(zip(body, body[1:], strict=False))
    adjacent = sum(pair in kept for pair in pairs) / len(pairs) if pairs else 0.0
    named = sum(title_weight(t) for t in in_title if t in weight)
    title_share = named / (sum(title_weight(t) for t in in_title) or 1.0)
    return covered + ADJACENT * adjacent + TITLE * title_share + FULL_TEXT * full_text


def boosted(relevance: float, authority: int) -> float:
    """Returns the sort key: authority decides only when relevance differs by less than its small share."""
    return relevance * (1.0 + AUTHORITY * authority)
