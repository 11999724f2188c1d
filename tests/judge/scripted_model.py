"""A scripted model as judge, and rubrics without machine-readable checks."""

import asyncio
import json

from stepdr_jax.agent.policy import Turn
from stepdr_jax.judge.model_judge import ModelJudge
from stepdr_jax.records import Finish, Message, Rubric, RubricSet, Trajectory
from tests.judge.atlas import ATLAS, TASK

GOOD, ALSO, FLAW, FATAL = (
    Rubric(rid="good", criterion="Names the capital.", weight=5, role="explicit"),
    Rubric(rid="also", criterion="Says who says so.", weight=3, role="implicit"),
    Rubric(rid="flaw", criterion="Names another city as the capital.", weight=-4, role="negative"),
    Rubric(rid="fatal", criterion="Invents a source.", weight=-2, role="negative", fatal=True),
)

SET = RubricSet(id="r", task_id="t", rubrics=[GOOD, ALSO, FLAW])

ANSWER = "The capital is Vienna. \\cite{web_bakotefi}"


def reply(**verdicts) -> str:
    return json.dumps([{"id": rid, "reason": f"because {rid}", "verdict": v} for rid, v in verdicts.items()])


class Scripted:
    """A policy that answers requests in the order in which they come; an exception is raised."""

    name, finish = "scripted", "stop"

    def __init__(self, *replies):
        self.replies, self.requests, self.open = list(replies), [], 0

    def start(self, messages, *, episode_id, seed):
        self.requests.append((messages, seed))
        self.open += 1
        return self

    async def act(self, max_tokens):
        item = self.replies.pop(0)
        if isinstance(item, Exception):
            raise item
        return Turn(item, self.finish)

    async def close(self):
        self.open -= 1


def judged(policy, rubrics=SET, answer=ANSWER, finish=Finish.ANSWERED, **settings):
    shown = [Message(role="tool", content="", sources=[ATLAS])]
    trajectory = Trajectory(id="e", task_id="t", policy="p", messages=shown, finish=finish, answer=answer)
    verdict = asyncio.run(ModelJudge(policy, **settings).judge(TASK, rubrics, trajectory))
    assert policy.open == 0, "a session was left open"
    return verdict
