"""The pages of the offline web: the text, links and injected errors of each host.

Hosts differ as on the real web. Two are authoritative (a reference work and a dated register), one is ordinary and
incomplete, one copies, one has injected errors in the same words as the reference work, one is slow, one is down.
Random draws are seeded with (seed, host, entity, language), so a page does not depend on the others.
"""

import dataclasses
import datetime
import random
from collections.abc import Iterator

from tools_env.offline_web import sentences
from tools_env.offline_web.facts import Entity, Facts, Value, slug

LANGS = ("en", "zh")
LAST_DAY = datetime.date(2026, 5, 31)  # every page is older than the date given to the agent
WRONG_SHARE = 0.35  # of quickfacts.test's passages
MIRRORED_SHARE = 0.4  # of the reference pages
NOTED_SHARE = 0.6  # of the countries have travel notes
ODD_HOST_PAGES = 24  # pages of slow.test and of flaky.test
SCRAPBOOK = "/en/scrapbook"
DEAD_LINK_SHARE = 0.1  # of the reference pages link to a page that does not exist

# authority: 0 unreliable, 1 ordinary, 2 authoritative. behaviour: how OfflineWebServer handles every request.
HOSTS = {
    "atlas.test": {"authority": 2, "behaviour": "normal", "about": "reference work, English and Chinese"},
    "gazette.test": {"authority": 2, "behaviour": "normal", "about": "dated register of the same facts"},
    "travelnotes.test": {"authority": 1, "behaviour": "normal", "about": "ordinary and partial"},
    "quickfacts.test": {"authority": 0, "behaviour": "normal", "about": "outdated and swapped values among true ones"},
    "mirror.test": {"authority": 0, "behaviour": "normal", "about": "near-duplicates of atlas.test"},
    "slow.test": {"authority": 1, "behaviour": "slow", "delay_seconds": 0.3, "about": "true, and slow"},
    "flaky.test": {"authority": 1, "behaviour": "unavailable", "status": 503, "about": "known to search, always down"},
}

_QUICK = ("capital", "currency", "language", "region", "population", "area", "calling_code")
_ODD_EN = {
    "slow.test": ("{x} (archive)", "Archive card, {x}: {relation} {v}."),
    "flaky.test": ("{x} (bulletin)", "Bulletin on {x}: {relation} {v}."),
}
_ALMANAC = {
    "capital": ("Almanac: capitals", "For {x}, the capital is {v}.", "年鉴：首都", "{x}：首都{v}。"),
    "population": ("Almanac: inhabitants", "{x} has {v} inhabitants.", "年鉴：居民", "{x}有{v}名居民。"),
    "area": ("Almanac: surfaces", "{x} extends over {v}.", "年鉴：国土", "{x}方圆{v}。"),
    "currency": ("Almanac: money", "{x} pays in {v}.", "年鉴：钱币", "{x}用{v}付款。"),
    "calling_code": ("Almanac: telephone prefixes", "{x} has the prefix {v}.", "年鉴：电话前缀", "{x}：前缀{v}。"),
}


@dataclasses.dataclass(frozen=True)
class Mistake:
    """A passage with an injected error."""

    passage: str
    entity: str
    relation: str
    stated: str
    true: str
    reason: str  # outdated, or swapped with another country's value


@dataclasses.dataclass(frozen=True)
class Page:
    host: str
    path: str
    title: str
    lang: str
    published_at: str  # ISO date
    passages: tuple[str, ...]
    links: tuple[tuple[str, str], ...]  # anchor, URL; shown where the text has the anchor, else below it
    mistakes: tuple[Mistake, ...] = ()

    @property
    def url(self) -> str:
        return f"http://{self.host}{self.path}"

    def document(self) -> dict:
        """Returns the page as a row of documents.jsonl."""
        return {
            "id": self.host + self.path,
            "url": self.url,
            "title": self.title,
            "text": "\n".join([f"# {self.title}", *self.passages]),
            "lang": self.lang,
            "source": "world",
            "authority": HOSTS[self.host]["authority"],
            "published_at": self.published_at,
            "links": [{"anchor": anchor, "url": url} for anchor, url in self.links],
        }


