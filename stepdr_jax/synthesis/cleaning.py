"""Which episodes are kept, and why others are dropped (paper sections 4.2 and 7.5).

Rules on one episode: the answer is correct; every citation resolves to an observed passage; there are no loops; no
search adds a year that nobody asked for; there is one language; the plan is followed; nothing shows that a reflection
was prompted. Rules on many: of the correct episodes of a query the shortest is kept, except for a controlled share
with an error and its recovery.
"""

import collections
import json
import random
import re
from collections.abc import Callable, Iterable, Mapping

from stepdr_jax.records import Finish, Message, Task, Trajectory, Verdict
from stepdr_jax.synthesis import plan_alignment, reflection
from stepdr_jax.text import repetition
from stepdr_jax.text.citations import cited_ids, resolves
from stepdr_jax.text.matching import normalize, states_value
from stepdr_jax.text.scripts import CHINESE_CHARACTER

MAX_SAME_CALL = 2  # the third identical call is a loop
MAX_SAME_SENTENCE = 3
MIN_REPORT_REWARD = 0.95
RECENT_YEARS = 3
# Share of plain lower-case Latin words of more than three letters that a Chinese text may have, and so on; measured on
# real bilingual reports.
MAX_LATIN_IN_CHINESE = 0.05
MIN_HAN_IN_CHINESE = 0.6
MAX_HAN_IN_ENGLISH = 0.02
MAX_HAN_CHARACTERS = 20

_NOT_PROSE = re.compile(
    r"```.*?```|`[^`]*`|<tool_call>.*?</tool_call>|\\cite\{[^}]*\}|https?://\S+|[\w-]+(?:\.[\w-]+)+|</?[a-z_]+>|\$[^$]*\$",
    re.DOTALL,
)
_YEAR = re.compile(r"(?<!\d)(?:19|20)\d\d(?!\d)")
_TIME_WORDS = re.compile(
    r"\b(?:today|now|current(?:ly)?|latest|recent(?:ly)?|this (?:year|month|week)|last (?:year|month|week)|yesterday|"
    r"decade|century|monday|tuesday|wednesday|thursday|friday|saturday|sunday)\b|\d{2}s\b|年|今天|现在|目前|最新|最近|本周|上周|星期",
    re.IGNORECASE,
)
_PRETENDED_DATE = re.compile(
    r"(?:simulated|hypothetical|fictional|assumed) (?:date|time|today)|(?:模拟|假设|虚构)的?(?:日期|时间)"
)


def assistant_text(trajectory: Trajectory) -> str:
    """Everything the assistant wrote, turns separated by blank lines."""
    return "\n\n".join(message.content for message in trajectory.messages if message.role == "assistant")


def search_queries(message: Message) -> list[str]:
    """The search queries of an assistant's message."""
    return [
        query
        for call in message.tool_calls
        for query in (call.arguments.get("queries") or [])
        if isinstance(query, str)
    ]


def asks_for_a_time(query: str) -> bool:
    """Whether a request names a year or speaks of time, in English or Chinese."""
    return bool(_YEAR.search(query) or _TIME_WORDS.search(query))


def wrong_time_anchor(query: str, messages: Iterable[Message], as_of: str) -> str | None:
    """Why an episode is anchored in the wrong time, or None.

    A search that adds a recent past year, which neither the request nor an earlier observation named, repeats the year
    of the model's training data. Speaking of a pretended date is the other sign.

    Args:
        as_of: the ISO date that the agent was told.
    """
    now = int(as_of[:4])
    known = set(_YEAR.findall(query))
    for message in messages:
        if message.role == "tool":
            known.update(_YEAR.findall(message.content))
        if message.role != "assistant":
            continue
        if _PRETENDED_DATE.search(message.content):
            return "pretended date"
        if asks_for_a_time(query):
            continue
        for search in search_queries(message):
            for year in _YEAR.findall(search):
                if 0 < now - int(year) <= RECENT_YEARS and year not in known:
                    return f"year {year} added to a search"
    return None


def mixed_language(text: str, lang: str) -> bool:
    """Whether a text mixes Chinese and English beyond names: by density of characters and of plain Latin words."""
    prose = _NOT_PROSE.sub(" ", text)
    han = len(CHINESE_CHARACTER.findall(prose))
    words = re.findall(r"[A-Za-zÀ-ÿ]+", prose)
    plain = sum(word.islower() and len(word) > 3 for word in words)
    total = han + len(words)
    if total == 0:
        return False
    if lang == "zh":
        return plain / total > MAX_LATIN_IN_CHINESE or han / total < MIN_HAN_IN_CHINESE
    return han > MAX_HAN_CHARACTERS or han / total > MAX_HAN_IN_ENGLISH


def loop_fault(trajectory: Trajectory) -> str | None:
    """Why an episode loops (repeated n-grams, the same call or the same sentence again and again), or None."""
    calls = collections.Counter(
        (call.name, json.dumps(call.arguments, sort_keys=True, ensure_ascii=False))
        for message in trajectory.messages
        for call in message.tool_calls
    )
    if calls and max(calls.values()) > MAX_SAME_CALL:
        return "same call repeated"
    text = assistant_text(trajectory)
    run, previous = 0, None
    for sentence in re.split(r"[.!?。！？\n]+", text):
        sentence = sentence.strip()
        if not sentence:
            continue
        run = run + 1 if sentence == previous else 1
        previous = sentence
        if run > MAX_SAME_SENTENCE:
            return "same sentence repeated"
    # queries repeat the request and the answer repeats the passage: only repetition within one turn counts
    reasons = (repetition.degenerate_reason(m.content) for m in trajectory.messages if m.role == "assistant")
    return next((reason for reason in reasons if reason), None)


