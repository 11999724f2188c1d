"""What an episode costs: tokens times a price.

Every token of the context is counted once, as with an engine that keeps the context (ours) or a provider that caches
prefixes. The price is an input, so the currency is whatever the price is in.
"""

from collections.abc import Mapping


def episode_tokens(stats: Mapping[str, float]) -> float | None:
    """Tokens of an episode, sampled and given; None when its policy did not count them."""
    if "sampled_tokens" not in stats or "observed_tokens" not in stats:
        return None
    return float(stats["sampled_tokens"] + stats["observed_tokens"])


def episode_cost(stats: Mapping[str, float], price_per_million_tokens: float) -> float | None:
    """Price of an episode, in the unit of `price_per_million_tokens`; None when its tokens were not counted."""
    tokens = episode_tokens(stats)
    return None if tokens is None else tokens * price_per_million_tokens / 1e6
