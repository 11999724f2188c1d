"""Doubles for the episode loop's tests: a policy that says what a script says, and tools that answer from a table."""

import asyncio

from stepdr_jax.agent.policy import Turn
from tools_env.client import CitedSource, ToolInfraError, ToolResult

AUSTRIA = CitedSource(
    "web_bakotefi", "http://atlas.test/en/austria", "Austria", "The capital of Austria is Vienna.", 2, "2025-03-01"
)


def search(query: str) -> str:
    return f'<tool_call>\n{{"name": "batch_web_surfer", "arguments": {{"queries": ["{query}"]}}}}\n</tool_call>'


ANSWER = "<answer>The capital of Austria is Vienna. \\cite{web_bakotefi}</answer>"


class ScriptedPolicy:
    """Each act takes the next item: a text, a Turn, or an exception to raise. Observations are kept."""

    name = "scripted"

    def __init__(self, *script, context_tokens: int | None = None):
        self.script, self.observed, self.asked = list(script), [], []
        self.log, self.closed, self.messages = None, False, None
        if context_tokens is not None:
            self.context_tokens = context_tokens

    def start(self, messages, *, episode_id, seed):
        self.messages = messages
        return self

    async def act(self, max_tokens):
        self.asked.append(max_tokens)
        item = self.script.pop(0)
        if isinstance(item, BaseException):
            raise item
        if item is asyncio.sleep:
            await asyncio.sleep(60)
        return item if isinstance(item, Turn) else Turn(item, "stop")

    async def observe(self, texts, *, tail=""):
        self.observed.append((texts, tail))
        if hasattr(self, "context_tokens"):
            self.context_tokens += 100

    async def close(self):
        self.closed = True


class TableTools:
    """`results` maps a query to a ToolResult, or to an exception to raise; unknown queries find Austria."""

    def __init__(self, results=None, specs=()):
        self.results, self.specs, self.calls, self.closed = results or {}, list(specs), [], False

    async def list_tools(self):
        return self.specs

    async def open_session(self, episode_id, **budgets):
        self.budgets = budgets
        self.left = budgets["max_tool_calls"]
        return self

    async def call(self, tool, arguments, *, call_id, timeout=None):
        self.calls.append((call_id, tool, arguments))
        if self.left <= 0:
            return result("No tool calls left.", "budget_exhausted")
        self.left -= 1
        found = self.results.get(arguments.get("queries", [""])[0])
        if isinstance(found, BaseException):
            raise found
        return found or result(
            f"1. Austria | atlas.test | 2025-03-01\n{AUSTRIA.text} \\cite{{{AUSTRIA.id}}}", sources=(AUSTRIA,)
        )

    async def close(self):
        self.closed = True


def result(text, outcome="ok", sources=()):
    return ToolResult(outcome, text, tuple(sources), False, False, {})


def broken(text="tool host is gone"):
    return ToolInfraError(text)
