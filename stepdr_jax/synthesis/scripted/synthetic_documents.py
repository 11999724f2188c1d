"""Synthetic documents of mid-training: passages and exercises on them, without tool calls (paper, Tables 1 and 2).

Every row shows text in the shape of an observation and then works with it: quotes a passage with its citation mark,
answers, rewrites, summarises, composes two facts, checks a claim. Names, numbers and ids are drawn anew for most rows
(see `renaming`), so the only way to continue a row is to read it. Copying is what a small model must learn first:
`quoting` holds it in its plainest form, a span and the same span again.

Rows are JSON objects: id, component, capability, lang, loss, prompt and completion; "chat": true marks rows that are
one user turn and one assistant turn.
"""

import dataclasses
import random
from collections.abc import Callable, Iterator

from stepdr_jax.records import content_id
from stepdr_jax.synthesis.renaming import citation_id, invented_name
from stepdr_jax.synthesis.scripted import deep_search, reports, sentences, verification
from stepdr_jax.synthesis.scripted.cards import (
    HOSTS,
    RELIABLE,
    Card,
    Shown,
    invented_value,
    question_on,
    real_card,
    renamed_card,
    render_page,
    render_search_results,
    shown_passage,
)
from stepdr_jax.synthesis.scripted.knowledge import Knowledge

# Rows made of one copy of one country, by component. Their tokens then roughly follow the rates of the mixtures.
ROWS = {
    "active_reading": 6,
    "quoting": 8,
    "synthetic_knowledge": 7,
    "summarisation": 2,
    "reasoning": 2,
    "reflection": 3,
    "url_qa": 2,
    "long_summarisation": 1,
    "dialogue": 1,
}
CAPABILITY = {
    "active_reading": "deep_search",
    "quoting": "report",
    "synthetic_knowledge": "deep_search",
    "summarisation": "report",
    "reasoning": "planning",
    "reflection": "reflection",
    "url_qa": "deep_search",
    "long_summarisation": "report",
    "dialogue": "report",
}


def _pick(card: Card, rng: random.Random, least: int, most: int) -> list[str]:
    relations = list(card.values)
    return rng.sample(relations, min(rng.randint(least, most), len(relations)))


Maker = Callable[[Card, list[Card], random.Random], dict]


def _row(prompt: str, completion: str, *, chat: bool = False, loss: str = "completion") -> dict:
    row = {"prompt": prompt, "completion": completion, "loss": loss}
    return row | {"chat": True} if chat else row


# ---------------------------------------------------------------------------------------------------------- makers


def quoting(card: Card, others: list[Card], rng: random.Random) -> dict:
    """A span and the same span again; look-up tables; passages and quotations; questions and what to search for."""
    kind = rng.random()
    lang = card.lang
    if kind < 0.4:
        return _repeat(card, rng)
    if kind < 0.6:
        return _table(card, rng)
    if kind < 0.85:
        cards = [card, *rng.sample(others, min(rng.randint(0, 2), len(others)))]
        shown = [shown_passage(c, relation, rng) for c in cards for relation in _pick(c, rng, 1, 3)]
        rng.shuffle(shown)
        shown = shown[:4]
        asked = rng.sample(shown, min(2, len(shown)))
        text = render_search_results(shown, rng) if rng.random() < 0.6 else render_page(shown, rng)
        first, *rest = [(item.card.topic(item.relation), item.quote) for item in asked]
        completion = first[1] + "".join(f"\n{topic}\n{quote}" for topic, quote in rest)
        return _row(f"{text}\n{first[0]}\n", completion)
    relation = rng.choice(list(card.values))
    arrow = "搜索：" if lang == "zh" else "Search: "
    return _row(f"{question_on(card, relation, rng)}\n{arrow}", card.topic(relation))


def _repeat(card: Card, rng: random.Random) -> dict:
    words = []
    for _ in range(rng.randint(4, 14)):
        kind = rng.random()
        if kind < 0.25:  # letters without any sense: nothing but the first span tells what comes next
            words.append(
                "".join(rng.choices("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ", k=rng.randint(2, 7)))
            )
        elif kind < 0.45:
            words.append(invented_name(rng, card.lang, capitalized=rng.random() < 0.7))
        elif kind < 0.6:
            words.append(str(rng.randint(10, 10 ** rng.randint(2, 8))))
        elif kind < 0.75:
            words.append(f"\\cite{{{citation_id(rng)}}}")
        elif kind < 0.9:
            words.append(card.topic(rng.choice(list(card.values))))
        else:
            words.append(shown_passage(card, rng.choice(list(card.values)), rng).quote)
    span = rng.choice((" ", ", ", "\n")).join(words)
    times = 2 if len(span) < 120 else 1  # short spans come a third time: the copy is then worth more tokens
    return _row(span + "\n\n", "\n\n".join([span] * times))


