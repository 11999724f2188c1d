r"""Who acts in synthesis: an OpenAI-compatible model when one is configured, else the offline expert.

The offline expert is a policy like any other: it runs in the episode loop, calls the real tools and sees nothing but
their observations. It knows the plan of its task (whom and what to look for), never the answer: it reads statements in
the passages shown, prefers authoritative hosts and quotes. It also makes mistakes on request, so that recoveries can be
learned: a misspelt or empty query, a page that is gone or does not answer, a hasty answer from an unreliable page.
"""

import dataclasses
import os
import random
import re
from collections.abc import Callable, Generator, Mapping

from ml_collections import ConfigDict

from stepdr_jax.agent.policy import EndpointPolicy, Policy, Turn
from stepdr_jax.errors import UserError
from stepdr_jax.records import Message, Task
from stepdr_jax.synthesis import reports, sentences, verification
from stepdr_jax.synthesis.renaming import misspell
from stepdr_jax.text.matching import normalise
from stepdr_jax.tokens import chat

SLIPS = ("misspelt", "empty_query", "dead_link", "unavailable", "hasty")
NOISE = frozenset(SLIPS) - {"hasty"}
_SEARCH_HEADER = re.compile(r"\d+\. .* \| (\S+) \| ?\S*")
_PAGE_HEADER = re.compile(r".* \| https?://([^/\s|]+)\S* \| ?\S*")
_PASSAGE = re.compile(r"(.+?)\s*\\cite\{(web_[a-z]{8})\}")
_STORED = re.compile(r"stored in (results/[^\s;,]+)")

SAY = {
    "en": {
        "search": "I search the {topic}.",
        "clue": "I search the {topic}.",
        "open": "I open the page.",
        "entity": "It is {name}.",
        "again": "Nothing useful. I search the {topic}.",
        "failed": "The page cannot be read. I search the {topic}.",
        "unreliable": "{host} is not reliable. I check the {topic} again.",
        "compare": "{host} says {value}, but {better} is more reliable.",
        "check": "I check the {topic}.",
        "plan": "I plan the report.",
        "batch": "I search all points.",
        "missing": "The {topic} is missing.",
        "rest": "I read the rest.",
        "link": "I follow the link to {name}.",
        "unknown": "I could not find it.",
    },
    "zh": {
        "search": "我搜索{topic}。",
        "clue": "我搜索{topic}。",
        "open": "我打开网页。",
        "entity": "是{name}。",
        "again": "没有有用的结果。我搜索{topic}。",
        "failed": "网页打不开。我搜索{topic}。",
        "unreliable": "{host}不可靠。我再查{topic}。",
        "compare": "{host}说是{value}，但{better}更可靠。",
        "check": "我核实{topic}。",
        "plan": "我先列计划。",
        "batch": "我搜索各个要点。",
        "missing": "还缺{topic}。",
        "rest": "我读剩下的部分。",
        "link": "我打开{name}的链接。",
        "unknown": "没有找到。",
    },
}

Script = Generator[str, list[str], None]


@dataclasses.dataclass(frozen=True)
class Style:
    """How the expert works on one task, drawn once per episode."""

    thoughts: bool = True
    open_page: bool = False  # reads the whole page before answering
    todo: bool = False  # writes the plan of a report into the todo list
    one_by_one: bool = False  # a search per point of a report instead of one batch
    slip: str = ""  # one of SLIPS, or none
    check_again: bool = False  # a retry after a wrong answer: compares sources before it answers


def draw_style(task: Task, rng: random.Random, *, slip_share: float) -> Style:
    """Draws a style. `slip_share` of the episodes get a mistake; more are made than kept, so the share can be exact."""
    slips = SLIPS if task.kind in ("fact", "verification") else ("misspelt", "empty_query", "unavailable")
    # reports and walks have longer episodes: no further turns there
    slip = rng.choice(slips) if task.kind != "doc_walk" and rng.random() < slip_share else ""
    return Style(
        thoughts=rng.random() < 0.75,
        open_page=task.kind == "fact" and not slip and rng.random() < 0.05,
        todo=task.kind == "report" and not slip and rng.random() < 0.3,
        one_by_one=task.kind == "report" and not slip and rng.random() < 0.15,
        slip=slip,
    )


@dataclasses.dataclass(frozen=True)
class Passage:
    host: str
    text: str
    id: str
    statement: sentences.Statement | None


