"""From a finished episode to a reward, or to none: the one rule for judges that fail."""

import dataclasses

from stepdr_jax.judge.judges import Judge
from stepdr_jax.records import Finish, RubricSet, Task, Trajectory, Verdict


@dataclasses.dataclass(frozen=True)
class Scored:
    """An episode's reward, or None and the cause for which the episode is masked."""

    reward: float | None
    verdict: Verdict | None
    masked: str | None = None  # a Finish value


async def judge_episode(
    judge: Judge, task: Task, rubric_set: RubricSet, trajectory: Trajectory, *, attempts: int = 1
) -> Scored:
    """Judges an episode. A failure of the judge is never a score: it is retried, then the episode is masked.

    Never raises for a broken judge. The cause of a failure is written into the trajectory's metadata. An episode that
    ended by infrastructure is masked without asking the judge.
    """
    if not trajectory.finish.is_policy_outcome:
        return Scored(None, None, str(trajectory.finish))
    for _ in range(attempts):
        trajectory.metadata.pop("cause", None)  # of an earlier judge that failed
        verdict = None
        try:
            verdict = await judge.judge(task, rubric_set, trajectory)
        except Exception as error:  # whatever a judge does wrong, the policy is not to blame
            cause = f"{type(error).__name__}: {error}"
        else:
            if verdict.reward is not None:
                return Scored(float(verdict.reward), verdict)
            failed = [judgment for judgment in verdict.judgments if judgment.verdict == "error"]
            first = f", first {failed[0].reason}" if failed else ""
            cause = f"{len(failed)} of {len(verdict.judgments)} rubrics without a verdict{first}"
        trajectory.metadata["cause"] = f"judge: {cause}"
    return Scored(None, verdict, str(Finish.JUDGE_FAILED))
