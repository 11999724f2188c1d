"""Records on disk: typed and validated, read and written as JSONL by every package.

Unknown fields are errors, so a file of another version of the code is refused with the field's name. There is no
behavior here beyond validation and serialization.
"""

import enum
import hashlib
import json
import os
from collections.abc import Iterable
from typing import Any, Literal, TypeVar

import pydantic

from stepdr_jax import files
from stepdr_jax.errors import UserError

Lang = Literal["en", "zh"]
CAPABILITIES = ("planning", "deep_search", "reflection", "report")  # the recipe's four; data may also be of none


class Record(pydantic.BaseModel):
    """Base of everything on disk. `id` is assigned by the writer; `content_id` makes one from content."""

    model_config = pydantic.ConfigDict(extra="forbid", validate_assignment=True)


def content_id(prefix: str, *parts: Any) -> str:
    """Returns a stable id: prefix plus 16 hex digits of blake2b over the JSON of `parts`."""
    payload = json.dumps(parts, ensure_ascii=False, sort_keys=True).encode()
    return prefix + hashlib.blake2b(payload, digest_size=8).hexdigest()


class Link(Record):
    anchor: str
    url: str


class Document(Record):
    """One web page or file as text."""

    id: str
    url: str
    title: str
    text: str
    lang: Lang
    source: str  # "world" (the offline web), "folder", "wiki", ...
    authority: int = 0  # 0 unknown or unreliable, 1 ordinary, 2 authoritative
    published_at: str | None = None  # ISO date
    links: list[Link] = []
    license: str = ""


class Triple(Record):
    """One fact: head entity, relation name, tail (an entity id or a literal value)."""

    head: str  # entity id
    relation: str
    tail: str  # entity id if tail_is_entity, else the literal
    tail_is_entity: bool = False


class Answer(Record):
    value: str
    aliases: list[str] = []
    type: Literal["entity", "number", "date", "list", "none"] = "entity"


class PlanStep(Record):
    goal: str
    query: str = ""
    depends_on: list[int] = []


class Task(Record):
    """A question or research request, with what a judge needs and the policy never sees."""

    id: str
    kind: Literal["fact", "deep_search", "doc_walk", "verification", "report"]
    lang: Lang
    query: str
    answer: Answer | None = None
    plan: list[PlanStep] = []
    facts: list[Triple] = []  # the triples that support the answer, in hop order
    rubric_set_id: str | None = None
    split: Literal["train", "heldout"] = "train"
    as_of: str = ""  # ISO date the task is set in
    entity: str = ""  # the seed entity (splits are made by it)
    metadata: dict[str, Any] = {}


class Rubric(Record):
    """One atomic criterion. Weight is negative exactly when the role is negative."""

    rid: str
    criterion: str
    weight: float
    role: Literal["explicit", "implicit", "negative"]
    dimension: str = ""
    fatal: bool = False
    check: dict[str, Any] = {}  # how the programmatic judge decides; {}: needs a language model judge

    @pydantic.model_validator(mode="after")
    def _sign_matches_role(self):
        if (self.weight < 0) != (self.role == "negative") or self.weight == 0:
            raise ValueError(f"rubric {self.rid}: weight {self.weight} does not fit role {self.role}")
        return self


class RubricSet(Record):
    id: str
    task_id: str
    origin: str = "two_step"
    rubrics: list[Rubric]
    step1_roles: dict[str, str] = {}
    step2_roles: dict[str, str] = {}
    consistency: dict[str, Any] = {}
    kept: bool = True
    drop_reason: str | None = None


class ObservedSource(Record):
    """A passage that a tool showed: what a citation can resolve to."""

    id: str  # web_xxxxxxxx
    url: str
    title: str = ""
    text: str
    authority: int = 0
    published_at: str | None = None


class ToolCall(Record):
    id: str
    name: str
    arguments: dict[str, Any]


class Message(Record):
    """One message of an episode. Assistant text is kept verbatim in `content` (thought, call and answer included)."""

    role: Literal["system", "user", "assistant", "tool"]
    content: str
    tool_calls: list[ToolCall] = []  # parsed from an assistant's content
    tool_call_id: str | None = None  # on tool messages
    sources: list[ObservedSource] = []  # on tool messages: the passages shown
    train: bool = True  # False switches the loss off for this message; only assistant messages are ever trained
    error: str | None = None  # on tool messages: tool_error, bad_arguments, budget_exhausted; on assistant: format


class Finish(enum.StrEnum):
    """How an episode ended. Policy outcomes are rewarded; infrastructure outcomes are masked, never rewarded 0."""

    ANSWERED = "answered"
    MAX_TURNS = "max_turns"
    MAX_TOKENS = "max_tokens"
    BUDGET = "budget"
    FORMAT = "format"
    WALL_CLOCK = "wall_clock"
    INFRA_FAILED = "infra_failed"
    JUDGE_FAILED = "judge_failed"
    CANCELLED = "cancelled"

    @property
    def is_policy_outcome(self) -> bool:
        return self in (Finish.ANSWERED, Finish.MAX_TURNS, Finish.MAX_TOKENS, Finish.BUDGET, Finish.FORMAT)


class Trajectory(Record):
    """One episode as messages, with its outcome and counts."""

    id: str
    task_id: str
    policy: str  # who acted
    messages: list[Message]
    finish: Finish
    answer: str | None = None  # text between <answer> tags
    stats: dict[str, float] = {}  # turns, tool_calls, tool_errors, sampled_tokens, observed_tokens, wall_seconds, ...
    attempt: int = 0
    capability: str = ""  # planning, deep_search, reflection, report
    kept: bool = True
    drop_reason: str | None = None
    metadata: dict[str, Any] = {}

    def sources(self) -> dict[str, ObservedSource]:
        """Every passage observed in the episode by citation id."""
        return {source.id: source for message in self.messages for source in message.sources}


class Judgment(Record):
    """One rubric's verdict. `score` is None when the judge failed: a failure is never a score."""

    rid: str
    weight: float
    role: str
    verdict: Literal["satisfied", "partial", "not_satisfied", "error"]
    score: float | None
    reason: str = ""


class Verdict(Record):
    """All judgments of one episode and the reward they add up to (None: too many failed)."""

    reward: float | None
    judgments: list[Judgment]
    correct: bool | None = None  # the answer states the gold value; None for open tasks
    cited: bool | None = None  # every citation resolves and at least one exists


R = TypeVar("R", bound=Record)


def write_records(path: str | os.PathLike, records: Iterable[Record]) -> int:
    """Writes records as JSONL, atomically; returns how many."""
    return files.write_jsonl(path, (record.model_dump(mode="json", exclude_defaults=True) for record in records))


def read_records(path: str | os.PathLike, kind: type[R]) -> list[R]:
    """Reads records of one kind; a row that does not validate is a UserError naming file, row and field."""
    records = []
    for number, row in enumerate(files.read_jsonl(path), 1):
        try:
            records.append(kind.model_validate(row))
        except pydantic.ValidationError as error:
            first = error.errors()[0]
            field = ".".join(str(part) for part in first["loc"])
            raise UserError(
                f"{path} row {number}: field {field!r}: {first['msg']}; expected a {kind.__name__}"
            ) from None
    return records
