"""What an episode may use, and the account of what it has used.

The account also decides when the next turn must be the answer, so that every caller of the episode loop forces the
final answer in the same way. Tool calls are counted here for the statistics and that decision; the tool host enforces
them.
"""

import dataclasses

from ml_collections import ConfigDict


@dataclasses.dataclass(frozen=True)
class Limits:
    """Budgets of one episode. `max_turns` counts assistant turns; tokens are those of the policy's own tokenizer."""

    max_turns: int
    max_turn_tokens: int
    max_episode_tokens: int
    max_tool_calls: int
    wall_seconds: float
    call_timeout: float | None = None  # seconds for one tool call; None = the client's default

    def __post_init__(self):
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if value is not None and value <= 0:
                raise ValueError(f"agent.{field.name} must be above 0, got {value}")

    @classmethod
    def from_config(cls, agent: ConfigDict) -> "Limits":
        """Reads the `agent` section of a config."""
        return cls(
            max_turns=agent.max_turns,
            max_turn_tokens=agent.max_turn_tokens,
            max_episode_tokens=agent.max_episode_tokens,
            max_tool_calls=agent.max_tool_calls,
            wall_seconds=agent.wall_seconds,
        )


@dataclasses.dataclass
class Account:
    """Counts of one episode in progress."""

    limits: Limits
    turns: int = 0
    tool_calls: int = 0
    tool_errors: int = 0  # calls whose outcome was tool_error or bad_arguments
    format_errors: int = 0  # turns with neither a well-formed call nor an answer
    unrecovered: int = 0  # tool and format errors that no successful call or answer has followed yet
    refused: bool = False  # the tool host has answered budget_exhausted

    def turn_tokens(self, context_tokens: int | None) -> int:
        """Tokens the next turn may have; 0 or less when the context is full. None: the context is not measured."""
        if context_tokens is None:
            return self.limits.max_turn_tokens
        return min(self.limits.max_turn_tokens, self.limits.max_episode_tokens - context_tokens)

    def record_call(self, outcome: str) -> None:
        self.tool_calls += 1
        if outcome == "budget_exhausted":
            self.refused = True
        elif outcome == "ok":
            self.unrecovered = 0
        else:
            self.tool_errors += 1
            self.unrecovered += 1

    def record_format_error(self) -> None:
        self.format_errors += 1
        self.unrecovered += 1

    @property
    def calls_exhausted(self) -> bool:
        return self.refused or self.tool_calls >= self.limits.max_tool_calls

    @property
    def must_answer(self) -> bool:
        """Whether the next turn can only be the answer: it is the last one, or no tool call is left."""
        return self.turns >= self.limits.max_turns - 1 or self.calls_exhausted

    def stats(self, answered: bool) -> dict[str, float]:
        """`recovered` counts the errors that a successful call, or the answer, followed."""
        errors = self.tool_errors + self.format_errors
        return {
            "turns": float(self.turns),
            "tool_calls": float(self.tool_calls),
            "tool_errors": float(self.tool_errors),
            "format_errors": float(self.format_errors),
            "recovered": float(errors if answered else errors - self.unrecovered),
        }
