"""What a tool is: a name, a schema, and an async function from arguments to an Output.

Tools never decide how much of a result the model reads; `implicit_context` does that for all of them.
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
    blocks: list[str] = dataclasses.field(default_factory=list)  # parts that a summary shows evenly; empty = one part
    failed: bool = False
    cache_hit: bool = False
    paged: bool = False  # the tool kept to the length limit itself; the text is not stored again
    truncated: bool = False


@dataclasses.dataclass
class CallContext:
    """What a tool may touch while it runs: its session's files and memory, and the time it has left."""

    directory: Path  # the session's own folder; the workspace below it is what the model sees
    known: dict[str, Passage]  # every passage shown in this session so far, by citation id
    deadline: float  # time.monotonic() after which nobody waits for the result
    max_chars: int  # length limit of the text

    @property
    def workspace(self) -> Path:
        return self.directory / "workspace"

    def seconds_left(self) -> float:
        return self.deadline - time.monotonic()


@dataclasses.dataclass(frozen=True)
class Tool:
    """`run` raises ToolError or BadArguments with a message for the model; anything else is a fault of the host.

    RetryLater and Unavailable also say that nothing has been changed yet: the call may run when it comes again.
    """

    name: str
    description: str
    schema: dict[str, Any]
    run: Callable[[CallContext, dict[str, Any]], Awaitable[ToolOutput]]
    version: str = "1"
    instant: bool = False  # `run` never waits for anything, so a call of it needs no task and no timer
