"""The handlers of stepdr.tools.v1.ToolService: from a request to a tool and back, on two error planes.

What the model should see becomes an Outcome in the reply; what the system broke becomes a gRPC status.
"""

import json
import logging
import time
from collections.abc import Sequence

import grpc

from tools_env import tools_pb2, tools_pb2_grpc
from tools_env.errors import BadArguments, CallIdReused, RetryLater, ToolError, UnknownSession
from tools_env.limits import Limit
from tools_env.search import citations
from tools_env.search.text import estimated_tokens
from tools_env.sessions import Budget, Session, Sessions
from tools_env.tools import arguments as argument_check
from tools_env.tools import implicit_context
from tools_env.tools.base import Call, Output, Tool

DEFAULT_DEADLINE = 60.0  # seconds, for callers that set none

logger = logging.getLogger(__name__)


class ToolService(tools_pb2_grpc.ToolServiceServicer):
    """One instance serves all sessions on one event loop."""

    def __init__(
        self,
        tools: Sequence[Tool],
        sessions: Sessions,
        *,
        lease: float,
        max_chars: int,
        concurrency: int,
        queue: int,
        max_argument_chars: int = 1_000_000,
    ):
        self._tools = {tool.name: tool for tool in tools}
        self._limits = {tool.name: Limit(tool.name, concurrency, queue) for tool in tools}
        self._sessions = sessions
        self._lease = lease
        self._max_chars = max_chars
        self._max_argument_chars = max_argument_chars

    async def ListTools(self, request, context):
        return tools_pb2.ListToolsResponse(
            tools=[
                tools_pb2.Tool(
                    name=tool.name,
                    description=tool.description,
                    schema_json=json.dumps(tool.schema, ensure_ascii=False),
                    version=tool.version,
                )
                for tool in self._tools.values()
            ]
        )

    async def OpenSession(self, request, context):
        asked = request.budget
        budget = Budget(
            asked.tool_calls if asked.HasField("tool_calls") else None,
            asked.output_tokens if asked.HasField("output_tokens") else None,
            asked.wall_seconds if asked.HasField("wall_seconds") else None,
        )
        session = self._sessions.open(request.request_id, request.episode_id, budget, request.seed)
        return tools_pb2.OpenSessionResponse(
            session_id=session.id, lease_seconds=self._lease, remaining=_budget(session.remaining())
        )

    async def CloseSession(self, request, context):
        session = self._sessions.close(request.session_id)
        if session is None:
            return tools_pb2.CloseSessionResponse()
        return tools_pb2.CloseSessionResponse(tool_calls=session.tool_calls, output_tokens=session.output_tokens)

    async def CallTool(self, request, context):
        left = context.time_remaining()
        deadline = time.monotonic() + (DEFAULT_DEADLINE if left is None else left)
        try:
            session = self._sessions.get(request.session_id)
            if not request.call_id:
                await context.abort(grpc.StatusCode.INVALID_ARGUMENT, "call_id is empty")
            return await session.once(
                request.call_id,
                f"{request.tool}\n{request.arguments_json}",
                lambda: self._execute(session, request.tool, request.arguments_json, deadline),
            )
        except UnknownSession as error:
            await context.abort(grpc.StatusCode.NOT_FOUND, str(error))
        except CallIdReused as error:
            await context.abort(grpc.StatusCode.INVALID_ARGUMENT, str(error))
        except RetryLater as error:
            pushback = (("grpc-retry-pushback-ms", str(round(1000 * error.retry_seconds))),)
            await context.abort(grpc.StatusCode.RESOURCE_EXHAUSTED, str(error), pushback)
        except Exception as error:
            if isinstance(error, grpc.aio.AbortError):
                raise
            logger.exception("%s failed in session %s", request.tool, request.session_id)
            await context.abort(grpc.StatusCode.INTERNAL, f"{request.tool}: {type(error).__name__}: {error}")

    async def _execute(self, session: Session, name: str, arguments_json: str, deadline: float):
        """Runs one call and returns its reply. A call that the host could not run costs no budget."""
        if (spent := session.spent()) is not None:
            return _reply(session, tools_pb2.OUTCOME_BUDGET_EXHAUSTED, Output(spent))
        session.tool_calls += 1
        try:
            outcome, output = await self._run(session, name, arguments_json, deadline)
        except BaseException:
            session.tool_calls -= 1
            raise
        session.known.update((source.id, source) for source in output.sources)
        output = self._fit(session, output)
        session.output_tokens += estimated_tokens(output.text)
        return _reply(session, outcome, output)

    async def _run(self, session: Session, name: str, arguments_json: str, deadline: float):
        try:
            tool = self._tools.get(name)
            if tool is None:
                raise BadArguments(f"no tool {name}; the tools are {', '.join(self._tools)}")
            arguments = self._parse(arguments_json)
            argument_check.check(tool.schema, arguments)
            call = Call(session.directory, session.known, deadline, self._max_chars)
            async with self._limits[name].slot():
                output = await tool.run(call, arguments)
            return (tools_pb2.OUTCOME_TOOL_ERROR if output.failed else tools_pb2.OUTCOME_OK), output
        except BadArguments as error:
            return tools_pb2.OUTCOME_BAD_ARGUMENTS, Output(str(error))
        except ToolError as error:
            return tools_pb2.OUTCOME_TOOL_ERROR, Output(str(error))

    def _parse(self, arguments_json: str) -> dict:
        if len(arguments_json) > self._max_argument_chars:
            raise BadArguments(f"arguments have more than {self._max_argument_chars} characters")
        try:
            arguments = json.loads(arguments_json)
            if "\\u" in arguments_json:
                json.dumps(arguments, ensure_ascii=False).encode()
        except UnicodeEncodeError:
            raise BadArguments("arguments contain half of a surrogate pair") from None
        except (ValueError, RecursionError):
            raise BadArguments("arguments are not valid JSON") from None
        if not isinstance(arguments, dict):
            raise BadArguments("arguments must be an object")
        return arguments

    def _fit(self, session: Session, output: Output) -> Output:
        """Applies the implicit-context rule, and keeps only the sources whose mark the text still shows."""
        if len(output.text) > self._max_chars and not output.paged:
            path = implicit_context.store(session.directory / "workspace", output.text)
            output.text = implicit_context.shorten(output.text, output.blocks or [output.text], path, self._max_chars)
            output.truncated = True
            shown = set(citations.CITED.findall(output.text))
            output.sources = [source for source in output.sources if source.id in shown]
        return output


def _reply(session: Session, outcome: int, output: Output):
    return tools_pb2.CallToolResponse(
        outcome=outcome,
        text=output.text,
        sources=[
            tools_pb2.Source(
                id=source.id,
                url=source.url,
                title=source.title,
                text=source.text,
                authority=source.authority,
                published_at=source.published_at,
            )
            for source in output.sources
        ],
        truncated=output.truncated,
        cache_hit=output.cache_hit,
        remaining=_budget(session.remaining()),
    )


def _budget(budget: Budget):
    return tools_pb2.Budget(
        tool_calls=budget.tool_calls, output_tokens=budget.output_tokens, wall_seconds=budget.wall_seconds
    )