def read_passages(text: str) -> list[Passage]:
    """Reads the cited passages of a search result or an opened page, with the host that each stands under."""
    host, passages = "", []
    for line in text.splitlines():
        line = line.strip()
        if match := _PASSAGE.fullmatch(line):
            passages.append(Passage(host, match.group(1), match.group(2), sentences.parse(match.group(1))))
        elif match := _SEARCH_HEADER.fullmatch(line) or _PAGE_HEADER.fullmatch(line):
            host = match.group(1)
    return passages


class Expert:
    """The offline expert for one episode of one task.

    Args:
        task: its plan, subject and relations are known to the expert, its answer is not read.
        authority: host -> 0, 1 or 2.
        style: see `Style`.
        seed: of misspellings.
        bad_urls: an address that cannot be read, by slip ("dead_link", "unavailable").
    """

    name = "expert"

    def __init__(
        self,
        task: Task,
        authority: Mapping[str, int],
        style: Style,
        *,
        seed: int = 0,
        bad_urls: Mapping[str, str] | None = None,
    ) -> None:
        self.task, self.style = task, style
        self.mistakes: set[int] = set()  # numbers of the turns that are slips: kept out of the loss
        self.misspelt: dict[str, str] = {}  # misspelling -> the name it stands for
        self._authority = authority
        self._bad_urls = bad_urls or {}
        self._rng = random.Random(f"expert {task.id} {seed}")
        self._say = SAY[task.lang]
        self._turns = 0
        self._history: list[str] = []

    def start(self, messages: list[Message], *, episode_id: str, seed: int) -> "ExpertSession":
        self._turns = 0
        self._history = [message.content for message in messages[2:]]  # of an earlier attempt, when there was one
        self.mistakes.clear()
        script = {
            "fact": self._fact,
            "deep_search": self._two_hop,
            "doc_walk": self._walk,
            "verification": self._verification,
            "report": self._report,
        }[self.task.kind]
        return ExpertSession(script(), self._say["unknown"])

    # ------------------------------------------------------------------------------------------------ one turn each

    def _turn(self, thought: str, tool: str, arguments: dict, **fields) -> str:
        self._turns += 1
        call = chat.tool_call_text(tool, arguments)
        return f"<think>{self._say[thought].format(**fields)}</think>\n{call}" if self.style.thoughts else call

    def _search(self, thought: str, queries: list[str], topk: int | None = None, **fields) -> str:
        arguments: dict = {"queries": queries}
        if topk:
            arguments["topk"] = topk
        return self._turn(thought, "batch_web_surfer", arguments, **fields)

    def _answer(self, text: str, thought: str = "") -> str:
        self._turns += 1
        said = f"<think>{thought}</think>\n" if thought and self.style.thoughts else ""
        return f"{said}<answer>{text}</answer>"

    def _quote(self, passage: Passage) -> str:
        return f"{passage.text} \\cite{{{passage.id}}}"

    def _slip(self, text: str) -> str:
        self.mistakes.add(self._turns - 1)
        return text

    # ------------------------------------------------------------------------------------------- reading observations

    def _find(self, observed: list[str], relation: str, subject: str) -> list[Passage]:
        """Passages that state the relation of the subject, most authoritative first, else in the order shown."""
        passages = [passage for text in observed for passage in read_passages(text)]
        found = [
            passage
            for passage in passages
            if passage.statement
            and not passage.statement.inverse
            and passage.statement.relation == relation
            and normalise(passage.statement.subject) == normalise(subject)
        ]
        return sorted(found, key=lambda passage: -self._rank(passage))

    def _rank(self, passage: Passage) -> int:
        return self._authority.get(passage.host, 0)

    def _look_up(
        self, relation: str, subject: str, thought: str = "search", **fields
    ) -> Generator[str, list[str], list[Passage]]:
        """Searches until an authoritative statement is shown; at most three searches."""
        topic = sentences.topic(relation, subject, self.task.lang)
        fields.setdefault("topic", topic)
        found = self._find((yield self._search(thought, [topic], **fields)), relation, subject)
        if found and self._rank(found[0]) == 2:
            return found
        for topk in (4, 8):
            if found:
                text = self._search("unreliable", [topic], topk, host=found[0].host, topic=topic)
            else:
                text = self._search("again", [topic], topk, topic=topic)
            found = self._find((yield text), relation, subject) or found
            if found and self._rank(found[0]) == 2:
                break
        return found

    def _slips_first(self, topic: str, subject: str) -> Generator[str, list[str], str]:
        """Makes the style's mistake, if it is one of the first turn; returns how to go on thinking."""
        slip = self.style.slip
        if slip == "misspelt" and subject.isdigit():  # another number is no misspelling
            slip = "empty_query"
        if slip == "misspelt":
            wrong = misspell(subject, self._rng)
            self.misspelt[wrong] = subject
            bad = topic.replace(subject, wrong)
            yield self._slip(self._search("search", [bad], topic=bad))
            return "again"
        if slip == "empty_query":
            yield self._slip(self._search("search", [""], topic=topic))
            return "again"
        if slip in self._bad_urls:
            yield self._slip(self._turn("open", "batch_web_surfer", {"urls": [self._bad_urls[slip]]}))
            return "failed"
        return ""

    def _read_page(self, found: list[Passage], relation: str, subject: str) -> Generator[str, list[str], list[Passage]]:
        """Opens the page of the best passage, and its stored rest when the statement is not in the part shown."""
        observed = yield self._turn("open", "batch_web_surfer", {"urls": [found[0].id]})
        on_page = self._find(observed, relation, subject)
        stored = next((match.group(1) for text in observed if (match := _STORED.search(text))), None)
        if not on_page and stored:
            observed = yield self._turn("rest", "file", {"op": "read", "path": stored})
            on_page = self._find(observed, relation, subject)
        return on_page or found

    # ------------------------------------------------------------------------------------------------------- scripts

    def _one(self, first_thought: str) -> Generator[str, list[str], list[Passage]]:
        """Finds the one fact of a task, by the style: with slips, page reading or a second look."""
        relation, subject = self.task.metadata["relations"][-1], self.task.metadata["subject"]
        topic = sentences.topic(relation, subject, self.task.lang)
        thought = (yield from self._slips_first(topic, subject)) or first_thought
        if self.style.slip == "hasty":
            observed = yield self._search(thought, [topic], 4, topic=topic)
            found = self._find(observed, relation, subject)
        elif self.style.check_again:
            observed = yield self._search("check", [topic], topic=topic)
            found = self._find([*observed, *self._history], relation, subject)
        else:
            found = yield from self._look_up(relation, subject, thought)
        if self.style.open_page and found:
            found = yield from self._read_page(found, relation, subject)
        if self.style.slip == "hasty":  # believes the least reliable page it sees
            found = found[::-1]
        return found

    def _compare(self, found: list[Passage]) -> str:
        best = found[0]
        for other in found[1:]:
            if normalise(other.statement.value) != normalise(best.statement.value) and other.host != best.host:
                return self._say["compare"].format(host=other.host, value=other.statement.value, better=best.host)
        return ""

    def _fact(self) -> Script:
        found = yield from self._one("search")
        if not found:
            yield self._answer(self._say["unknown"])
            return
        yield self._answer(self._quote(found[0]), self._compare(found) if self.style.check_again else "")

    def _verification(self) -> Script:
        found = yield from self._one("check")
        if not found:
            yield self._answer(self._say["unknown"])
            return
        agrees = normalise(found[0].statement.value) == normalise(self.task.metadata["claimed"])
        verdict = verification.VERDICT[self.task.lang]["supported" if agrees else "refuted"]
        separator = "" if self.task.lang == "zh" else " "
        thought = self._compare(found) if self.style.check_again else ""
        yield self._answer(verdict + separator + self._quote(found[0]), thought)

    def _two_hop(self) -> Script:
        lang = self.task.lang
        clue_relation, asked = self.task.metadata["relations"]
        clue, value = self.task.plan[0].query, self.task.facts[0].tail
        thought = (yield from self._slips_first(clue, value)) or "clue"
        name = None
        for topk in (None, 6):
            observed = yield self._search(thought, [clue], topk, topic=clue)
            passages = [passage for text in observed for passage in read_passages(text)]
            matching = [
                passage
                for passage in passages
                if passage.statement
                and passage.statement.relation == clue_relation
                and normalise(passage.statement.value) == normalise(value)
            ]
            if matching:
                name = max(matching, key=self._rank).statement.subject
                break
            thought = "again"
        if name is None:
            yield self._answer(self._say["unknown"])
            return
        thought = "entity"
        found = yield from self._look_up(asked, name, thought, name=name, topic=sentences.topic(asked, name, lang))
        yield self._answer(self._quote(found[0]) if found else self._say["unknown"])

    def _report(self) -> Script:
        lang, subject = self.task.lang, self.task.metadata["subject"]
        relations = self.task.metadata["relations"]
        topics = {relation: sentences.topic(relation, subject, lang) for relation in relations}
        thought = "batch"
        if self.style.todo:
            yield self._turn("plan", "todo", {"items": [step.goal for step in self.task.plan]})
        elif self.style.slip:
            thought = (yield from self._slips_first(topics[relations[0]], subject)) or "batch"
        found: dict[str, list[Passage]] = {}
        if self.style.one_by_one:
            for relation in relations:
                observed = yield self._search("search", [topics[relation]], topic=topics[relation])
                found[relation] = self._find(observed, relation, subject)
        else:
            if thought != "batch":  # after a failure the thought names one topic: the first
                observed = yield self._search(thought, list(topics.values()), 1, topic=topics[relations[0]])
            else:
                observed = yield self._search("batch", list(topics.values()), 1)
            found = {relation: self._find(observed, relation, subject) for relation in relations}
        for relation in relations:
            if not found[relation] or self._rank(found[relation][0]) < 2:
                observed = yield self._search("missing", [topics[relation]], 4, topic=topics[relation])
                found[relation] = self._find(observed, relation, subject) or found[relation]
        if not all(found.values()):
            yield self._answer(self._say["unknown"])
            return
        lines = [reports.title(subject), *(self._quote(found[relation][0]) for relation in relations)]
        yield self._answer("\n".join(lines))

    def _walk(self) -> Script:
        """Follows links from a given page: every step opens the page that the last one links to."""
        urls = self.task.metadata["urls"]
        subject, relation = self.task.metadata["subject"], self.task.metadata["relations"][-1]
        observed: list[str] = []
        for number, url in enumerate(urls):
            thought = "open" if number == 0 else "link"
            name = self.task.metadata["names"][number]
            observed = yield self._turn(thought, "batch_web_surfer", {"urls": [url]}, name=name)
        found = self._find(observed, relation, subject)
        stored = next((match.group(1) for text in observed if (match := _STORED.search(text))), None)
        if not found and stored:
            observed = yield self._turn("rest", "file", {"op": "read", "path": stored})
            found = self._find(observed, relation, subject)
        if not found:
            found = yield from self._look_up(relation, subject)
        yield self._answer(self._quote(found[0]) if found else self._say["unknown"])


