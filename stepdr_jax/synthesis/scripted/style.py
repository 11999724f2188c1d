"""How the scripted expert works on one task, injected errors included."""

import dataclasses
import random

from stepdr_jax.records import Task

# The names are part of episode ids and seeds, their order decides draws. hasty: quotes the least reliable page.
INJECTED_ERRORS = ("misspelt", "empty_query", "dead_link", "unavailable", "hasty")


@dataclasses.dataclass(frozen=True)
class Style:
    """How the expert works on one task, drawn once per episode."""

    thoughts: bool = True
    open_page: bool = False  # reads the whole page before answering
    todo: bool = False  # writes the plan of a report into the todo list
    one_by_one: bool = False  # a search per point of a report instead of one batch
    injected_error: str = ""  # one of INJECTED_ERRORS, or none
    check_again: bool = False  # a retry after a wrong answer: compares sources before it answers

    def retry(self) -> "Style":
        """The style of a second attempt: it compares its sources and injects no error."""
        return dataclasses.replace(self, injected_error="", open_page=False, check_again=True)


def draw_style(task: Task, rng: random.Random, *, error_share: float) -> Style:
    """Draws a style. `error_share` of the episodes get an injected error; cleaning keeps the exact share of them."""
    errors = INJECTED_ERRORS if task.kind in ("fact", "verification") else ("misspelt", "empty_query", "unavailable")
    # reports and walks have longer episodes: no further turns there
    error = rng.choice(errors) if task.kind != "doc_walk" and rng.random() < error_share else ""
    return Style(
        thoughts=rng.random() < 0.75,
        open_page=task.kind == "fact" and not error and rng.random() < 0.05,
        todo=task.kind == "report" and not error and rng.random() < 0.3,
        one_by_one=task.kind == "report" and not error and rng.random() < 0.15,
        injected_error=error,
    )
