"""A hand-made web of a few countries for the tests of synthesis: pages, entities, hosts."""

import json
from pathlib import Path

from stepdr_jax.records import Document
from stepdr_jax.synthesis import corpora
from stepdr_jax.synthesis.scripted import knowledge

FACTS = {
    "aut": (
        "Austria",
        "奥地利",
        "Vienna",
        "维也纳",
        "euro",
        "欧元",
        ("German",),
        ("德语",),
        "43",
        "Western Europe",
        "西欧",
    ),
    "hun": (
        "Hungary",
        "匈牙利",
        "Budapest",
        "布达佩斯",
        "forint",
        "福林",
        ("Hungarian",),
        ("匈牙利语",),
        "36",
        "Eastern Europe",
        "东欧",
    ),
    "che": (
        "Switzerland",
        "瑞士",
        "Bern",
        "伯尔尼",
        "Swiss franc",
        "瑞士法郎",
        ("German", "French"),
        ("德语", "法语"),
        "41",
        "Western Europe",
        "西欧",
    ),
    "nga": (
        "Nigeria",
        "尼日利亚",
        "Abuja",
        "阿布贾",
        "naira",
        "奈拉",
        ("English",),
        ("英语",),
        "234",
        "Western Africa",
        "西非",
    ),
    "ner": (
        "Niger",
        "尼日尔",
        "Niamey",
        "尼亚美",
        "CFA franc",
        "非洲法郎",
        ("French",),
        ("法语",),
        "227",
        "Western Africa",
        "西非",
    ),
    "prt": (
        "Portugal",
        "葡萄牙",
        "Lisbon",
        "里斯本",
        "euro",
        "欧元",
        ("Portuguese",),
        ("葡萄牙语",),
        "351",
        "Southern Europe",
        "南欧",
    ),
}
POPULATION = {"aut": 8527230, "hun": 9771000, "che": 8403994, "nga": 206139587, "ner": 24206636, "prt": 10302674}


def _values(row, lang):
    en = lang == "en"
    return {
        "capital": (row[2 if en else 3],),
        "currency": (row[4 if en else 5],),
        "language": row[6 if en else 7],
        "calling_code": (row[8],),
        "region": (row[9 if en else 10],),
    }


def documents() -> list[Document]:
    from stepdr_jax.synthesis.scripted import sentences

    pages = []
    for country, row in FACTS.items():
        for lang in ("en", "zh"):
            name = row[0 if lang == "en" else 1]
            values = _values(row, lang) | {"population": (str(POPULATION[country]),)}
            lines = [sentences.state_fact(relation, name, value, lang) for relation, value in values.items()]
            pages.append(
                Document(
                    id=f"atlas:{lang}:{country}",
                    url=f"http://atlas.test/{lang}/{row[0].lower()}",
                    title=name,
                    text="\n".join([f"# {name}", *lines]),
                    lang=lang,
                    source="world",
                    authority=2,
                    published_at="2025-03-01",
                )
            )
        wrong = FACTS["hun" if country != "hun" else "aut"][2]
        pages.append(
            Document(
                id=f"quickfacts:{country}",
                url=f"http://quickfacts.test/{row[0].lower()}",
                title=f"{row[0]} in numbers",
                text="\n".join(
                    [
                        sentences.state_fact("capital", row[0], (wrong,), "en"),
                        sentences.state_fact("population", row[0], (str(POPULATION[country] // 2),), "en"),
                    ]
                ),
                lang="en",
                source="world",
                published_at="2019-05-04",
            )
        )
    return pages


def entities() -> list[dict]:
    rows = []
    for country, row in FACTS.items():
        rows.append({"id": country, "kind": "country", "en": row[0], "zh": row[1], "attributes": {}})
        rows.append({"id": f"city:{row[2].lower()}", "kind": "city", "en": row[2], "zh": row[3], "attributes": {}})
        rows.append({"id": f"currency:{row[4]}", "kind": "currency", "en": row[4], "zh": row[5], "attributes": {}})
        for en, zh in zip(row[6], row[7], strict=True):
            rows.append({"id": f"language:{en}", "kind": "language", "en": en, "zh": zh, "attributes": {}})
    return rows


def triples() -> list[dict]:
    rows = []
    for country, row in FACTS.items():
        rows += [
            {"head": country, "relation": "capital", "tail": f"city:{row[2].lower()}", "tail_is_entity": True},
            {"head": country, "relation": "currency", "tail": f"currency:{row[4]}", "tail_is_entity": True},
            {"head": country, "relation": "region", "tail": f"region:{row[9]}", "tail_is_entity": True},
            {"head": country, "relation": "calling_code", "tail": row[8], "tail_is_entity": False},
        ]
        rows += [
            {"head": country, "relation": "language", "tail": f"language:{en}", "tail_is_entity": True} for en in row[6]
        ]
    return rows


def known(heldout_share: float = 0.0) -> knowledge.Knowledge:
    things = [corpora.Entity(**row) for row in entities()]
    return knowledge.from_pages(documents(), things, heldout_share=heldout_share, seed=0)


def write(world_dir: Path) -> None:
    """Writes the world as a tool host and the pipeline read it."""
    world_dir.mkdir(parents=True, exist_ok=True)
    for name, rows in {
        "documents": [document.model_dump(mode="json") for document in documents()],
        "entities": entities(),
        "triples": triples(),
    }.items():
        (world_dir / f"{name}.jsonl").write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
    hosts = {"atlas.test": {"authority": 2}, "quickfacts.test": {"authority": 0}, "flaky.test": {"authority": 0}}
    (world_dir / "sites.json").write_text(json.dumps({"hosts": hosts, "fingerprint": "small"}))
