r"""Judges: something that reads an episode's answer and gives every rubric of its task a verdict.

`ProgrammaticJudge` decides rubrics that carry a machine-readable `check`. It reads the answer and the passages that the
episode observed, as data: whatever the answer says about how to grade it changes nothing. Checks:

    {"kind": "states", "any": [...]}                  the answer states one of the values
                       "all": [...]                   ... and every one of these, when given
    {"kind": "states_wrong", "any": [...]}            the answer states one of these (a flaw)
    {"kind": "cites_support", "any": [...]}           a cited, observed passage contains one of the values;
                                    "about": [...]    ... and one of these names, when given
    {"kind": "authoritative"}                         there are citations and every one is of an authoritative source
    {"kind": "unresolved_citation"}                   a citation names no observed passage (a flaw)
    {"kind": "degenerate"}                            repeated n-grams or overlong (a flaw); "max_units": int
    {"kind": "verdict", "value": "supported|refuted"} the answer gives this verdict and not the other

A rubric without a check needs a language model: its verdict here is `error`, with the reason.
"""

from collections.abc import Callable, Iterable
from typing import Protocol

from stepdr_jax.judge import verdicts
from stepdr_jax.records import Judgment, ObservedSource, Rubric, RubricSet, Task, Trajectory, Verdict
from stepdr_jax.text import citations, matching, repetition

VERDICT_WORDS = {
    "supported": ("supported", "正确"),
    "refuted": ("refuted", "错误"),
}
MAX_ANSWER_UNITS = 400  # far above any brief answer; a longer one is padding


class Judge(Protocol):
    """Anything that can judge an episode."""

    async def judge(self, task: Task, rubric_set: RubricSet, trajectory: Trajectory) -> Verdict:
        """Returns verdicts and their reward; reward None means the judge failed, which is never a score of 0."""
        ...

    async def close(self) -> None:
        """Closes connections; a later judgment opens new ones."""
        ...


class ProgrammaticJudge:
    """Decides rubrics by their `check`, without a model.

    Args:
        names: known entity names; "Guinea" inside the known name "Equatorial Guinea" is not a statement of "Guinea".
        mapping: how verdicts become numbers, `strict` (default) or `ternary`.
        max_missing: share of failed verdicts above which there is no reward.
    """

    def __init__(
        self, names: Iterable[str] = (), *, mapping: verdicts.ScoreMapping = "strict", max_missing: float = 0.1
    ) -> None:
        self._names = sorted(set(names))
        self._longer: dict[str, tuple[str, ...]] = {}
        self._mapping = mapping
        self._max_missing = max_missing

    async def judge(self, task: Task, rubric_set: RubricSet, trajectory: Trajectory) -> Verdict:
        """Judges one episode.

        Returns:
            Verdict with a judgment per rubric. `reward` is None when the episode ended by infrastructure (it must be
            masked) or too many rubrics failed. `correct`: the answer states the gold value (None for open tasks).
            `cited`: at least one citation and every one resolves to an observed passage.
        """
        if not trajectory.finish.is_policy_outcome:
            return infrastructure_verdict(rubric_set, trajectory)
        view = self.view(trajectory)
        return self.verdict(task, rubric_set, view, [self.decide(rubric, view) for rubric in rubric_set.rubrics])

    async def close(self) -> None:
        """Does nothing: there are no connections."""

    def view(self, trajectory: Trajectory) -> "AnswerView":
        """The episode's answer as checks see it."""
        return AnswerView(trajectory.answer or "", trajectory.sources(), self._longer_names)

    def decide(self, rubric: Rubric, view: "AnswerView") -> Judgment:
        """One rubric by its check; a failed judgment when it has none."""
        return _judgment(rubric, view, self._mapping)

    def judged(self, rubric: Rubric, verdict: str, reason: str = "") -> Judgment:
        """A judgment with its score, whoever gave the verdict."""
        score = verdicts.SCORES[self._mapping](rubric.role, verdict)
        return Judgment(
            rid=rubric.rid, weight=rubric.weight, role=rubric.role, verdict=verdict, score=score, reason=reason
        )

    def verdict(self, task: Task, rubric_set: RubricSet, view: "AnswerView", judgments: list[Judgment]) -> Verdict:
        """All judgments and what they add up to."""
        fatal = [rubric.rid for rubric in rubric_set.rubrics if rubric.fatal]
        reward = verdicts.aggregate_reward(judgments, self._mapping, self._max_missing, fatal=fatal)
        cited = bool(view.ids) and citations.resolves(view.ids, view.sources)
        return Verdict(reward=reward, judgments=judgments, correct=_correct(task, view), cited=cited)

    def _longer_names(self, value: str) -> tuple[str, ...]:
        if value not in self._longer:
            needle = matching.normalize(value)
            self._longer[value] = tuple(
                name for name in self._names if needle in (other := matching.normalize(name)) and other != needle
            )
        return self._longer[value]


