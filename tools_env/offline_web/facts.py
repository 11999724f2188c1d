"""Real facts about countries and territories, and the graph they form.

Facts come from the data files of the countryinfo package; names in both languages, current currencies and Chinese city
names from Unicode CLDR through Babel. Nothing is invented: what both sources lack is omitted, and each correction below
names what it corrects. Population figures are those of countryinfo.
"""

import dataclasses
import datetime
import functools
import importlib.metadata
import importlib.util
import json
import re
import unicodedata
from collections.abc import Iterator, Mapping
from pathlib import Path

from babel import Locale
from babel.numbers import get_currency_name, get_territory_currencies

from tools_env.errors import ToolHostError
from tools_env.offline_web.names import CITY_ZH

RELATIONS = (
    "capital",
    "currency",
    "language",
    "region",
    "population",
    "area",
    "neighbour",
    "calling_code",
    "demonym",
)
CURRENCIES_ON = datetime.date(2025, 6, 1)  # legal tender on this day; fixed, so that pages do not depend on the clock

# Territories without a permanent population, or that CLDR combines from unrelated places.
_LEFT_OUT = frozenset({"ATA", "ATF", "BVT", "HMD", "IOT", "SGS", "SJM", "UMI"})
# Where the common English name differs from CLDR's, or CLDR's is not a name in running text.
_NAME_EN = {
    "CD": "Democratic Republic of the Congo",
    "CG": "Republic of the Congo",
    "CI": "Ivory Coast",
    "HK": "Hong Kong",
    "MM": "Myanmar",
    "MO": "Macao",
    "PS": "Palestine",
    "TR": "Turkey",
    "VC": "Saint Vincent and the Grenadines",
}
_NAME_ZH = {"HK": "香港", "MO": "澳门", "PS": "巴勒斯坦"}
# Capitals that moved or were renamed since, and spellings; None where the territory has no capital of its own.
_CAPITAL = {
    "BDI": "Gitega",
    "HKG": None,
    "KAZ": "Astana",
    "LKA": "Sri Jayawardenepura Kotte",
    "PYF": "Papeete",
    "SMR": "San Marino",
    "SWZ": "Mbabane",
    "TKL": None,
    "USA": "Washington",  # "D.C." would end the sentence
}
_FORMER_CAPITAL = {"BDI": "Bujumbura", "KAZ": "Nur-Sultan"}
# Official languages where countryinfo has a code of something else, or misses the country's own language.
_LANGUAGES = {
    "ABW": ["nl", "pap"],
    "AFG": ["ps", "fa"],
    "AND": ["ca"],
    "ARM": ["hy"],
    "AZE": ["az"],
    "CYP": ["el", "tr"],
    "CZE": ["cs"],
    "ESH": ["ar"],
    "FJI": ["en", "fj", "hif"],
    "KIR": ["en", "gil"],
    "MYS": ["ms"],
    "NIU": ["en", "niu"],
    "PHL": ["fil", "en"],
    "PLW": ["pau", "en"],
    "PNG": ["en", "tpi", "ho"],
    "SRB": ["sr"],
    "TKL": ["tkl", "en"],
    "TLS": ["pt", "tet"],
    "TUV": ["tvl", "en"],
}
_LANGUAGE_NAMES = {"cnr": ("Montenegrin", "黑山语")}  # younger than CLDR's list
_CURRENCIES = {"BGR": ["EUR"]}  # since 1 January 2026, after this CLDR
_CALLING_CODE = {"KAZ": "7"}  # countryinfo lists the number ranges 76 and 77
# Spellings, and demonyms that name another country's people; None where no common one is known.
_DEMONYM = {
    "CXR": "Christmas Islander",
    "DJI": "Djiboutian",
    "GIB": "Gibraltarian",
    "HKG": "Hong Konger",
    "KGZ": "Kyrgyz",
    "KNA": "Kittitian",
    "MAC": "Macanese",
    "MDV": "Maldivian",
    "MNP": None,
    "MTQ": "Martinican",
    "MYT": "Mahoran",
    "REU": "Réunionese",
    "SPM": None,
    "TJK": "Tajik",
    "VAT": None,
}
# Land borders that countryinfo has on one side only. Others on one side only are claims or mistakes, and are left out.
_BORDERS = ("CHN NPL", "EGY PSE", "GUF SUR", "IND MMR", "IRQ KWT", "ISR PSE", "ITA VAT", "JOR PSE", "SDN TCD")
# UN M49 sub-regions (intermediate regions where they exist) by countryinfo's name -> CLDR territory code.
_REGIONS = {
    "Australia and New Zealand": "053",
    "Caribbean": "029",
    "Central America": "013",
    "Central Asia": "143",
    "Eastern Africa": "014",
    "Eastern Asia": "030",
    "Eastern Europe": "151",
    "Melanesia": "054",
    "Micronesia": "057",
    "Middle Africa": "017",
    "Northern Africa": "015",
    "Northern America": "021",
    "Northern Europe": "154",
    "Polynesia": "061",
    "South America": "005",
    "South-eastern Asia": "035",
    "Southern Africa": "018",
    "Southern Asia": "034",
    "Southern Europe": "039",
    "Western Africa": "011",
    "Western Asia": "145",
    "Western Europe": "155",
}


