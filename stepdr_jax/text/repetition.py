"""How repetitive a text is, counted on units that work in Chinese and in English.

A unit is a word, a number, one Chinese character or one punctuation mark: close enough to tokens for the thresholds,
and independent of any tokenizer. Splitting on spaces, as English-centred filters do, is blind to Chinese.
"""

import re

from stepdr_jax.text.scripts import HAN

_UNIT = re.compile(rf"[{HAN}]|[^\W{HAN}]+|[^\w\s]")

# Shares of units inside an n-gram that occurred before, measured on good and on degenerate agent text
MAX_DUPLICATE_10 = 0.30
MAX_DUPLICATE_20 = 0.15
MIN_DISTINCT_4 = 0.5
LONG = 64  # units; in a shorter text one long name said twice is a large share of repeated 10-grams


def text_units(text: str) -> list[str]:
    """Splits a text into words, numbers, single Chinese characters and punctuation marks."""
    return _UNIT.findall(text)


def duplicate_share(sequence: list[str], n: int) -> float:
    """Share of units covered by an n-gram that occurred earlier in the same sequence; 0 for short texts."""
    if len(sequence) < n:
        return 0.0
    seen: set[tuple[str, ...]] = set()
    covered = bytearray(len(sequence))
    for start in range(len(sequence) - n + 1):
        gram = tuple(sequence[start : start + n])
        if gram in seen:
            covered[start : start + n] = b"\x01" * n
        else:
            seen.add(gram)
    return sum(covered) / len(sequence)


def distinct_share(sequence: list[str], n: int) -> float:
    """Number of different n-grams over the number of n-grams; 1 for texts shorter than n."""
    total = len(sequence) - n + 1
    if total <= 0:
        return 1.0
    return len({tuple(sequence[start : start + n]) for start in range(total)}) / total


def degenerate_reason(text: str) -> str | None:
    """Returns why a text is degenerate (which limit it breaks) or None."""
    sequence = text_units(text)
    if len(sequence) >= LONG and duplicate_share(sequence, 10) > MAX_DUPLICATE_10:
        return "repeated 10-grams"
    if len(sequence) >= LONG and duplicate_share(sequence, 20) > MAX_DUPLICATE_20:
        return "repeated 20-grams"
    if len(sequence) >= 16 and distinct_share(sequence, 4) < MIN_DISTINCT_4:
        return "few distinct 4-grams"
    return None
