"""Is what a model wrote well-formed? Shares over sampled completions: tool calls, answers, citations.

Form only: whether an answer is right, and whether a citation leads to an observed passage, is the judge's business.
"""

import re
from collections.abc import Iterable

from stepdr_jax.records import Trajectory
from stepdr_jax.text.citations import CITATION, CITATION_ID
from stepdr_jax.tokens import chat

CALL = "<tool_call>"
MARK = re.compile(r"\\cite\b")


def shares(trajectories: Iterable[Trajectory]) -> dict[str, float | None]:
    """Shares of well-formed pieces over all episodes; None where there was nothing to judge.

    Returns:
        tool_calls: turns with a tool call whose every call is a JSON object of name and arguments, of those with one.
        turns: turns that parse without an error.
        answer: episodes that end with an <answer>, of those that our own system did not break.
        citations: marks of the form \\cite{web_abcdefgh} (ids apart by commas), of all \\cite marks in answers.
        cited_answers: answers with at least one mark.
    """
    counts: dict[str, list[int]] = {
        name: [0, 0] for name in ("tool_calls", "turns", "answer", "citations", "cited_answers")
    }

    def count(name: str, good: int, total: int = 1) -> None:
        counts[name][0] += good
        counts[name][1] += total

    for trajectory in trajectories:
        for message in trajectory.messages:
            if message.role == "assistant":
                error = chat.parse_assistant(message.content).error
                count("turns", error is None)
                if CALL in message.content:
                    count("tool_calls", error is None)
        if trajectory.finish.is_policy_outcome:
            count("answer", trajectory.answer is not None)
        if trajectory.answer is not None:
            marks = len(MARK.findall(trajectory.answer))
            count("citations", sum(map(_well_formed, CITATION.findall(trajectory.answer))), marks)
            count("cited_answers", marks > 0)
    return {name: good / total if total else None for name, (good, total) in counts.items()}


def _well_formed(ids: str) -> bool:
    return all(CITATION_ID.fullmatch(id_.strip()) for id_ in ids.split(","))