def _table(card: Card, rng: random.Random) -> dict:
    labels = list(dict.fromkeys(invented_name(rng, card.lang) for _ in range(rng.randint(3, 9))))
    kind = rng.random()
    table = {
        label: citation_id(rng)
        if kind < 0.3
        else str(rng.randint(10, 99_999_999))
        if kind < 0.55
        else invented_name(rng, card.lang, capitalized=kind < 0.85)
        for label in labels
    }
    text = "\n".join(f"{label}: {value}" for label, value in table.items())
    asked = rng.sample(labels, min(len(labels), 5))
    completion = table[asked[0]] + "".join(f"\n{label}? {table[label]}" for label in asked[1:])
    return _row(f"{text}\n\n{asked[0]}? ", completion)


def active_reading(card: Card, others: list[Card], rng: random.Random) -> dict:
    """A page, then questions about it answered by quotation, or the page in other words."""
    relations = _pick(card, rng, 2, 5)
    host_shown = [dataclasses.replace(shown_passage(card, r, rng), host=HOSTS[0]) for r in relations]
    text = render_page(host_shown, rng)
    asked = rng.sample(host_shown, min(len(host_shown), rng.randint(2, 3)))
    zh = card.lang == "zh"
    if rng.random() < 0.65:
        lines = [(question_on(card, item.relation, rng), item.quote) for item in asked]
        completion = lines[0][1] + "".join(f"\n{q}\n{a}" for q, a in lines[1:])
        return _row(f"{text}\n{lines[0][0]}\n", completion)
    colon = "：" if zh else ": "
    facts = [
        (sentences.relation_name(item.relation, card.lang, len(card.values[item.relation])), card.values[item.relation])
        for item in host_shown
    ]
    rewritten = "\n".join(f"{label}{colon}{sentences.join_values(values, card.lang)}" for label, values in facts)
    return _row(f"{text}\n\n", f"{card.subject}\n{rewritten}")


def synthetic_knowledge(card: Card, others: list[Card], rng: random.Random) -> dict:
    """An episode in plain words: question, search, results, quoted answer; the results hold distractors."""
    relation = rng.choice(list(card.values))
    target = shown_passage(card, relation, rng)
    shown = [target]
    for _ in range(rng.choice((0, 1, 1, 1, 2))):
        if others and rng.random() < 0.5:  # another subject, the same relation
            other = rng.choice(others)
            wanted = relation if relation in other.values else rng.choice(list(other.values))
            shown.append(shown_passage(other, wanted, rng))
        else:
            remaining = [r for r in card.values if r != relation]
            if remaining:
                shown.append(shown_passage(card, rng.choice(remaining), rng))
    if rng.random() < 0.3:  # the wanted passage is mostly first, as in real results
        rng.shuffle(shown)
    arrow = "搜索：" if card.lang == "zh" else "Search: "
    prompt = f"{question_on(card, relation, rng)}\n{arrow}{card.topic(relation)}\n{render_search_results(shown, rng)}\n"
    return _row(prompt, target.quote)


def _request(card: Card, relations: list[str], rng: random.Random) -> str:
    points = ("、" if card.lang == "zh" else ", ").join(sentences.relation_name(r, card.lang) for r in relations)
    return rng.choice(reports.ASK[card.lang]).format(subject=card.subject, points=points)


def _brief(card: Card, shown: list[Shown]) -> str:
    return "\n".join([reports.report_title(card.subject), *(item.quote for item in shown)])


def summarisation(card: Card, others: list[Card], rng: random.Random) -> dict:
    """A page and a request; the brief quotes what was asked for, in the order asked."""
    shown = [shown_passage(card, relation, rng) for relation in _pick(card, rng, 3, 6)]
    wanted = rng.sample(shown, min(len(shown), rng.choice((2, 2, 3))))
    request = _request(card, [item.relation for item in wanted], rng)
    if rng.random() < 0.5:  # as in an episode: the request, then one block per query
        blocks = [f"query: {card.topic(item.relation)}\n{render_search_results([item], rng)}" for item in wanted]
        return _row("\n".join([request, *blocks]) + "\n", _brief(card, wanted))
    return _row(f"{render_page(shown, rng)}\n{request}\n", _brief(card, wanted))


