"""The sentences that state one fact, in English and Chinese: written and read by one grammar.

    The capital of Austria is Vienna.        奥地利的首都是维也纳。
    The languages of Aruba are Dutch and Papiamento.

Questions, search queries and reports use the same words, so a small model can copy instead of paraphrasing.
"""

import dataclasses
import re

from stepdr_jax.text.citations import strip_citations
from stepdr_jax.text.matching import normalize

RELATIONS = (
    "capital",
    "currency",
    "population",
    "area",
    "language",
    "region",
    "neighbour",
    "calling_code",
    "demonym",
)
EN = {relation: relation.replace("_", " ") for relation in RELATIONS}
PLURAL = {"language": "languages", "neighbour": "neighbours", "currency": "currencies"}
ZH = {
    "capital": "首都",
    "currency": "货币",
    "population": "人口",
    "area": "面积",
    "language": "语言",
    "region": "地区",
    "neighbour": "邻国",
    "calling_code": "区号",
    "demonym": "居民称谓",
}
UNITS = {"en": {"area": " square kilometres"}, "zh": {"area": "平方公里"}}

_MARKUP = re.compile(r"!?\[([^\]]*)\]\([^)\s]*\)|\*\*|__|`")
_WORDS_EN = {**{word: relation for relation, word in EN.items()}, **{word: r for r, word in PLURAL.items()}}
_WORDS_ZH = {word: relation for relation, word in ZH.items()}
_SENTENCE_EN = re.compile(rf"The ({'|'.join(sorted(_WORDS_EN, key=len, reverse=True))}) of (.+?) (?:is|are) (.+)\.")
# The same fact from the other end, as pages on cities state it.
_INVERSE_EN = re.compile(r"(.+) is the capital of (.+)\.")
_INVERSE_ZH = re.compile(r"(.+?)是(.+)的首都。")
_SENTENCE_ZH = re.compile(rf"(.+?)的({'|'.join(_WORDS_ZH)})是(.+)。")


@dataclasses.dataclass(frozen=True)
class Statement:
    """One fact as text says it: `values` are the elements of `value`, units and articles removed."""

    relation: str
    subject: str
    value: str
    values: tuple[str, ...]
    lang: str
    inverse: bool = False  # said from the other end: "Vienna is the capital of Austria."

    @property
    def fact(self) -> tuple[str, str, str, str]:
        """What is stated, however it is said."""
        return self.relation, normalize(self.subject), normalize(self.value), self.lang


def relation_name(relation: str, lang: str, count: int = 1) -> str:
    """The relation's name: "calling code", "languages" for several, "首都"."""
    if lang == "zh":
        return ZH[relation]
    return PLURAL[relation] if count > 1 and relation in PLURAL else EN[relation]


def relation_forms(relation: str, lang: str) -> tuple[str, ...]:
    """Every form of the relation's name: ("neighbour", "neighbours"), ("邻国",)."""
    return tuple(dict.fromkeys(relation_name(relation, lang, count) for count in (1, 2)))


def relation_vocabulary(lang: str) -> tuple[str, ...]:
    """The names of all relations in one language."""
    return tuple(name for relation in RELATIONS for name in relation_forms(relation, lang))


def topic_of(relation: str, subject: str, lang: str) -> str:
    """What is asked for, and what is typed into a search: "capital of Austria", "奥地利的首都"."""
    return f"{subject}的{ZH[relation]}" if lang == "zh" else f"{EN[relation]} of {subject}"


def join_values(values: tuple[str, ...] | list[str], lang: str) -> str:
    """A list as prose: "German, French and Italian", "德语、法语和意大利语"."""
    if len(values) == 1:
        return values[0]
    if lang == "zh":
        return "、".join(values[:-1]) + "和" + values[-1]
    return ", ".join(values[:-1]) + " and " + values[-1]


def state_fact(relation: str, subject: str, values: tuple[str, ...] | list[str], lang: str) -> str:
    """States a fact, as the pages of the built-in web do."""
    if relation == "currency" and lang == "en":
        values = ["the " + value for value in values]
    value = join_values(values, lang) + UNITS[lang].get(relation, "")
    if lang == "zh":
        return f"{subject}的{ZH[relation]}是{value}。"
    verb = "are" if len(values) > 1 and relation in PLURAL else "is"
    return f"The {relation_name(relation, lang, len(values))} of {subject} {verb} {value}."


def strip_markup(text: str) -> str:
    """Text without Markdown links, emphasis and code marks, as search results show it."""
    return _MARKUP.sub(lambda match: match.group(1) or "", text).strip()


def parse_statement(text: str) -> Statement | None:
    """Reads a sentence that states one fact; citation marks are ignored. None when it is anything else."""
    text = strip_citations(text).strip()
    if match := _SENTENCE_EN.fullmatch(text):
        noun, subject, value = match.groups()
        return _statement(_WORDS_EN[noun], subject, value, "en")
    if match := _SENTENCE_ZH.fullmatch(text):
        subject, noun, value = match.groups()
        return _statement(_WORDS_ZH[noun], subject, value, "zh")
    for lang, pattern in (("en", _INVERSE_EN), ("zh", _INVERSE_ZH)):
        if match := pattern.fullmatch(text):
            value, subject = match.groups()
            return Statement("capital", subject, value, (value,), lang, inverse=True)
    return None


def _statement(relation: str, subject: str, value: str, lang: str) -> Statement:
    bare = value.removesuffix(UNITS[lang].get(relation, ""))
    if lang == "en":
        bare = bare.removeprefix("the ")
    if relation not in PLURAL:
        values: tuple[str, ...] = (bare,)
    elif lang == "zh":
        values = tuple(re.split(r"、|和", bare))
    else:
        values = tuple(re.split(r"(?:, | and )the " if relation == "currency" else r", | and ", bare))
    return Statement(relation, subject, bare, values, lang)