def path_of(entity: Entity, lang: str) -> str:
    """Returns the path of an entity's page: /en/austria, /zh/city/vienna."""
    return f"/{lang}/{entity.slug}" if entity.kind == "country" else f"/{lang}/{entity.kind}/{entity.slug}"


def _url(entity: Entity, lang: str, host: str = "atlas.test") -> str:
    return f"http://{host}{path_of(entity, lang)}"


def _random(*parts: object) -> random.Random:
    return random.Random(" ".join(map(str, parts)))


def _day(rng: random.Random, newest: int, oldest: int) -> str:
    """Returns a date between `newest` and `oldest` days before LAST_DAY."""
    return (LAST_DAY - datetime.timedelta(days=rng.randint(newest, oldest))).isoformat()


def all_pages(facts: Facts, seed: int) -> Iterator[Page]:
    """Yields every page of the built-in hosts; the reference pages of countries first."""
    countries = facts.of_kind("country")
    reference = [_reference(facts, country, lang, seed) for lang in LANGS for country in countries]
    yield from reference
    for lang in LANGS:
        yield _front(facts, lang, seed)
        for kind, page in (("city", _city), ("currency", _members), ("language", _members), ("region", _region)):
            for entity in facts.of_kind(kind):
                yield page(facts, entity, lang, seed)
        yield from (_almanac(facts, relation, lang, seed) for relation in _ALMANAC)
    for page in reference:
        if (rng := _random(seed, "mirror", page.path)).random() < MIRRORED_SHARE:
            yield _mirrored(page, rng)
    moved = {new: old for old, new in redirects(facts)["atlas.test"].items()}
    for lang in LANGS:
        for country in countries:
            yield _register(facts, country, lang, seed)
            yield _quick(facts, country, lang, seed, moved)
            if _random(seed, "notes", country.id).random() < NOTED_SHARE:
                yield _notes(facts, country, lang, seed)
    yield _scrapbook(countries)
    for host in _ODD_EN:
        chosen = _random(seed, host).sample(countries, min(ODD_HOST_PAGES, len(countries)))
        yield from (_odd(host, country, seed) for country in sorted(chosen, key=lambda c: c.slug))


def redirects(facts: Facts) -> dict[str, dict[str, str]]:
    """Host -> old path -> present path: official long names redirect to the short ones."""
    taken = {path_of(country, "en") for country in facts.of_kind("country")}
    moved = {_long_path(facts, country): path_of(country, "en") for country in facts.of_kind("country")}
    return {"atlas.test": {"/": "/en"} | {old: new for old, new in moved.items() if old and old not in taken}}


def oddities() -> dict[str, dict[str, dict]]:
    """Host -> path -> how the server deviates from the plain rendering of that page."""
    return {
        # The header promises UTF-8, the bytes are GB 18030, as on many old Chinese pages.
        "quickfacts.test": {"/zh/china": {"charset": "gb18030", "declared_charset": "utf-8"}},
        # Larger than the client's limit.
        "travelnotes.test": {SCRAPBOOK: {"padding_bytes": 6 << 20}},
    }


def _long_path(facts: Facts, country: Entity) -> str | None:
    names = facts.other_names.get(country.id)
    return f"/en/{slug(names[0])}" if names else None


def _value_links(facts: Facts, value: Value, lang: str) -> list[tuple[str, str]]:
    found = [facts.entities[tail] for tail in value.ids]
    return [(entity.name(lang), _url(entity, lang)) for entity in found]


# ---------------------------------------------------------------------------------------------------------- atlas.test


