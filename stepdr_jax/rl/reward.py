"""From how an episode ended and what the judge said to a number, or to no number.

    answered, judged               the verdict's reward
    answered, judge failed         masked as judge_failed: a failed judge is not a score
    turns, tokens, calls or format used up before an answer      by rule, without a judge (`unfinished_reward`)
    wall clock, broken tools or engine, cancelled                masked

A masked episode has reward None. It weighs nothing in any loss, is not whitened over and not shown to the critic.
"""

import dataclasses

from stepdr_jax.judge.judges import Judge
from stepdr_jax.records import Finish, RubricSet, Task, Trajectory, Verdict

UNFINISHED = ("worst", "zero")


@dataclasses.dataclass(frozen=True)
class Scored:
    """An episode's reward, or None and the cause for which it is masked."""

    reward: float | None
    verdict: Verdict | None
    masked: str | None = None  # a Finish value


def unfinished_reward(rubric_set: RubricSet | None, rule: str) -> float:
    """What an episode without an answer is worth; no value is bootstrapped from its cut end.

    zero: 0, as in Open-Reasoner-Zero. There a wrong answer is worth 0 too; under rubrics with negative weights it is worth
    less, and a policy that is often wrong would learn not to finish. worst: what an answer with every flaw and no merit
    earns, so that finishing never loses.
    """
    if rule not in UNFINISHED:
        raise ValueError(f"expected unfinished among {', '.join(UNFINISHED)}, got {rule!r}")
    weights = [rubric.weight for rubric in rubric_set.rubrics] if rubric_set is not None else []
    positive = sum(weight for weight in weights if weight > 0)
    if rule == "zero" or not positive:
        return 0.0
    return sum(weight for weight in weights if weight < 0) / positive


async def score(
    judge: Judge, task: Task, rubric_set: RubricSet | None, trajectory: Trajectory, unfinished: str = "worst"
) -> Scored:
    """Judges one episode. Never raises for a broken judge: that masks the episode, with the cause in its metadata."""
    if not trajectory.finish.is_policy_outcome:
        return Scored(None, None, str(trajectory.finish))
    trajectory.metadata.pop("cause", None)  # of an earlier judge that failed
    if trajectory.answer is None:
        correct = None if task.answer is None else False
        value = unfinished_reward(rubric_set, unfinished)
        return Scored(value, Verdict(reward=value, judgments=[], correct=correct, cited=False))
    try:
        verdict = await judge.judge(task, rubric_set, trajectory)
    except Exception as error:  # whatever a judge does wrong, it is ours and not the policy's
        trajectory.metadata["cause"] = f"judge: {type(error).__name__}: {error}"
        return Scored(None, None, str(Finish.JUDGE_FAILED))
    if verdict.reward is None:
        failed = [judgment for judgment in verdict.judgments if judgment.verdict == "error"]
        why = f"{len(failed)} of {len(verdict.judgments)} rubrics without a verdict"
        trajectory.metadata["cause"] = f"judge: {why}{f', first {failed[0].reason}' if failed else ''}"
        return Scored(None, verdict, str(Finish.JUDGE_FAILED))
    return Scored(float(verdict.reward), verdict)
