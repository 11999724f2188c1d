r"""Renaming: the same episode or passage about other names, other numbers and other citation ids.

A model that has read "The capital of Austria is Vienna" often enough answers from memory. Replacing entities
consistently (Longpre et al. 2021, "Entity-based knowledge conflicts in question answering", use the same device to
measure memorisation) leaves copying from the observation as the only thing that works: the same text then teaches
reading instead of recall. Citation ids, numbers and names are all drawn anew for every copy.
"""

import functools
import random
import re
from collections.abc import Collection, Iterable, Mapping, Sequence

from stepdr_jax.records import Trajectory
from stepdr_jax.text.citations import CITATION_ID
from stepdr_jax.text.scripts import HAN, has_chinese

CONSONANTS = "bdfghjklmnprstvz"
VOWELS = "aeiou"
_ONSETS = (*"bcdfghjklmnprstvwz", "br", "dr", "gr", "kr", "pl", "st", "tr", "th", "sh", "ch", "kl", "sl", "")
_NUCLEI = (*"aeiouaeiouaeiou", "ai", "ea", "ia", "ou", "y")
_CODAS = ("", "", "", "", "", "", "", "", "n", "r", "l", "s", "m", "nd", "rt", "x", "k", "t")
# each as often as its parts are listed, so that open syllables with plain vowels are the common ones
_SYLLABLES = tuple(onset + nucleus + coda for onset in _ONSETS for nucleus in _NUCLEI for coda in _CODAS)
# Characters that Chinese transliterations of foreign names use: names made of them look like names.
_HANZI = (
    "阿巴贝比伯布查达德迪多杜厄恩尔法菲佛弗福戈格古哈海赫亨霍基吉加杰卡凯科克肯库拉莱兰朗劳勒雷里利莉林卢鲁"
    "伦罗洛马玛麦曼梅蒙米莫姆穆纳内尼诺努欧帕佩皮普奇乔切瑞萨塞桑沙圣施斯苏索塔泰坦特提托图瓦威维温文沃乌西希"
    "夏谢辛雅亚耶伊因尤约扎泽赞詹珍"
)
_WORD = re.compile(r"[0-9A-Za-z_\u00c0-\u00ff]+")
_HAN_PAIR = re.compile(f"[{HAN}]{{2}}")
_HAN_PAIRS = re.compile(f"(?=([{HAN}]{{2}}))")  # overlapping
# Whole numbers of two digits or more; not dates, decimals, list numbers, HTTP codes or parts of a word.
_NUMBERS = re.compile(r"(?<![\w.:-])(?<!HTTP )\d{2,}(?![\w:-])(?!\.\d)(?! characters)")


def citation_id(rng: random.Random) -> str:
    """A fresh id in the format of the tool host: `web_` and four consonant-vowel syllables."""
    return "web_" + "".join(rng.choice(CONSONANTS) + rng.choice(VOWELS) for _ in range(4))


def invented_name(rng: random.Random, lang: str = "en", *, capitalized: bool = True) -> str:
    """A pronounceable name that means nothing: "Kelora", "Stani Brux", "莫塔里"."""
    if lang == "zh":
        length = (2, 2, 3, 3, 4)[int(rng.random() * 5)]
        return "".join([_HANZI[int(rng.random() * len(_HANZI))] for _ in range(length)])
    name = _invented_word(rng)
    if not capitalized:
        return name
    return f"{name.capitalize()} {_invented_word(rng).capitalize()}" if rng.random() < 0.15 else name.capitalize()


def _invented_word(rng: random.Random) -> str:
    word = _SYLLABLES[int(rng.random() * len(_SYLLABLES))]
    for _ in range((1, 1, 1, 2, 2)[int(rng.random() * 5)]):
        word += _SYLLABLES[int(rng.random() * len(_SYLLABLES))]
    return word


def invented_number(rng: random.Random, like: str) -> str:
    """Another number with as many digits."""
    return str(rng.randint(10 ** (len(like) - 1), 10 ** len(like) - 1))


