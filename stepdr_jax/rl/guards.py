"""Limits on an iteration of PPO (`ppo.guard`): beyond one the run stops, or the actor keeps its weights.

The optimizer step skips gradients that are not finite (`ppo.apply_gradient`); these limits catch a policy that degrades
with finite numbers. Each check is a function of one iteration, so a resumed run decides the same.
"""

import dataclasses
from collections.abc import Mapping
from pathlib import Path

from ml_collections import ConfigDict


@dataclasses.dataclass(frozen=True)
class Guard:
    """Limits; 0 means none. An iteration beyond one ends the run or, with `skip`, leaves the actor unchanged.

    max_kl: of kl_after. min_entropy: nats a sampled token. max_repetition: share of episodes with repetitive text.
    """

    max_kl: float = 0.0
    min_entropy: float = 0.0
    max_repetition: float = 0.0
    skip: bool = False

    @classmethod
    def from_config(cls, section: ConfigDict) -> "Guard":
        """Reads the config's ppo.guard."""
        return cls(section.max_kl, section.min_entropy, section.max_repetition, section.action == "skip")

    @property
    def may_undo(self) -> bool:
        """Whether a finished update may have to be undone: its KL divergence is known only afterwards."""
        return self.skip and self.max_kl > 0

    def problem(self, metrics: Mapping[str, float | None]) -> str | None:
        """A sentence about the first metric beyond its limit, with both values; None when all are within."""
        for name, limit, low, what in (
            ("entropy", self.min_entropy, True, "min_entropy"),
            ("repetition", self.max_repetition, False, "max_repetition"),
            ("kl_after", self.max_kl, False, "max_kl"),
        ):
            value = metrics.get(name)
            if value is None or not limit:
                continue
            if not (value >= limit if low else value <= limit):  # not finite is beyond any limit
                return f"{name} {value:.3g} is {'below' if low else 'above'} ppo.guard.{what} = {limit:g}"
        return None


class GuardStop(Exception):
    """An iteration is beyond a limit and the guard's action is stop. The message is that of `Guard.problem`."""


def advice(problem: str, directory: Path, iteration: int, saved: int) -> str:
    """The one line for the user: what happened, where to look, what to do. `directory` is that of the stage."""
    field = problem.split("ppo.guard.")[1].split(" ")[0]
    remedy = {
        "min_entropy": "a higher ppo.entropy_coefficient or a lower ppo.actor_learning_rate",
        "max_repetition": "rubrics that punish it, or a lower ppo.actor_learning_rate",
        "max_kl": "a lower ppo.actor_learning_rate or fewer ppo.actor_minibatches",
    }[field]
    return (
        f"ppo iteration {iteration}: {problem}; read its episodes in {directory}/iterations/{iteration:04d}.jsonl. The "
        f"checkpoint of iteration {saved} and the episodes since are kept: to continue, run the same command with "
        f"--config.ppo.guard.{field}=VALUE (0 = no limit) or --config.ppo.guard.action=skip; to start again with "
        f"{remedy}, delete {directory}"
    )