@dataclasses.dataclass(frozen=True)
class Value:
    """The value of one relation: the items in both languages, and the entities that they are (none for literals)."""

    en: tuple[str, ...]
    zh: tuple[str, ...]
    ids: tuple[str, ...] = ()

    def items(self, lang: str) -> tuple[str, ...]:
        return self.zh if lang == "zh" else self.en


@dataclasses.dataclass(frozen=True)
class Entity:
    """An entity with a name in both languages. `slug` names its pages; only countries have `values`."""

    id: str
    kind: str  # country, city, currency, language, region
    en: str
    zh: str
    slug: str
    values: Mapping[str, Value] = dataclasses.field(default_factory=dict)

    def name(self, lang: str) -> str:
        return self.zh if lang == "zh" else self.en


@dataclasses.dataclass(frozen=True)
class Facts:
    """All facts.

    Attributes:
        entities: id -> entity, countries first, each kind in order of its English names.
        former: (country id, relation) -> a value that is no longer true.
        other_names: country id -> other names of the country.
    """

    entities: Mapping[str, Entity]
    former: Mapping[tuple[str, str], Value]
    other_names: Mapping[str, tuple[str, ...]]

    def of_kind(self, kind: str) -> list[Entity]:
        return [entity for entity in self.entities.values() if entity.kind == kind]

    @functools.cached_property
    def holders(self) -> dict[str, tuple[Entity, ...]]:
        """Entity id -> the countries that have it as a value, in order of their English names."""
        found: dict[str, dict[str, Entity]] = {}
        for country in self.of_kind("country"):
            for value in country.values.values():
                for tail in value.ids:
                    found.setdefault(tail, {})[country.id] = country
        return {tail: tuple(countries.values()) for tail, countries in found.items()}

    def triples(self) -> Iterator[dict]:
        """Rows with head, relation, tail, tail_is_entity; a list gives one row per item."""
        for country in self.of_kind("country"):
            for relation, value in country.values.items():
                for tail in value.ids or value.en:
                    yield {"head": country.id, "relation": relation, "tail": tail, "tail_is_entity": bool(value.ids)}


def slug(name: str) -> str:
    """Returns a name as lower-case ASCII words joined by underscores: "São Tomé" -> "sao_tome"."""
    plain = unicodedata.normalize("NFKD", name.replace("&", " and ")).encode("ascii", "ignore").decode()
    return re.sub(r"[^a-z0-9]+", "_", plain.lower().replace("'", "")).strip("_")


def source_version() -> str:
    """Returns the versions of the packages that the facts come from; part of the fingerprint."""
    return " ".join(f"{name} {importlib.metadata.version(name)}" for name in ("countryinfo", "babel"))