def citation_fault(trajectory: Trajectory) -> str | None:
    """Why the citations of an answer are invalid (none, one never observed, one in a heading), or None."""
    answer = trajectory.answer or ""
    ids, seen = cited_ids(answer), trajectory.sources()
    if not ids:
        return "uncited"
    if not resolves(ids, seen):
        return "unresolved citation"
    if any(line.startswith("#") and cited_ids(line) for line in answer.splitlines()):
        return "citation in a heading"
    return None


def answer_before_evidence(task: Task, trajectory: Trajectory) -> bool:
    """Whether the assistant names the gold value before any observation has shown it."""
    if task.answer is None or task.kind == "verification":
        return False
    values = task.answer.value.split("; ") if task.answer.type == "list" else [task.answer.value, *task.answer.aliases]
    for message in trajectory.messages:
        if message.role == "tool" and any(states_value(message.content, value) for value in values):
            return False
        if message.role == "assistant" and any(states_value(message.content, value) for value in values):
            return True
    return False


def is_correct(verdict: Verdict) -> bool:
    """Whether an answer states the gold value, or an open task has (almost) its full reward."""
    return verdict.correct if verdict.correct is not None else (verdict.reward or 0.0) >= MIN_REPORT_REWARD


def drop_reason(
    task: Task, trajectory: Trajectory, verdict: Verdict, answer_fault: Callable[[Task, Trajectory], str | None]
) -> str | None:
    """The first rule that an episode breaks, as a short name for the counts; None keeps it.

    Args:
        answer_fault: the rule on answers of the task's kind: how the answer breaks its format or logic, or None.
    """
    if trajectory.finish != Finish.ANSWERED:
        return f"ended as {trajectory.finish}"
    if verdict.reward is None:
        return "judge failed"
    if not is_correct(verdict):
        return "incorrect"
    if fault := citation_fault(trajectory):
        return fault
    if loop := loop_fault(trajectory):
        return loop
    if wrong_time_anchor(task.query, trajectory.messages, task.as_of or "9999"):
        return "wrong time anchor"
    if mixed_language(trajectory.answer or "", task.lang) or mixed_language(assistant_text(trajectory), task.lang):
        return "mixed languages"
    if reflection.has_induction(trajectory):
        return "induction trace"
    if answer_before_evidence(task, trajectory):
        return "answer before evidence"
    if fault := answer_fault(task, trajectory):
        return fault
    if task.kind in ("report", "deep_search") and not plan_alignment.alignment(task.plan, trajectory).consistent:
        return "episode strays from its plan"
    return None


def has_recovery(trajectory: Trajectory) -> bool:
    """Whether a tool error or an empty result was followed by another action and, in the end, an answer."""
    return any(
        message.role == "tool" and (message.error or normalize(message.content) in ("no results.", ""))
        for message in trajectory.messages
    )


def episode_length(trajectory: Trajectory) -> tuple[int, int, int]:
    """Steps, then tool calls, then characters written: what "shortest" compares."""
    turns = [message for message in trajectory.messages if message.role == "assistant"]
    return len(turns), sum(len(turn.tool_calls) for turn in turns), sum(len(turn.content) for turn in turns)


def select_episodes(trajectories: list[Trajectory], noise_share: float, rng: random.Random) -> None:
    """Marks which episodes stay: one per task, the shortest correct one, and `noise_share` of them with a recovery.

    Changes `kept` and `drop_reason` in place. An episode corrected by reflection is kept beside the shortest one of its
    task: it trains something else. Where both a clean and a recovered episode of a task are correct, the recovered one
    replaces the clean one until the share is reached; with too few recoveries the share is as high as it can be.
    """
    by_task: Mapping[str, list[Trajectory]] = collections.defaultdict(list)
    for trajectory in trajectories:
        if trajectory.kept:
            by_task[trajectory.task_id].append(trajectory)
    noisy, total = {}, 0
    for task_id, candidates in by_task.items():
        reflected = [t for t in candidates if t.attempt > 0]
        plain = sorted((t for t in candidates if t.attempt == 0), key=episode_length)
        clean = [t for t in plain if not has_recovery(t)]
        recovered = [t for t in plain if has_recovery(t)]
        total += bool(plain) + bool(reflected)
        for extra in (*clean[1:], *recovered[1:], *reflected[1:]):
            _drop(extra, "longer than another correct episode")
        if recovered:
            noisy[task_id] = (recovered[0], clean[0] if clean else None)
    wanted = round(noise_share * total)
    order = sorted(noisy)
    rng.shuffle(order)
    for number, task_id in enumerate(order):
        recovered, clean = noisy[task_id]
        if number < wanted:
            if clean:
                _drop(clean, "its recovered episode is kept for the noise share")
        else:
            _drop(recovered, "longer than another correct episode" if clean else "above the noise share")


def _drop(trajectory: Trajectory, reason: str) -> None:
    trajectory.kept, trajectory.drop_reason = False, reason
