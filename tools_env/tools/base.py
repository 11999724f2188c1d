"""The interface of a tool: a name, a schema, and an async function from arguments to a ToolOutput.

Tools do not shorten their results for the model; `implicit_context` does that for all of them.
"""

import dataclasses
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

from tools_env.search.backend import Passage


@dataclasses.dataclass
class ToolOutput:
    """A tool's result. `sources` are the passages that the text may show; `failed` makes it a tool error."""

    text: str
    sources: list[Passage] = dataclasses.field(default_factory=list)
    blocks: list[str] = dataclasses.field(
        default_factory=list
    )  # parts that a shortened text shows evenly; empty = one part
    failed: bool = False
    cache_hit: bool = False
    paged: bool = False  # the tool applied the length limit itself; the text is not stored
    truncated: bool = False


@dataclasses.dataclass
class CallContext:
    """Context of one call: its session's files and passages, and its deadline."""

    directory: Path  # the session's folder; the model sees only the workspace in it
    known: dict[str, Passage]  # passages shown in this session so far, by citation id
    deadline: float  # time.monotonic() after which nobody waits for the result
    max_chars: int  # length limit of the text

    @property
    def workspace(self) -> Path:
        return self.directory / "workspace"

    def seconds_left(self) -> float:
        return self.deadline - time.monotonic()


@dataclasses.dataclass(frozen=True)
class Tool:
    """A tool. `run` raises ToolError or BadArguments with a message for the model; other exceptions are host failures.

    RetryLater and Unavailable also mean that nothing has been changed: a repeated call may run.
    """

    name: str
    description: str
    schema: dict[str, Any]
    run: Callable[[CallContext, dict[str, Any]], Awaitable[ToolOutput]]
    version: str = "1"
    instant: bool = False  # `run` never awaits anything, so a call needs neither task nor timer
