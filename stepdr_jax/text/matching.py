"""When a text states a value: normalization, and word boundaries in English and Chinese.

Nothing here knows about rubrics or tasks; the judge and the cleaning rules of synthesis share it.
"""

import functools
import re
import unicodedata
from collections.abc import Iterable

from stepdr_jax.text.scripts import HAN, has_chinese

# Between a Chinese character and a Latin letter or digit, where a word ends although \b sees none
_SEAM = re.compile(f"(?<=[{HAN}])(?=[0-9a-z])|(?<=[0-9a-z])(?=[{HAN}])")
_GROUPED = re.compile(r"(?<=\d)[, \u00a0\u202f'](?=\d{3}(?!\d))")
_QUOTES = str.maketrans({"’": "'", "‘": "'", "“": '"', "”": '"', "–": "-", "—": "-"})
# Zero-width characters, soft hyphens and direction marks: invisible, so they must not hide a value
_INVISIBLE = dict.fromkeys([0x00AD, *range(0x200B, 0x2010), *range(0x202A, 0x202F), *range(0x2060, 0x2065), 0xFEFF])


@functools.lru_cache(maxsize=65536)
def normalize(text: str) -> str:
    """NFKC, case-folded; single spaces, plain quotes, no thousands separators and no invisible characters."""
    text = unicodedata.normalize("NFKC", text.translate(_INVISIBLE)).translate(_QUOTES).casefold()
    text = _GROUPED.sub("", text)
    return " ".join(text.split())


@functools.lru_cache(maxsize=65536)
def _seamed(text: str) -> str:
    """Normalised text in which words of different scripts are apart: "人口是8527230。" states a whole number."""
    return _SEAM.sub("\x01", normalize(text))


@functools.lru_cache(maxsize=65536)
def _pattern(needle: str) -> re.Pattern:
    body = re.escape(needle)
    if has_chinese(needle):  # Chinese has no spaces: a substring is a mention
        return re.compile(body)
    # a number inside a longer one ("3" in "0.3" or "3.5") is another number
    before = r"(?<!\w)(?<!\d[.,])" if needle[:1].isdigit() else r"(?<!\w)"
    after = r"(?!\w)(?![.,]\d)" if needle[-1:].isdigit() else r"(?!\w)"
    return re.compile(before + body + after)


def states_value(text: str, value: str, *, longer_names: Iterable[str] = ()) -> bool:
    """Whether `text` states `value` as a whole word or number (a substring where the value is Chinese).

    Args:
        text: any text; citation marks should be stripped by the caller.
        value: what is looked for; the empty string is never stated.
        longer_names: names that may hold `value` inside them ("Equatorial Guinea" for "Guinea"); an occurrence inside
            one of them does not count.
    """
    needle = _seamed(value)
    if not needle:
        return False
    haystack = _seamed(text)
    if needle not in haystack:
        return False
    for name in longer_names:
        other = _seamed(name)
        if other != needle and needle in other and other in haystack:
            haystack = _pattern(other).sub("\x00", haystack)
    return _pattern(needle).search(haystack) is not None


def states_any(text: str, values: Iterable[str], *, longer_names: Iterable[str] = ()) -> bool:
    """Whether the text states at least one of the values."""
    return any(states_value(text, value, longer_names=longer_names) for value in values)