class ExpertSession:
    """Feeds observations to a script and returns what it writes."""

    log = None
    context_tokens = None

    def __init__(self, script: Script, unknown: str) -> None:
        self._script, self._unknown = script, unknown
        self._observed: list[str] | None = None

    async def act(self, max_tokens: int) -> Turn:
        try:
            text = next(self._script) if self._observed is None else self._script.send(self._observed)
        except StopIteration:
            text = f"<answer>{self._unknown}</answer>"
        return Turn(text, "stop")

    async def observe(self, texts: list[str], *, tail: str = "") -> None:
        self._observed = list(texts)

    async def close(self) -> None:
        self._script.close()


class Teacher:
    """Who acts on a task: `teacher(task, style, seed)` is a policy.

    Args:
        config: `teacher.endpoint`, `teacher.model`, `teacher.api_key_env`.
        authority: host -> authority, for the offline expert.
        bad_urls: task -> addresses that cannot be read, see `Expert`.

    Raises:
        UserError: an endpoint without a model name.
    """

    def __init__(
        self, config: ConfigDict, authority: Mapping[str, int], bad_urls: Callable[[Task], Mapping[str, str]]
    ) -> None:
        self._authority, self._bad_urls = authority, bad_urls
        self._endpoint: EndpointPolicy | None = None
        chosen = config.teacher
        if not chosen.endpoint:
            return
        if not chosen.model:
            raise UserError(
                f"teacher.model: expected the model's name at {chosen.endpoint}, got an empty string; "
                "set --config.teacher.model"
            )
        self._endpoint = EndpointPolicy(
            chosen.endpoint,
            chosen.model,
            os.environ.get(chosen.api_key_env, ""),
            concurrency=config.synthesis.episode_concurrency,
        )

    def __call__(self, task: Task, style: Style, seed: int) -> Policy:
        if self._endpoint is not None:
            return self._endpoint
        return Expert(task, self._authority, style, seed=seed, bad_urls=self._bad_urls(task))

    async def close(self) -> None:
        if self._endpoint is not None:
            await self._endpoint.close()
