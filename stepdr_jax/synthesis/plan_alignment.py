"""How far an episode follows the plan of its task (paper section 3.1).

Trajectories are kept only when their tool calls follow the plan. The paper prints neither measure nor threshold: three
measures are computed, and the thresholds are ours.
"""

import dataclasses

from stepdr_jax.records import PlanStep, Trajectory
from stepdr_jax.text.matching import states_value

MIN_COVERAGE = 0.8
MIN_ORDER = 0.6
MAX_OFF_PLAN = 0.3


@dataclasses.dataclass(frozen=True)
class Alignment:
    """How far a trajectory follows a plan, each in [0, 1].

    coverage: share of plan steps that some action serves. order: longest run of steps taken in plan order, over the
    number of steps. off_plan: share of actions that serve no step.
    """

    coverage: float
    order: float
    off_plan: float

    @property
    def consistent(self) -> bool:
        return self.coverage >= MIN_COVERAGE and self.order >= MIN_ORDER and self.off_plan <= MAX_OFF_PLAN


def alignment(plan: list[PlanStep], trajectory: Trajectory) -> Alignment:
    """Maps every search query of a trajectory to the plan step it serves, or to none.

    A query serves a step when it holds the words of the step's query. A query that names several steps serves the first
    that is still open. Opening pages, files and the todo list are not counted as actions: they serve the step at hand.
    Turns that are kept out of the loss (injected errors) are not counted either.
    """
    queries = [
        query
        for message in trajectory.messages
        if message.train
        for call in message.tool_calls
        if call.name == "batch_web_surfer"
        for query in call.arguments.get("queries", [])
        if isinstance(query, str)
    ]
    if not plan:
        return Alignment(1.0, 1.0, 0.0)
    taken: list[int] = []
    off = 0
    for query in queries:
        serving = [index for index, step in enumerate(plan) if _serves(query, step.query)]
        if not serving:
            off += 1
            continue
        open_steps = [index for index in serving if index not in taken]
        if open_steps:  # repeating a step's search is not off plan
            taken.append(open_steps[0])
    return Alignment(
        coverage=len(set(taken)) / len(plan),
        order=_longest_increasing(taken) / len(plan),
        off_plan=off / max(len(queries), 1),
    )


def _serves(query: str, wanted: str) -> bool:
    parts = [part for part in wanted.replace("{0}", " ").split() if part]
    return all(states_value(query, part) for part in parts)


def _longest_increasing(sequence: list[int]) -> int:
    best = [1] * len(sequence)
    for end in range(len(sequence)):
        for start in range(end):
            if sequence[start] < sequence[end]:
                best[end] = max(best[end], best[start] + 1)
    return max(best, default=0)