def _reference(facts: Facts, country: Entity, lang: str, seed: int) -> Page:
    rng = _random(seed, "atlas", country.id)
    said = {r: sentences.plain_sentence(r, country, value, lang) for r, value in country.values.items()}
    links = [link for value in country.values.values() for link in _value_links(facts, value, lang)]
    if rng.random() < DEAD_LINK_SHARE:
        anchor = f"{country.zh}的历史" if lang == "zh" else f"History of {country.en}"
        links.append((anchor, f"{_url(country, lang)}/history"))
    return Page(
        "atlas.test",
        path_of(country, lang),
        country.name(lang),
        lang,
        _day(rng, 0, 500),
        tuple(filter(None, said.values())),
        tuple(links),
    )


def _front(facts: Facts, lang: str, seed: int) -> Page:
    countries, regions = facts.of_kind("country"), facts.of_kind("region")
    if lang == "zh":
        passages = [f"本地图集收录{len(countries)}个国家和地区。"]
        passages += [f"{region.zh}收录{len(facts.holders[region.id])}个。" for region in regions]
    else:
        passages = [f"This atlas has pages on {len(countries)} countries and territories."]
        passages += [f"{region.en} has {len(facts.holders[region.id])} of them." for region in regions]
    links = [(region.name(lang), _url(region, lang)) for region in regions]
    links += [
        (title[2 * (lang == "zh")], f"http://atlas.test/{lang}/almanac/{relation}")
        for relation, title in _ALMANAC.items()
    ]
    title = "地图集" if lang == "zh" else "Atlas"
    date = _day(_random(seed, "front"), 0, 30)
    return Page("atlas.test", f"/{lang}", title, lang, date, tuple(passages), tuple(links))


def _entity_page(entity: Entity, lang: str, seed: int, passages: list[str], links: list[tuple[str, str]]) -> Page:
    date = _day(_random(seed, "atlas", entity.id), 0, 500)
    return Page(
        "atlas.test", path_of(entity, lang), entity.name(lang), lang, date, tuple(dict.fromkeys(passages)), tuple(links)
    )


def _city(facts: Facts, city: Entity, lang: str, seed: int) -> Page:
    (country,) = facts.holders[city.id]
    name, of = city.name(lang), country.name(lang)
    region, money = country.values["region"], country.values["currency"]
    code = country.values["calling_code"].en[0]
    paid = sentences.value_in_prose("currency", money, lang)
    if lang == "zh":
        passages = [f"{name}是{of}的首都。", f"{of}位于{region.zh[0]}。", f"在{name}用{paid}付款。"]
        passages.append(f"从国外致电{name}，先拨{code}。")
    else:
        passages = [
            f"{name} is the capital of {of}.",
            f"{of} lies in {region.en[0]}.",
            f"In {name} one pays with {paid}.",
        ]
        passages.append(f"Calls from abroad to {name} begin with {code}.")
    links = [(of, _url(country, lang)), *_value_links(facts, region, lang), *_value_links(facts, money, lang)]
    return _entity_page(city, lang, seed, passages, links)


def _members(facts: Facts, entity: Entity, lang: str, seed: int) -> Page:
    """A currency or a language and the countries that use it; a long page for the widespread ones."""
    countries = facts.holders[entity.id]
    listed = sentences.join_items(tuple(country.name(lang) for country in countries), lang)
    money = entity.kind == "currency"
    if lang == "zh":
        passages = [f"{entity.zh}在{listed}{'流通' if money else '使用'}。"]
        each = "{x}使用{v}。"
    else:
        passages = [f"The {entity.en} is used in {listed}." if money else f"{entity.en} is spoken in {listed}."]
        each = "{x} uses the {v}." if money else "People in {x} speak {v}."
    if len(countries) > 1:
        passages += [each.format(x=country.name(lang), v=entity.name(lang)) for country in countries]
    links = [(country.name(lang), _url(country, lang)) for country in countries]
    return _entity_page(entity, lang, seed, passages, links)