def _rows() -> list[dict]:
    """Returns the records of countryinfo in order of ISO code. Reads its data files without importing the package."""
    spec = importlib.util.find_spec("countryinfo")
    folder = Path(next(iter(spec.submodule_search_locations))) / "data" if spec else None
    if folder is None or not folder.is_dir():
        raise ToolHostError('the offline web needs the data of the package countryinfo; run pip install -e ".[tools]"')
    rows = [json.loads(path.read_text(encoding="utf-8")) for path in sorted(folder.glob("*.json"))]
    complete = {}
    for row in rows:
        if all(row.get(field) for field in ("population", "callingCodes", "subregion")):
            kept = complete.get(row["ISO"]["alpha3"])
            # The Holy See occurs twice; the record with a demonym is the maintained one.
            if kept is None or row.get("demonym"):
                complete[row["ISO"]["alpha3"]] = row
    return [row for code, row in sorted(complete.items()) if code not in _LEFT_OUT and row["callingCodes"][0]]


@functools.cache
def load_facts() -> Facts:
    """Reads and joins the sources (0.3 s, then cached). Raises ToolHostError when countryinfo is not installed."""
    en, zh = Locale("en"), Locale("zh")
    rows = [row for row in _rows() if row["ISO"]["alpha2"] in zh.territories]
    codes = {row["ISO"]["alpha3"] for row in rows}
    borders = _land_borders(rows)
    cities = _cities_zh(en, zh)
    entities: dict[str, Entity] = {}
    former, other_names = {}, {}
    names = {row["ISO"]["alpha3"]: _country_names(row["ISO"]["alpha2"], en, zh) for row in rows}

    def add(kind: str, key: str, name_en: str, name_zh: str) -> str:
        identifier = f"{kind}:{key}"
        entities.setdefault(identifier, Entity(identifier, kind, name_en, name_zh, slug(name_en)))
        return identifier

    def listed(pairs: list[tuple[str, str]], ids: list[str]) -> Value:
        return Value(tuple(p[0] for p in pairs), tuple(p[1] for p in pairs), tuple(ids))

    def refer(ids: list[str]) -> Value:
        return listed([(entities[i].en, entities[i].zh) for i in ids], ids)

    capitals = _capitals(rows)
    shared = {city for city in capitals.values() if list(capitals.values()).count(city) > 1}
    for row in rows:
        code, alpha2 = row["ISO"]["alpha3"], row["ISO"]["alpha2"]
        values: dict[str, Value] = {}
        if city := capitals.get(code):
            key = f"{slug(city)}_{slug(names[code][0])}" if city in shared else slug(city)
            identifier = f"city:{key}"
            entities[identifier] = Entity(identifier, "city", city, cities.get(city, city), key)
            values["capital"] = refer([identifier])
        if currencies := _currencies(alpha2, row):
            values["currency"] = refer([add("currency", c.lower(), *_currency_names(c)) for c in currencies])
        if languages := _languages(row, en, zh):
            values["language"] = refer([add("language", key, *pair) for key, pair in languages])
        region = _REGIONS[_region_name(row)]
        values["region"] = refer(
            [add("region", slug(en.territories[region]), en.territories[region], zh.territories[region])]
        )
        values["population"] = _number(row["population"])
        if row.get("area"):
            values["area"] = _number(row["area"])
        if near := sorted(borders[code] & codes, key=lambda c: names[c][0]):
            values["neighbour"] = listed([names[c] for c in near], [c.lower() for c in near])
        dial = _CALLING_CODE.get(code) or re.sub(r"\D", "", row["callingCodes"][0])
        values["calling_code"] = Value((dial,), (dial,))
        people = _DEMONYM[code] if code in _DEMONYM else (row.get("demonym") or "").split(",")[0].strip()
        if people:
            values["demonym"] = Value((people,), (people,))
        ordered = {relation: values[relation] for relation in RELATIONS if relation in values}
        entities[code.lower()] = Entity(code.lower(), "country", *names[code], slug(names[code][0]), ordered)
        former.update(_former(code, row, currencies, cities))
        other_names[code.lower()] = _other_names(row, names[code][0])
    kinds = ("country", "city", "currency", "language", "region")
    ordered = sorted(entities.values(), key=lambda e: (kinds.index(e.kind), slug(e.en), e.id))
    return Facts({entity.id: entity for entity in ordered}, former, other_names)


def _country_names(alpha2: str, en: Locale, zh: Locale) -> tuple[str, str]:
    name = _NAME_EN.get(alpha2) or en.territories[alpha2].replace("&", "and").replace("St. ", "Saint ")
    return name.replace("’", "'"), _NAME_ZH.get(alpha2) or zh.territories[alpha2]


