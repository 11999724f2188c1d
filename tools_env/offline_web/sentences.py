"""Sentence templates of the offline web: one sentence per fact and passage.

`plain_sentence` is the form of the reference pages, which search queries copy ("The capital of Austria is Vienna.").
The other hosts state the same facts in other words, none of which begins like the plain form.
"""

from tools_env.offline_web.facts import Entity, Value

WORD_ZH = {
    "capital": "首都",
    "currency": "货币",
    "language": "语言",
    "region": "地区",
    "population": "人口",
    "area": "面积",
    "neighbour": "邻国",
    "calling_code": "区号",
}
_PLURAL = {"language": "languages", "neighbour": "neighbours", "currency": "currencies"}

# {x} is the country, {v} the value as prose.
REGISTER = {
    "en": {
        "capital": (
            "{v} is entered in the register as the capital of {x}.",
            "In {x} the register names {v} as the capital.",
        ),
        "currency": ("Accounts in {x} are settled in {v}.", "The register gives {v} as legal tender in {x}."),
        "language": ("In {x} the register lists {v} as spoken.", "{v}: this is what the register lists for {x}."),
        "region": ("The register places {x} in {v}.", "{x} is filed under {v}."),
        "population": ("The register counts {v} people in {x}.", "{x} is entered with {v} inhabitants."),
        "area": ("{x} covers {v}.", "The register measures {x} at {v}."),
        "neighbour": ("{x} shares land borders with {v}.", "By land, {x} borders on {v}."),
        "calling_code": ("Calls from abroad reach {x} under {v}.", "Telephones in {x} answer to the prefix {v}."),
        "demonym": ("What comes from {x} is called {v}.", "The adjective for {x} is {v}."),
    },
    "zh": {
        "capital": ("据登记，{x}以{v}为首都。", "公报载明，{v}为{x}首都。"),
        "currency": ("据登记，{x}流通{v}。", "公报载明，{x}以{v}结算。"),
        "language": ("据登记，{x}通行{v}。", "公报载明，{x}使用{v}。"),
        "region": ("据登记，{x}位于{v}。", "公报把{x}归入{v}。"),
        "population": ("据登记，{x}有居民{v}人。", "公报统计，{x}共有{v}人。"),
        "area": ("据登记，{x}占地{v}。", "公报载明，{x}国土为{v}。"),
        "neighbour": ("据登记，{x}与{v}接壤。", "公报载明，{x}毗邻{v}。"),
        "calling_code": ("从国外致电{x}，先拨{v}。", "公报载明，{x}电话前缀为{v}。"),
    },
}
NOTES = {
    "en": {
        "capital": ("Notes on {x} usually start with its capital city, {v}.",),
        "currency": ("In {x} you pay with {v}.",),
        "language": ("A phrase book for {x} covers {v}.",),
        "region": ("On the map, look for {x} in {v}.",),
        "neighbour": ("Next to {x} the map shows {v}.",),
        "calling_code": ("To phone someone in {x}, dial {v} first.",),
    },
    "zh": {
        "capital": ("写{x}的笔记，多半从首都{v}写起。",),
        "currency": ("在{x}用{v}付款。",),
        "language": ("去{x}要带{v}会话手册。",),
        "region": ("在地图上，{x}在{v}。",),
        "neighbour": ("地图上，{x}旁边有{v}。",),
        "calling_code": ("给{x}打电话，先拨{v}。",),
    },
}


def join_items(items: tuple[str, ...], lang: str) -> str:
    """Returns a list as prose: "German, French and Italian", "德语、法语和意大利语"."""
    if len(items) == 1:
        return items[0]
    return "、".join(items[:-1]) + "和" + items[-1] if lang == "zh" else ", ".join(items[:-1]) + " and " + items[-1]


def value_in_prose(relation: str, value: Value, lang: str) -> str:
    """Returns a value as it stands in a sentence: currencies with their article, areas with their unit."""
    items = value.items(lang)
    if relation == "area":
        return items[0] + ("平方公里" if lang == "zh" else " square kilometres")
    if relation == "currency" and lang == "en":
        items = tuple("the " + item for item in items)
    return join_items(items, lang)


def plain_sentence(relation: str, country: Entity, value: Value, lang: str) -> str | None:
    """Returns the plain sentence; None where the language has no words for the relation."""
    said, name = value_in_prose(relation, value, lang), country.name(lang)
    if lang == "zh":
        return f"{name}的{WORD_ZH[relation]}是{said}。" if relation in WORD_ZH else None
    several = len(value.en) > 1 and relation in _PLURAL
    noun = _PLURAL[relation] if several else relation.replace("_", " ")
    return f"The {noun} of {name} {'are' if several else 'is'} {said}."