def _region(facts: Facts, region: Entity, lang: str, seed: int) -> Page:
    """A region, its members and their capitals: a hub of links."""
    countries = facts.holders[region.id]
    listed = sentences.join_items(tuple(country.name(lang) for country in countries), lang)
    passages = [f"{region.zh}包括{listed}。" if lang == "zh" else f"{region.en} is made up of {listed}."]
    links = []
    for country in countries:
        links.append((country.name(lang), _url(country, lang)))
        if "capital" in country.values:
            city = country.values["capital"].items(lang)[0]
            links += _value_links(facts, country.values["capital"], lang)
            passages.append(
                f"{country.zh}位于{region.zh}，首都为{city}。"
                if lang == "zh"
                else f"{country.en}, with its capital {city}, lies in {region.en}."
            )
        else:
            passages.append(f"{country.zh}位于{region.zh}。" if lang == "zh" else f"{country.en} lies in {region.en}.")
    return _entity_page(region, lang, seed, passages, list(dict.fromkeys(links)))


def _almanac(facts: Facts, relation: str, lang: str, seed: int) -> Page:
    """All countries on one very long page."""
    title, form = _ALMANAC[relation][2:] if lang == "zh" else _ALMANAC[relation][:2]
    holders = [country for country in facts.of_kind("country") if relation in country.values]
    passages = [
        form.format(x=country.name(lang), v=sentences.value_in_prose(relation, country.values[relation], lang))
        for country in holders
    ]
    links = tuple((country.name(lang), _url(country, lang)) for country in holders)
    date = _day(_random(seed, "almanac", relation), 0, 120)
    return Page("atlas.test", f"/{lang}/almanac/{relation}", title, lang, date, tuple(passages), links)


# --------------------------------------------------------------------------------------------------------- other hosts


def _mirrored(page: Page, rng: random.Random) -> Page:
    """A copy without one passage and with a line about its origin."""
    date = _day(rng, 520, 900)
    lost = rng.randrange(len(page.passages))
    kept = [passage for i, passage in enumerate(page.passages) if i != lost or len(page.passages) == 1]
    mark = f"本页于{date}抄自atlas.test。" if page.lang == "zh" else f"This page was copied from atlas.test on {date}."
    links = tuple((anchor, url.replace("//atlas.test", "//mirror.test")) for anchor, url in page.links)
    return dataclasses.replace(
        page, host="mirror.test", published_at=date, passages=(*kept, mark), links=(*links, ("atlas.test", page.url))
    )


def _register(facts: Facts, country: Entity, lang: str, seed: int) -> Page:
    """The gazette: authoritative, dated, with its own wording."""
    rng = _random(seed, "gazette", country.id, lang)
    date = _day(rng, 0, 150)
    forms = sentences.REGISTER[lang]
    passages = [
        rng.choice(forms[relation]).format(x=country.name(lang), v=sentences.value_in_prose(relation, value, lang))
        for relation, value in country.values.items()
        if relation in forms
    ]
    rng.shuffle(passages)
    written = datetime.date.fromisoformat(date)
    opening = (
        f"本期公报发布于{written.year}年{written.month}月{written.day}日。"
        if lang == "zh"
        else f"This entry was published on {written.day} {written:%B} {written.year}."
    )
    links = [(facts.entities[i].name(lang), _url(facts.entities[i], lang, "gazette.test")) for i in _near(country)]
    links.append((country.name(lang), _url(country, lang)))
    title = f"{country.zh}：登记" if lang == "zh" else f"{country.en} in the register"
    return Page("gazette.test", path_of(country, lang), title, lang, date, (opening, *passages), tuple(links))


def _notes(facts: Facts, country: Entity, lang: str, seed: int) -> Page:
    """Travel notes: true, incomplete, without authority."""
    rng = _random(seed, "travelnotes", country.id, lang)
    forms = sentences.NOTES[lang]
    held = [relation for relation in country.values if relation in forms]
    chosen = rng.sample(held, min(len(held), rng.randint(3, 4)))
    passages = [
        rng.choice(forms[relation]).format(
            x=country.name(lang), v=sentences.value_in_prose(relation, country.values[relation], lang)
        )
        for relation in chosen
    ]
    near = [facts.entities[i] for i in _near(country)]
    links = [(country.name(lang), _url(country, lang))]
    links += [(other.name(lang), _url(other, lang, "travelnotes.test")) for other in near]
    if lang == "en" and rng.random() < DEAD_LINK_SHARE:
        links.append(("Scrapbook", f"http://travelnotes.test{SCRAPBOOK}"))
    title = f"{country.zh}游记" if lang == "zh" else f"Notes from {country.en}"
    date = _day(rng, 100, 2500)
    return Page("travelnotes.test", path_of(country, lang), title, lang, date, tuple(passages), tuple(links))


