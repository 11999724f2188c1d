"""What an iteration of PPO may look like before the run stops, or leaves the actor as it was: `ppo.guard`.

Gradients that are not finite are skipped by the optimizer step itself (`ppo.apply`); here are the ways in which a policy
goes wrong with finite numbers. Every judgement is a function of one iteration, so a run that is resumed judges the same.
"""

import dataclasses
from collections.abc import Mapping

ACTIONS = ("stop", "skip")


@dataclasses.dataclass(frozen=True)
class Guard:
    """Limits; 0 means none. With `skip` an iteration that breaks one leaves the actor as it was, else it ends the run.

    max_kl: of kl_after. min_entropy: nats a sampled token. max_repetition: share of episodes that repeat themselves.
    """

    max_kl: float = 0.0
    min_entropy: float = 0.0
    max_repetition: float = 0.0
    skip: bool = False

    @classmethod
    def of(cls, section) -> "Guard":
        """From the config's ppo.guard."""
        return cls(section.max_kl, section.min_entropy, section.max_repetition, section.action == "skip")

    @property
    def undoes(self) -> bool:
        """Whether an update that has been made may have to be undone: its KL divergence is known only afterwards."""
        return self.skip and self.max_kl > 0

    def problem(self, metrics: Mapping[str, float | None]) -> str | None:
        """Which metric is beyond its limit, with both values; None when all that are there are within."""
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


class Stop(Exception):
    """An iteration broke a limit, and the guard says to stop. The message is `Guard.problem`'s."""


def advice(problem: str, home, iteration: int, saved: int) -> str:
    """The one line that a person reads: what happened, where to look, what to do."""
    field = problem.split("ppo.guard.")[1].split(" ")[0]
    remedy = {
        "min_entropy": "a higher ppo.entropy_coefficient or a lower ppo.actor_learning_rate",
        "max_repetition": "rubrics that punish it, or a lower ppo.actor_learning_rate",
        "max_kl": "a lower ppo.actor_learning_rate or fewer ppo.actor_minibatches",
    }[field]
    return (
        f"ppo iteration {iteration}: {problem}; read its episodes in {home}/iterations/{iteration:04d}.jsonl. The checkpoint "
        f"of iteration {saved} and the episodes since are kept: the same command with --config.ppo.guard.{field}=VALUE (0 = "
        f"no limit) or --config.ppo.guard.action=skip goes on from there; to train anew with {remedy}, delete {home}"
    )
