"""From how an episode ended and what the judge said to a reward, or to none.

    answered, judged               the verdict's reward
    answered, judge failed         masked as judge_failed (`judge_episode`)
    truncated: turns, tokens, calls or format errors used up before an answer     by rule, without a judge
    wall clock, broken tools or engine, cancelled                                 masked

A masked episode has reward None. It has weight 0 in every loss, in whitening and for the critic.
"""

from stepdr_jax.judge.judges import Judge
from stepdr_jax.judge.scored import Scored, judge_episode
from stepdr_jax.records import RubricSet, Task, Trajectory, Verdict

TRUNCATED_RULES = ("worst", "zero")


def truncated_reward(rubric_set: RubricSet, rule: str) -> float:
    """The reward of an episode without an answer; no value is bootstrapped from its truncated end.

    zero: 0, as in Open-Reasoner-Zero. There a wrong answer is worth 0 too; under rubrics with negative weights it is
    worth less, and a policy that is often wrong would learn not to finish. worst: the reward of an answer with every
    flaw and no merit, so that finishing is never worse.
    """
    if rule not in TRUNCATED_RULES:
        raise ValueError(f"expected ppo.truncated_reward among {', '.join(TRUNCATED_RULES)}, got {rule!r}")
    weights = [rubric.weight for rubric in rubric_set.rubrics]
    positive = sum(weight for weight in weights if weight > 0)
    if rule == "zero" or not positive:
        return 0.0
    return sum(weight for weight in weights if weight < 0) / positive


async def score(
    judge: Judge, task: Task, rubric_set: RubricSet, trajectory: Trajectory, truncated: str = "worst"
) -> Scored:
    """Scores one episode; `truncated` is the rule of `truncated_reward`."""
    if trajectory.finish.is_policy_outcome and trajectory.answer is None:
        correct = None if task.answer is None else False
        value = truncated_reward(rubric_set, truncated)
        return Scored(value, Verdict(reward=value, judgments=[], correct=correct, cited=False))
    return await judge_episode(judge, task, rubric_set, trajectory)