def _scrapbook(countries: list[Entity]) -> Page:
    """The page that `oddities` pads beyond the client's limit."""
    shown = countries[:20]
    passages = [f"Picture {number} of this scrapbook is from {country.en}." for number, country in enumerate(shown, 1)]
    links = tuple((country.en, _url(country, "en", "travelnotes.test")) for country in shown)
    return Page("travelnotes.test", SCRAPBOOK, "Scrapbook", "en", "2021-08-01", tuple(passages), links)


def _quick(facts: Facts, country: Entity, lang: str, seed: int, moved: dict[str, str]) -> Page:
    """The plain sentences of the reference work, some of them with a wrong value.

    Args:
        moved: path of a reference page -> its former path, which this old page still links to.
    """
    rng = _random(seed, "quickfacts", country.id, lang)
    passages, mistakes = [], []
    for relation in _QUICK:
        if relation not in country.values:
            continue
        true = stated = country.values[relation]
        reason = None
        if (country.id, relation) in facts.former or rng.random() < WRONG_SHARE:
            stated, reason = _wrong(facts, country, relation, rng)
        passage = sentences.plain_sentence(relation, country, stated, lang)
        passages.append(passage)
        if reason:
            said = (sentences.join_items(value.items(lang), lang) for value in (stated, true))
            mistakes.append(Mistake(passage, country.id, relation, *said, reason))
    path = path_of(country, lang)
    links = [(country.name(lang), f"http://atlas.test{moved.get(path, path)}")]
    links += [(facts.entities[i].name(lang), _url(facts.entities[i], lang, "quickfacts.test")) for i in _near(country)]
    title = f"{country.zh}速览" if lang == "zh" else f"{country.en} in numbers"
    date = _day(rng, 1500, 5000)
    return Page("quickfacts.test", path, title, lang, date, tuple(passages), tuple(links), tuple(mistakes))


def _wrong(facts: Facts, country: Entity, relation: str, rng: random.Random) -> tuple[Value, str]:
    """Returns a false value and the reason why a page would have it."""
    if (country.id, relation) in facts.former:
        return facts.former[country.id, relation], "outdated"
    true = country.values[relation]
    if relation == "population" and rng.random() < 0.5:
        older = max(1, round(int(true.en[0]) * rng.uniform(0.55, 0.92)))
        return Value((str(older),), (str(older),)), "outdated"
    near = facts.holders[country.values["region"].ids[0]] if rng.random() < 0.5 else ()
    for pool in (near, facts.of_kind("country")):
        # A shared item would make the statement partly true.
        others = [
            other.values[relation]
            for other in pool
            if relation in other.values
            and not set(other.values[relation].en) & set(true.en)
            and not set(other.values[relation].zh) & set(true.zh)
        ]
        if others:
            return rng.choice(others), "swapped"
    raise AssertionError(f"every country has the {relation} of {country.en}")


def _odd(host: str, country: Entity, seed: int) -> Page:
    rng = _random(seed, host, country.id)
    title, form = _ODD_EN[host]
    passages = tuple(
        form.format(
            x=country.en, relation=relation.replace("_", " "), v=sentences.value_in_prose(relation, value, "en")
        )
        for relation, value in country.values.items()
    )
    links = ((country.en, _url(country, "en")),)
    return Page(host, path_of(country, "en"), title.format(x=country.en), "en", _day(rng, 200, 1500), passages, links)


def _near(country: Entity) -> tuple[str, ...]:
    return country.values["neighbour"].ids if "neighbour" in country.values else ()