def reasoning(card: Card, others: list[Card], rng: random.Random) -> dict:
    """Two facts composed: the country is found by one of them, the other is the answer."""
    clues = [r for r in deep_search.CLUES[card.lang] if r in card.values and len(card.values[r]) == 1]
    asked = [r for r in card.values if r not in clues]
    if not clues or not asked:
        return synthetic_knowledge(card, others, rng)
    clue_relation, relation = rng.choice(clues), rng.choice(asked)
    clue = deep_search.clue_phrase(clue_relation, card.values[clue_relation][0], card.lang)
    first, second = shown_passage(card, clue_relation, rng), shown_passage(card, relation, rng)
    distractors = [shown_passage(c, rng.choice(list(c.values)), rng) for c in rng.sample(others, min(1, len(others)))]
    shown = [first, *distractors]
    subject = clue if card.lang == "zh" else "the " + clue
    topic = sentences.topic_of(relation, subject, card.lang)
    asked_text = rng.choice(deep_search.ASK[card.lang]).format(topic=topic)
    if card.lang == "zh":
        prompt = f"{asked_text}\n搜索：{clue}\n{render_search_results(shown, rng)}\n"
        step = f"是{card.subject}。搜索：{card.topic(relation)}"
    else:
        prompt = f"{asked_text}\nSearch: {clue}\n{render_search_results(shown, rng)}\n"
        step = f"It is {card.subject}. Search: {card.topic(relation)}"
    if rng.random() < 0.5:
        return _row(prompt, step)
    return _row(f"{prompt}{step}\n{render_search_results([second], rng)}\n", second.quote)


def reflection(card: Card, others: list[Card], rng: random.Random) -> dict:
    """A claim and its evidence; or two pages that disagree, of which one is reliable."""
    single = [r for r in card.values if len(card.values[r]) == 1]
    if not single:
        return synthetic_knowledge(card, others, rng)
    relation = rng.choice(single)
    right = dataclasses.replace(shown_passage(card, relation, rng), host=rng.choice(RELIABLE))
    false_value = invented_value(relation, rng, card.lang)
    false_card = Card(card.subject, card.lang, {relation: (false_value,)})
    if rng.random() < 0.6:
        holds = rng.random() < 0.5
        said = (card if holds else false_card).sentence(relation).rstrip(".。")
        claim = said if card.lang == "zh" else said[0].lower() + said[1:]
        asked = rng.choice(verification.ASK[card.lang]).format(claim=claim)
        verdict = verification.VERDICT[card.lang]["supported" if holds else "refuted"]
        separator = "" if card.lang == "zh" else " "
        return _row(f"{asked}\n{render_search_results([right], rng)}\n", f"{verdict}{separator}{right.quote}")
    wrong = Shown(false_card, relation, "quickfacts.test", citation_id(rng))
    shown = [right, wrong] if rng.random() < 0.5 else [wrong, right]
    asked = question_on(card, relation, rng)
    if rng.random() < 0.5:  # a draft is corrected
        label = "草稿：" if card.lang == "zh" else "Draft: "
        check = "更正：" if card.lang == "zh" else "Corrected: "
        return _row(f"{asked}\n{label}{wrong.quote}\n{render_search_results(shown, rng)}\n{check}", right.quote)
    return _row(f"{asked}\n{render_search_results(shown, rng)}\n", right.quote)


def url_qa(card: Card, others: list[Card], rng: random.Random) -> dict:
    """A page with its address and a question about it, as one chat turn."""
    shown = [shown_passage(card, relation, rng) for relation in _pick(card, rng, 2, 6)]
    shown = [dataclasses.replace(item, host=shown[0].host) for item in shown]
    target = rng.choice(shown)
    return _row(f"{render_page(shown, rng)}\n{question_on(card, target.relation, rng)}", target.quote, chat=True)


def long_summarisation(card: Card, others: list[Card], rng: random.Random) -> dict:
    """Whole pages of two or three subjects, one of which is to be summarised."""
    cards = [card, *rng.sample(others, min(rng.randint(1, 2), len(others)))]
    pages = {id(c): [shown_passage(c, relation, rng) for relation in _pick(c, rng, 3, 4)] for c in cards}
    wanted = rng.sample(pages[id(card)], min(len(pages[id(card)]), rng.choice((2, 3))))
    request = _request(card, [item.relation for item in wanted], rng)
    rng.shuffle(cards)
    text = "\n".join(render_page(pages[id(c)], rng) for c in cards)
    return _row(f"{text}\n{request}", _brief(card, wanted), chat=True)


