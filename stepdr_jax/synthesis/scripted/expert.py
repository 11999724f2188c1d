"""The scripted expert: the offline policy that acts in synthesis when no teacher's endpoint is configured.

It is a policy like any other: it runs in the episode loop, calls the real tools and sees only their observations. It
knows the plan of its task (which subject and relations to look for), never the answer: it reads statements in the
passages shown, prefers authoritative hosts and quotes. On request it injects an error, so that recovery can be
learned: a misspelt or empty query, a page that is missing or does not answer, an answer from an unreliable page.
"""

import random
import re
from collections.abc import Generator, Mapping

from stepdr_jax.agent.policy import Turn
from stepdr_jax.records import Message, Task
from stepdr_jax.synthesis.renaming import misspell
from stepdr_jax.synthesis.scripted import reports, sentences, verification
from stepdr_jax.synthesis.scripted.passages import Passage, read_passages
from stepdr_jax.synthesis.scripted.style import Style
from stepdr_jax.text.matching import normalize
from stepdr_jax.tokens import chat

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


class ScriptedExpert:
    """The scripted expert for one episode of one task.

    Args:
        task: the expert reads its plan, subject and relations, never its answer.
        authority: host -> 0, 1 or 2.
        style: see `Style`.
        seed: of misspellings.
        bad_urls: an address that cannot be read, by injected error ("dead_link", "unavailable").
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
        self.injected_turns: set[int] = set()  # numbers of the turns with an injected error: kept out of the loss
        self.misspelt: dict[str, str] = {}  # misspelling -> the name it stands for
        self._authority = authority
        self._bad_urls = bad_urls or {}
        self._rng = random.Random(f"expert {task.id} {seed}")
        self._say = SAY[task.lang]
        self._turns = 0
        self._history: list[str] = []

    def start(self, messages: list[Message], *, episode_id: str, seed: int) -> "ScriptedSession":
        self._turns = 0
        self._history = [message.content for message in messages[2:]]  # of an earlier attempt, when there was one
        self.injected_turns.clear()
        script = {
            "fact": self._fact,
            "deep_search": self._two_hop,
            "doc_walk": self._walk,
            "verification": self._verification,
            "report": self._report,
        }[self.task.kind]
        return ScriptedSession(script(), self._say["unknown"])

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

    def _injected(self, text: str) -> str:
        """Marks the turn just written as an injected error."""
        self.injected_turns.add(self._turns - 1)
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
            and normalize(passage.statement.subject) == normalize(subject)
        ]
        return sorted(found, key=lambda passage: -self._rank(passage))

    def _rank(self, passage: Passage) -> int:
        return self._authority.get(passage.host, 0)

    def _look_up(
        self, relation: str, subject: str, thought: str = "search", **fields
    ) -> Generator[str, list[str], list[Passage]]:
        """Searches until an authoritative statement is shown; at most three searches."""
        topic = sentences.topic_of(relation, subject, self.task.lang)
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

    def _inject_error(self, topic: str, subject: str) -> Generator[str, list[str], str]:
        """Makes the style's injected error, if it is one of the first turn; returns the key of the next thought."""
        error = self.style.injected_error
        if error == "misspelt" and subject.isdigit():  # another number is no misspelling
            error = "empty_query"
        if error == "misspelt":
            wrong = misspell(subject, self._rng)
            self.misspelt[wrong] = subject
            bad = topic.replace(subject, wrong)
            yield self._injected(self._search("search", [bad], topic=bad))
            return "again"
        if error == "empty_query":
            yield self._injected(self._search("search", [""], topic=topic))
            return "again"
        if error in self._bad_urls:
            yield self._injected(self._turn("open", "batch_web_surfer", {"urls": [self._bad_urls[error]]}))
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
        """Finds the one fact of a task, by the style: with an injected error, page reading or a comparison."""
        relation, subject = self.task.metadata["relations"][-1], self.task.metadata["subject"]
        topic = sentences.topic_of(relation, subject, self.task.lang)
        thought = (yield from self._inject_error(topic, subject)) or first_thought
        if self.style.injected_error == "hasty":
            observed = yield self._search(thought, [topic], 4, topic=topic)
            found = self._find(observed, relation, subject)
        elif self.style.check_again:
            observed = yield self._search("check", [topic], topic=topic)
            found = self._find([*observed, *self._history], relation, subject)
        else:
            found = yield from self._look_up(relation, subject, thought)
        if self.style.open_page and found:
            found = yield from self._read_page(found, relation, subject)
        if self.style.injected_error == "hasty":  # believes the least reliable page it sees
            found = found[::-1]
        return found

    def _compare(self, found: list[Passage]) -> str:
        best = found[0]
        for other in found[1:]:
            if normalize(other.statement.value) != normalize(best.statement.value) and other.host != best.host:
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
        agrees = normalize(found[0].statement.value) == normalize(self.task.metadata["claimed"])
        verdict = verification.VERDICT[self.task.lang]["supported" if agrees else "refuted"]
        separator = "" if self.task.lang == "zh" else " "
        thought = self._compare(found) if self.style.check_again else ""
        yield self._answer(verdict + separator + self._quote(found[0]), thought)

    def _two_hop(self) -> Script:
        lang = self.task.lang
        clue_relation, asked = self.task.metadata["relations"]
        clue, value = self.task.plan[0].query, self.task.facts[0].tail
        thought = (yield from self._inject_error(clue, value)) or "clue"
        name = None
        for topk in (None, 6):
            observed = yield self._search(thought, [clue], topk, topic=clue)
            passages = [passage for text in observed for passage in read_passages(text)]
            matching = [
                passage
                for passage in passages
                if passage.statement
                and passage.statement.relation == clue_relation
                and normalize(passage.statement.value) == normalize(value)
            ]
            if matching:
                name = max(matching, key=self._rank).statement.subject
                break
            thought = "again"
        if name is None:
            yield self._answer(self._say["unknown"])
            return
        thought = "entity"
        found = yield from self._look_up(asked, name, thought, name=name, topic=sentences.topic_of(asked, name, lang))
        yield self._answer(self._quote(found[0]) if found else self._say["unknown"])

    def _report(self) -> Script:
        lang, subject = self.task.lang, self.task.metadata["subject"]
        relations = self.task.metadata["relations"]
        topics = {relation: sentences.topic_of(relation, subject, lang) for relation in relations}
        thought = "batch"
        if self.style.todo:
            yield self._turn("plan", "todo", {"items": [step.goal for step in self.task.plan]})
        elif self.style.injected_error:
            thought = (yield from self._inject_error(topics[relations[0]], subject)) or "batch"
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
        lines = [reports.report_title(subject), *(self._quote(found[relation][0]) for relation in relations)]
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


class ScriptedSession:
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