def misspell(name: str, rng: random.Random) -> str:
    """A typing error that a full-text search does not find: every word gets two swapped or changed letters."""
    if has_chinese(name):
        letters = list(name)
        for position in range(len(letters)):  # every character becomes another
            letters[position] = rng.choice([c for c in _HANZI if c not in name])
        return "".join(letters)

    def mistype(word: str) -> str:
        if len(word) < 4:
            return word + rng.choice("xqz")
        at = rng.randrange(1, len(word) - 2)
        swapped = word[:at] + word[at + 1] + word[at] + word[at + 2 :]
        return swapped if swapped != word else word[:at] + rng.choice("xqz") + word[at + 1 :]

    return " ".join(mistype(part) for part in name.split(" "))


class Renamer:
    """Finds known names in a text and replaces them consistently.

    Args:
        names: name -> kind ("country", "city", ...), in both languages. Chinese names of one character are ignored.
        swap: (kind, lang) -> real names that may stand in for another of their kind; held-out names must not be in it.
    """

    def __init__(self, names: Mapping[str, str], swap: Mapping[tuple[str, str], Sequence[str]] | None = None) -> None:
        self._kinds = {name: kind for name, kind in names.items() if len(name) > 1}
        self._swap = {key: tuple(values) for key, values in (swap or {}).items()}
        self._patterns: dict[str, re.Pattern] = {}
        self._by_start: dict[str, list[str]] = {}  # first word, or first two Chinese characters -> names
        for name in self._kinds:
            start = _HAN_PAIR.match(name) or _WORD.search(name)
            if start:
                self._by_start.setdefault(start.group(), []).append(name)

    def names_in(self, text: str) -> list[str]:
        """Known names that occur in the text as whole words (anywhere, if Chinese)."""
        starts = set(_WORD.findall(text)) | set(_HAN_PAIRS.findall(text))
        found = []
        for start in starts:
            for name in self._by_start.get(start, ()):
                if name in text:
                    if name not in self._patterns:
                        self._patterns[name] = _bounded((name,))
                    if self._patterns[name].search(text):
                        found.append(name)
        return sorted(found)

    def names_in_row(self, row: dict) -> list[str]:
        """Known names in the text fields of a serialized Trajectory or of a synthetic document."""
        return self.names_in("\n".join(_strings(row)))

    def fresh(self, name: str, rng: random.Random, swap_share: float, taken: set[str]) -> str:
        """A name to stand for `name`: a real one of its kind with probability `swap_share`, else an invented one."""
        lang = "zh" if has_chinese(name) else "en"
        real = self._swap.get((self._kinds.get(name, ""), lang), ())
        for _ in range(100):
            if real and rng.random() < swap_share:
                new = rng.choice(real)
            else:
                new = invented_name(rng, lang, capitalized=name[:1].isupper() or lang == "zh")
            if new not in taken:
                taken.add(new)
                return new
        raise ValueError(f"no free name of kind {self._kinds.get(name)!r} for {name!r} after 100 draws")

    def mapping(
        self,
        text: str,
        names: Iterable[str],
        rng: random.Random,
        *,
        swap_share: float = 0.25,
        misspelt: Mapping[str, str] | None = None,
        keep_figures: bool = False,
    ) -> dict[str, str]:
        """Old -> new for every name given, every number and every citation id of the text.

        Args:
            text: where numbers and ids are looked for.
            names: known names in it (`names_in`).
            swap_share: share of names replaced by a real name of their kind.
            misspelt: misspelling in the text -> the name it stands for; it becomes a misspelling of the new name.
            keep_figures: leave numbers and ids alone.
        """
        taken = set(names)
        mapping = {name: self.fresh(name, rng, swap_share, taken) for name in names}
        for name in [name for name in mapping if not has_chinese(name)]:
            for spelling in (_slug(name, "-"), _slug(name, "_"), name.lower()):
                if spelling != name and spelling in text:
                    separator = "_" if "_" in spelling else " " if " " in spelling else "-"
                    new = mapping[name]
                    mapping[spelling] = new.lower() if separator == " " else _slug(new, separator)
        for wrong, right in (misspelt or {}).items():
            if right in mapping:
                mapping[wrong] = misspell(mapping[right], rng)
        if keep_figures:
            return mapping
        for number in dict.fromkeys(_NUMBERS.findall(text)):
            mapping.setdefault(number, invented_number(rng, number))
        for id_ in dict.fromkeys(CITATION_ID.findall(text)):
            mapping[id_] = citation_id(rng)
        return mapping

    def rename(self, trajectory: Trajectory, rng: random.Random, *, swap_share: float = 0.25) -> Trajectory:
        """Returns a copy of an episode about other names; ids of task and episode stay, the messages change."""
        row = trajectory.model_dump(mode="json", exclude_defaults=True)
        return Trajectory.model_validate(self.rename_row(row, rng, swap_share=swap_share))

    def rename_row(
        self, row: dict, rng: random.Random, *, swap_share: float = 0.25, names: Collection[str] | None = None
    ) -> dict:
        """Renames a serialized Trajectory or a synthetic document.

        Args:
            row: JSON values; the text fields messages, answer, text, prompt and completion are renamed together.
            names: known names of the row, if they were found before (finding them is the slow part).
        """
        text = "\n".join(_strings(row))
        names = self.names_in(text) if names is None else names
        misspelt = row.get("metadata", {}).get("misspelt", {})
        mapping = self.mapping(text, names, rng, swap_share=swap_share, misspelt=misspelt)
        renamed = _renamed(row, mapping)
        if misspelt:
            moved = {mapping.get(wrong, wrong): mapping.get(right, right) for wrong, right in misspelt.items()}
            renamed["metadata"] = {**row["metadata"], "misspelt": moved}
        return renamed

    def mask(self, row: dict, rng: random.Random, hidden: Collection[str]) -> dict:
        """Replaces only the names in `hidden`, by invented ones; everything else stays as observed."""
        text = "\n".join(_strings(row))
        found = [name for name in self.names_in(text) if name in hidden]
        if not found:
            return row
        return _renamed(row, self.mapping(text, found, rng, swap_share=0.0, keep_figures=True))