def _capitals(rows: list[dict]) -> dict[str, str]:
    capitals = {}
    for row in rows:
        code, city = row["ISO"]["alpha3"], row.get("capital")
        city = _CAPITAL[code] if code in _CAPITAL else city[0] if isinstance(city, list) else city
        if city:
            capitals[code] = city
    return capitals


def _cities_zh(en: Locale, zh: Locale) -> dict[str, str]:
    """English city name -> Chinese name: exemplar cities of the time zones, completed by our own table."""
    cities = {}
    for zone, names in zh.time_zones.items():
        if "city" in names:
            english = en.time_zones.get(zone, {}).get("city") or zone.split("/")[-1].replace("_", " ")
            cities[english] = names["city"]
    return cities | CITY_ZH


def _currencies(alpha2: str, row: dict) -> list[str]:
    """Legal tender by CLDR; in countryinfo's order where it has one, because that names a country's own first."""
    tender = _CURRENCIES.get(row["ISO"]["alpha3"]) or get_territory_currencies(
        alpha2, start_date=CURRENCIES_ON, end_date=CURRENCIES_ON
    )
    listed = row.get("currencies") or []
    named = [code for code in tender if get_currency_name(code, locale="zh") != code]
    return sorted(named, key=lambda code: (listed.index(code) if code in listed else len(listed), named.index(code)))


def _currency_names(code: str) -> tuple[str, str]:
    """English as in running text ("Swiss franc"), and Chinese."""
    return get_currency_name(code, count=1, locale="en").replace("&", "and"), get_currency_name(code, locale="zh")


def _languages(row: dict, en: Locale, zh: Locale) -> list[tuple[str, tuple[str, str]]]:
    codes = _LANGUAGES.get(row["ISO"]["alpha3"]) or row.get("languages") or []
    found = []
    for code in codes:
        if code in _LANGUAGE_NAMES:
            found.append((code, _LANGUAGE_NAMES[code]))
        elif code in en.languages and code in zh.languages:
            found.append((code, (en.languages[code], zh.languages[code])))
    return found


def _region_name(row: dict) -> str:
    inner = row.get("intermediateregion")
    return inner if inner in _REGIONS else row["subregion"]


def _land_borders(rows: list[dict]) -> dict[str, set[str]]:
    """Country -> neighbours: borders that both sides list, and the corrected ones."""
    listed = {row["ISO"]["alpha3"]: set(row.get("borders") or ()) for row in rows}
    borders = {code: {other for other in near if code in listed.get(other, ())} for code, near in listed.items()}
    for pair in _BORDERS:
        a, b = pair.split()
        if a in borders and b in borders:
            borders[a].add(b)
            borders[b].add(a)
    return borders


def _number(number: float) -> Value:
    text = str(int(number)) if float(number).is_integer() else f"{number:g}"
    return Value((text,), (text,))


def _former(code: str, row: dict, currencies: list[str], cities: dict[str, str]) -> dict:
    """Values that were true once: renamed or moved capitals, and currencies that countryinfo still has."""
    found = {}
    if city := _FORMER_CAPITAL.get(code):
        found[code.lower(), "capital"] = Value((city,), (cities.get(city, city),))
    former = [c for c in row.get("currencies") or [] if c not in currencies]
    if len(former) == 1 and len(row["currencies"]) == 1:
        names = [re.sub(r"\s*[(（].*", "", name) for name in _currency_names(former[0])]
        current = [_currency_names(c)[0] for c in currencies]
        if names[0] not in current:  # a redenominated currency often keeps its name
            found[code.lower(), "currency"] = Value((names[0],), (names[1],))
    return found


def _other_names(row: dict, name: str) -> tuple[str, ...]:
    """Official long forms in English, as countryinfo lists them ("Republic of Austria")."""
    official = re.compile(
        r"(?:Republic|Kingdom|State|Commonwealth|Principality|Sultanate|Union|Grand Duchy)\b.* of |Republic$"
    )
    spellings = [s for s in row.get("altSpellings") or () if s.isascii() and official.search(s)]
    return tuple(dict.fromkeys(s for s in spellings if s != name))[:1]