def infrastructure_verdict(rubric_set: RubricSet, trajectory: Trajectory) -> Verdict:
    """The verdict on an episode that ended by infrastructure: none, it must be masked."""
    judgments = [failed_judgment(rubric, f"episode ended by {trajectory.finish}") for rubric in rubric_set.rubrics]
    return Verdict(reward=None, judgments=judgments)


class AnswerView:
    """One answer as the checks see it."""

    def __init__(
        self, answer: str, sources: dict[str, ObservedSource], longer_names: Callable[[str], tuple[str, ...]]
    ) -> None:
        self.answer = answer
        self.prose = citations.strip_citations(answer)
        self.ids = citations.cited_ids(answer)
        self.sources = sources
        self.cited = [sources[id_] for id_ in self.ids if id_ in sources]
        self._longer_names = longer_names

    def states(self, values: Iterable[str], text: str | None = None) -> bool:
        text = self.prose if text is None else text
        return any(matching.states_value(text, value, longer_names=self._longer_names(value)) for value in values)


def _states(check: dict, view: AnswerView) -> bool:
    if "any" not in check and "all" not in check:
        raise KeyError("any")
    every = all(view.states([value]) for value in check.get("all", ()))
    return every and ("any" not in check or view.states(check["any"]))


def _cites_support(check: dict, view: AnswerView) -> bool:
    about = check.get("about")
    return any(
        view.states(check["any"], source.text) and (about is None or view.states(about, source.text))
        for source in view.cited
    )


def _authoritative(check: dict, view: AnswerView) -> bool:
    return bool(view.ids) and len(view.cited) == len(view.ids) and all(s.authority >= 2 for s in view.cited)


def _unresolved_citation(check: dict, view: AnswerView) -> bool:
    return not citations.resolves(view.ids, view.sources)


def _degenerate(check: dict, view: AnswerView) -> bool:
    overlong = len(repetition.text_units(view.prose)) > check.get("max_units", MAX_ANSWER_UNITS)
    return overlong or repetition.degenerate_reason(view.prose) is not None


def _verdict(check: dict, view: AnswerView) -> bool:
    return stated_verdict(view.prose) == check["value"]


CHECKS: dict[str, Callable[[dict, AnswerView], bool]] = {
    "states": _states,
    "states_wrong": _states,
    "cites_support": _cites_support,
    "authoritative": _authoritative,
    "unresolved_citation": _unresolved_citation,
    "degenerate": _degenerate,
    "verdict": _verdict,
}


def stated_verdict(text: str) -> str | None:
    """Which verdict on a claim a text gives: `supported`, `refuted`, or None when it gives none or both."""
    given = {name for name, words in VERDICT_WORDS.items() if matching.states_any(text, words)}
    return given.pop() if len(given) == 1 else None


def _judgment(rubric: Rubric, view: AnswerView, mapping: verdicts.ScoreMapping) -> Judgment:
    check = CHECKS.get(rubric.check.get("kind", ""))
    if check is None:
        return failed_judgment(
            rubric, f"no programmatic check of kind {rubric.check.get('kind')!r}; needs a language model judge"
        )
    try:
        holds = check(rubric.check, view)
    except (KeyError, TypeError) as error:
        return failed_judgment(rubric, f"check {rubric.check} is malformed: {error!r}")
    verdict = "satisfied" if holds else "not_satisfied"
    score = verdicts.SCORES[mapping](rubric.role, verdict)
    return Judgment(rid=rubric.rid, weight=rubric.weight, role=rubric.role, verdict=verdict, score=score)


def failed_judgment(rubric: Rubric, reason: str) -> Judgment:
    """A judgment that a judge failed to make: no score."""
    return Judgment(rid=rubric.rid, weight=rubric.weight, role=rubric.role, verdict="error", score=None, reason=reason)


def _correct(task: Task, view: AnswerView) -> bool | None:
    if task.answer is None:
        return None
    if task.kind == "verification":
        return stated_verdict(view.prose) == task.answer.value
    if task.answer.type == "list":  # every element counts, in any order
        return all(view.states([part]) for part in task.answer.value.split("; "))
    return view.states([task.answer.value, *task.answer.aliases])