SMALL_TALK = {
    "en": (
        ("Hello.", "Hello. What shall I look up?"),
        ("Hi, who are you?", "I am a research agent. I search, read and cite sources."),
        ("Thank you.", "You are welcome."),
        ("What can you do?", "I search the web, read pages and write short cited answers."),
        ("Good morning.", "Good morning. What do you want to know?"),
        ("Can you help me?", "Yes. Tell me what you want to find out."),
        ("Goodbye.", "Goodbye."),
    ),
    "zh": (
        ("你好。", "你好。要查什么？"),
        ("你是谁？", "我是研究智能体。我会搜索、阅读并注明来源。"),
        ("谢谢。", "不客气。"),
        ("你能做什么？", "我能搜索网页、阅读页面并写出带来源的简短回答。"),
        ("再见。", "再见。"),
    ),
}


def dialogue(card: Card, others: list[Card], rng: random.Random) -> dict:
    """Plain chat: greetings, and small requests about text in the message."""
    zh = card.lang == "zh"
    kind = rng.random()
    if kind < 0.25:
        return _row(*rng.choice(SMALL_TALK[card.lang]), chat=True)
    name, place = invented_name(rng, card.lang), invented_name(rng, card.lang)
    if kind < 0.5:
        return _row(
            *((f"我叫{name}。", f"你好，{name}。") if zh else (f"My name is {name}.", f"Hello, {name}.")), chat=True
        )
    if kind < 0.75:
        relation = rng.choice(list(card.values))
        said = card.sentence(relation)
        return _row(f"请重复：{said}" if zh else f"Repeat this: {said}", said, chat=True)
    if zh:
        return _row(f"{name}住在{place}。{name}住在哪里？", f"{name}住在{place}。", chat=True)
    return _row(f"{name} lives in {place}. Where does {name} live?", f"{name} lives in {place}.", chat=True)


MAKERS: dict[str, Maker] = {
    "active_reading": active_reading,
    "quoting": quoting,
    "synthetic_knowledge": synthetic_knowledge,
    "summarisation": summarisation,
    "reasoning": reasoning,
    "reflection": reflection,
    "url_qa": url_qa,
    "long_summarisation": long_summarisation,
    "dialogue": dialogue,
}


def document_rows(knowledge: Knowledge, *, copies: int, chinese_share: float, seed: int) -> Iterator[dict]:
    """Yields all rows: of every training country the real facts, and `copies` renamed ones.

    Held-out countries give no card, and no card mentions a name that only they have.
    """
    cards = {lang: _cards(knowledge, lang) for lang in ("en", "zh")}
    pools = {lang: list(cards[lang].values()) for lang in cards}
    for country in knowledge.countries:
        if country in knowledge.heldout:
            continue
        for copy in range(copies + 1):
            rng = random.Random(f"reading {seed} {country} {copy}")
            for component, count in ROWS.items():
                # what invented entities are for is not said about real ones
                invented = copy > 0 or component == "synthetic_knowledge"
                for number in range(count):
                    lang = "zh" if rng.random() < chinese_share and country in cards["zh"] else "en"
                    if country not in cards[lang]:
                        continue
                    real = pools[lang]
                    card, others = cards[lang][country], rng.sample(real, min(2, len(real)))
                    others = [other for other in others if other is not card]
                    if invented:
                        card = renamed_card(card, rng, real)
                        others = [renamed_card(other, rng, real) for other in others]
                    made = MAKERS[component](card, others, rng)
                    if copy == 0 and component == "active_reading" and "completion" in made:
                        made["loss"] = "all"  # documents themselves, not only what is said about them
                    yield {
                        "id": content_id("read_", country, copy, component, number),
                        "component": component,
                        "capability": CAPABILITY[component],
                        "lang": lang,
                        **made,
                    }


def _cards(knowledge: Knowledge, lang: str) -> dict[str, Card]:
    """Cards of training countries, without values that are private to held-out ones."""
    cards = {}
    for country in knowledge.countries:
        if country in knowledge.heldout:
            continue
        card = real_card(knowledge, country, lang)
        kept = {
            relation: values
            for relation, values in card.values.items()
            if not any(value in knowledge.private for value in values)
        }
        if len(kept) >= 3:
            cards[country] = dataclasses.replace(card, values=kept)
    return cards
