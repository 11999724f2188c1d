"""From how an episode ended and what the judge said to a number, or to no number.

    answered, judged               the verdict's reward
    answered, judge failed         masked as judge_failed: a failed judge is not a score
    turns, tokens, calls or format used up before an answer      0, by rule, without a judge
    wall clock, broken tools or engine, cancelled                masked

A masked episode has reward None. It weighs nothing in any loss, is not whitened over and not shown to the critic.
"""

import dataclasses

from stepdr_jax.judge.judges import Judge
from stepdr_jax.records import Finish, RubricSet, Task, Trajectory, Verdict

UNFINISHED_REWARD = 0.0  # Open-Reasoner-Zero: a response that did not end by itself is worth 0, without bootstrap


@dataclasses.dataclass(frozen=True)
class Scored:
    """An episode's reward, or None and the cause for which it is masked."""

    reward: float | None
    verdict: Verdict | None
    masked: str | None = None  # a Finish value


async def score(judge: Judge, task: Task, rubric_set: RubricSet | None, trajectory: Trajectory) -> Scored:
    """Judges one episode. Never raises for a broken judge: that masks the episode."""
    if not trajectory.finish.is_policy_outcome:
        return Scored(None, None, str(trajectory.finish))
    if trajectory.answer is None:
        correct = None if task.answer is None else False
        return Scored(UNFINISHED_REWARD, Verdict(reward=UNFINISHED_REWARD, judgments=[], correct=correct, cited=False))
    try:
        verdict = await judge.judge(task, rubric_set, trajectory)
    except Exception as error:  # whatever a judge does wrong, it is ours and not the policy's
        trajectory.metadata = trajectory.metadata | {"cause": f"judge: {type(error).__name__}: {error}"}
        return Scored(None, None, str(Finish.JUDGE_FAILED))
    if verdict.reward is None:
        return Scored(None, verdict, str(Finish.JUDGE_FAILED))
    return Scored(float(verdict.reward), verdict)