def replace(text: str, mapping: Mapping[str, str]) -> str:
    """Replaces all keys by their values in one pass, longest key first, whole words only unless Chinese."""
    return _bounded(tuple(mapping)).sub(lambda match: mapping[match.group()], text) if mapping else text


_FIELDS = ("messages", "answer", "text", "prompt", "completion")
_FIXED = frozenset({"role", "id", "tool_call_id", "error", "name", "published_at", "authority", "train"})


def _strings(row: dict) -> Iterable[str]:
    """Every string of a row that renaming may change, and the ids of its sources."""

    def walk(value):
        if isinstance(value, str):
            yield value
        elif isinstance(value, dict):
            for key, item in value.items():
                if key not in _FIXED:
                    yield from walk(item)
        elif isinstance(value, list):
            for item in value:
                yield from walk(item)

    for field in _FIELDS:
        yield from walk(row.get(field))


def _renamed(row: dict, mapping: Mapping[str, str]) -> dict:
    pattern = _bounded(tuple(mapping))

    def walk(value, key=""):
        if isinstance(value, str):
            if key in _FIXED:
                return mapping.get(value, value) if key == "id" else value
            return pattern.sub(lambda match: mapping[match.group()], value)
        if isinstance(value, dict):
            return {inner: walk(item, inner) for inner, item in value.items()}
        if isinstance(value, list):
            return [walk(item, key) for item in value]
        return value

    return {**row, **{field: walk(row[field]) for field in _FIELDS if field in row}}


@functools.lru_cache(maxsize=256)
def _bounded(names: tuple[str, ...]) -> re.Pattern:
    """Matches any of the names, the longest first; Latin ones as whole words, which a Chinese character ends too."""
    ordered = sorted(names, key=len, reverse=True)
    han = "|".join(re.escape(name) for name in ordered if has_chinese(name))
    rest = "|".join(re.escape(name) for name in ordered if not has_chinese(name))
    # this set instead of \w: Chinese characters are outside, and large sets take milliseconds to compile
    letter = r"[0-9A-Za-z_\u00c0-\u00ff]"
    bounded = rf"(?<!{letter})(?:{rest})(?!{letter})" if rest else ""
    return re.compile("|".join(part for part in (han, bounded) if part) or r"(?!)")


def _slug(name: str, separator: str) -> str:
    return re.sub(r"[^\w]+", separator, name.lower()).strip(separator)
