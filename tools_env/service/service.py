"""The handlers of stepdr.tools.v1.ToolService.

Errors that the model should see become an Outcome in the reply; failures of the system become a gRPC status.
"""

import asyncio
import json
import logging
import math
import time
from collections.abc import Mapping, Sequence

import grpc
from google.protobuf import any_pb2, duration_pb2
from google.rpc import error_details_pb2, status_pb2

from tools_env.cache import retrieval as caching
from tools_env.errors import (
    BadArguments,
    CallIdReused,
    CallUnfinished,
    RetryLater,
    ToolError,
    Unavailable,
    UnknownSession,
)
from tools_env.protocol import tools_pb2, tools_pb2_grpc
from tools_env.search import citations
from tools_env.search.text import estimated_tokens
from tools_env.service import faults, tracing
from tools_env.service.limits import ConcurrencyLimit
from tools_env.service.metrics import Metrics
from tools_env.service.sessions import Budget, Session, Sessions, SessionSpec
from tools_env.tools import arguments as argument_check
from tools_env.tools import implicit_context
from tools_env.tools.base import CallContext, Tool, ToolOutput

DEFAULT_DEADLINE = 60.0  # seconds, for callers without a deadline
MAX_DEADLINE = 900.0  # seconds; longer deadlines are shortened to this
# Tools without side effects: an interrupted call may run again. Calls of all other tools run at most once.
REPEATABLE = frozenset({"batch_web_surfer", "file_parser", "asr", "analyze_image"})
STATUS = {
    UnknownSession: grpc.StatusCode.NOT_FOUND,
    CallIdReused: grpc.StatusCode.INVALID_ARGUMENT,
    CallUnfinished: grpc.StatusCode.ABORTED,
    Unavailable: grpc.StatusCode.UNAVAILABLE,
}
_OUTCOME_WORDS = {
    tools_pb2.OUTCOME_OK: "ok",
    tools_pb2.OUTCOME_TOOL_ERROR: "tool_error",
    tools_pb2.OUTCOME_BAD_ARGUMENTS: "bad_arguments",
}

logger = logging.getLogger(__name__)


class ToolService(tools_pb2_grpc.ToolServiceServicer):
    """The service of one process, on one event loop.

    `list_tools`, `open` and `call` are the service without a transport; the RPC methods put them on gRPC.
    """

    def __init__(
        self,
        tools: Sequence[Tool],
        sessions: Sessions,
        *,
        lease: float,
        max_chars: int,
        concurrency: int | Mapping[str, int],
        queue: int,
        max_argument_chars: int = 1_000_000,
        metrics: Metrics | None = None,
        endpoint: str = "",
    ):
        """
        Args:
          concurrency: concurrent calls of each tool, or by tool name; "" stands for all other tools.
          endpoint: address given to clients for the sessions opened here; empty: the address they called.
        """
        self._tools = {tool.name: tool for tool in tools}
        self._metrics = metrics or Metrics()
        slots = concurrency if isinstance(concurrency, Mapping) else {"": concurrency}
        self._limits = {
            name: ConcurrencyLimit(
                name,
                slots.get(name, slots.get("")),
                queue,
                (self._metrics.running.labels(name), self._metrics.waiting.labels(name)),
            )
            for name in self._tools
        }
        self._sessions = sessions
        self._lease = lease
        self._max_chars = max_chars
        self._max_argument_chars = max_argument_chars
        self._endpoint = endpoint

    def list_tools(self) -> list[Tool]:
        return list(self._tools.values())

    def open(self, spec: SessionSpec) -> Session:
        """Opens a session. Raises BadArguments for an invalid fault profile or cache mode."""
        profile = faults.parse_fault_profile(spec.faults_json, self._tools)
        if spec.cache_mode not in ("", *caching.CACHE_MODES):
            raise BadArguments(f"cache_mode must be one of {', '.join(caching.CACHE_MODES)}, got {spec.cache_mode!r}")
        session = self._sessions.open(spec)
        session.attachments["faults"] = profile
        self._metrics.sessions.set(len(self._sessions))
        return session

    def close(self, session_id: str) -> Session | None:
        """Ends and returns a session; None when it is not open here."""
        session = self._sessions.close(session_id)
        self._metrics.sessions.set(len(self._sessions))
        return session

    async def call(self, session_id: str, call_id: str, tool: str, arguments_json: str, deadline: float) -> bytes:
        """Returns a serialized CallToolResponse: of a new call, or the stored one of a repeated call.

        Args:
          deadline: time.monotonic() after which nobody waits for the result.

        Raises UnknownSession, CallIdReused, CallUnfinished, RetryLater, Unavailable and TimeoutError; anything else is
        a failure of a tool.
        """
        session = self._sessions.get(session_id)
        began = time.monotonic()
        fresh = False

        async def execute():
            nonlocal fresh
            fresh = True
            return await self._execute(session, call_id, tool, arguments_json, deadline)

        asked = f"{tool}\n{arguments_json}"
        if began < deadline and self._at_once(session, call_id, tool):
            reply = await session.once(call_id, asked, execute, alone=True)
        else:
            async with asyncio.timeout(max(deadline - began, 0.0)):
                reply = await session.once(call_id, asked, execute)
        tracing.annotate_span(replayed=not fresh)
        if fresh:
            self._metrics.seconds.labels(self._label(tool)).observe(time.monotonic() - began)
        else:
            self._metrics.replayed.inc()
        return reply

    def _at_once(self, session: Session, call_id: str, name: str) -> bool:
        """Returns whether the call runs without waiting, so that it needs neither task nor timer."""
        tool = self._tools.get(name)
        if tool is None or not tool.instant or self._limits[name].full or session.runs(call_id):
            return False
        return not self._profile(session).tools

    def _label(self, tool: str) -> str:
        return tool if tool in self._tools else "unknown"

    async def _execute(self, session: Session, call_id: str, name: str, arguments_json: str, deadline: float) -> bytes:
        """Runs one call and returns its reply. A call that fails in the host costs no budget."""
        if (spent := session.spent(name)) is not None:
            self._metrics.calls.labels(self._label(name), "budget_exhausted").inc()
            return _reply_message(
                session, tools_pb2.OUTCOME_BUDGET_EXHAUSTED, ToolOutput(spent), ()
            ).SerializeToString()
        session.calls[name] += 1
        injected: list[str] = []
        try:
            outcome, output = await self._run(session, call_id, name, arguments_json, deadline, injected)
        except BaseException as error:
            session.calls[name] -= 1
            self._metrics.calls.labels(self._label(name), type(error).__name__).inc()
            raise
        known = output.sources
        output = self._fit(session, output)
        tokens = estimated_tokens(output.text)
        session.output_tokens += tokens
        reply = _reply_message(session, outcome, output, injected).SerializeToString()
        session.output_tokens -= tokens
        session.finish(call_id, name, tokens, known, reply)
        self._metrics.calls.labels(self._label(name), _OUTCOME_WORDS[outcome]).inc()
        self._metrics.tokens.labels(self._label(name)).inc(tokens)
        for kind in injected:
            self._metrics.faults.labels(kind).inc()
        return reply

    async def _run(
        self, session: Session, call_id: str, name: str, arguments_json: str, deadline: float, injected: list[str]
    ):
        try:
            tool = self._tools.get(name)
            if tool is None:
                raise BadArguments(f"no tool {name[:100]}; the tools are {', '.join(self._tools)}")
            arguments = self._parse(arguments_json)
            plan = self._profile(session).plan(name, session.spec.seed, call_id)
            arguments = plan.arguments(arguments, tool.schema, injected)
            argument_check.check_arguments(tool.schema, arguments)
            call = CallContext(session.directory, session.known, deadline, self._max_chars)
            caching.SESSION_MODE.set(session.spec.cache_mode)
            async with self._limits[name].slot():
                await plan.before(deadline, injected)
                if name not in REPEATABLE:
                    session.begin(call_id)
                try:
                    output = await tool.run(call, arguments)
                except (RetryLater, Unavailable):
                    session.withdraw(call_id)
                    raise
            output = plan.after(output, injected)
            return (tools_pb2.OUTCOME_TOOL_ERROR if output.failed else tools_pb2.OUTCOME_OK), output
        except BadArguments as error:
            return tools_pb2.OUTCOME_BAD_ARGUMENTS, ToolOutput(str(error))
        except ToolError as error:
            return tools_pb2.OUTCOME_TOOL_ERROR, ToolOutput(str(error))

    def _profile(self, session: Session) -> faults.FaultProfile:
        if "faults" not in session.attachments:  # a session restored from its journal
            session.attachments["faults"] = faults.parse_fault_profile(session.spec.faults_json, self._tools)
        return session.attachments["faults"]

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

    def _fit(self, session: Session, output: ToolOutput) -> ToolOutput:
        """Applies the implicit-context rule, and keeps only the sources that the shortened text still cites."""
        if len(output.text) > self._max_chars and not output.paged:
            path = implicit_context.store_result(session.directory / "workspace", output.text)
            output.text = implicit_context.shorten_result(
                output.text, output.blocks or [output.text], path, self._max_chars
            )
            output.truncated = True
            shown = set(citations.CITED.findall(output.text))
            output.sources = [source for source in output.sources if source.id in shown]
        return output

    async def ListTools(self, request, context):
        return tools_pb2.ListToolsResponse(
            tools=[
                tools_pb2.Tool(
                    name=tool.name,
                    description=tool.description,
                    schema_json=json.dumps(tool.schema, ensure_ascii=False),
                    version=tool.version,
                )
                for tool in self.list_tools()
            ]
        )

    async def OpenSession(self, request, context):
        asked = request.budget
        budget = Budget(
            asked.tool_calls if asked.HasField("tool_calls") else None,
            asked.output_tokens if asked.HasField("output_tokens") else None,
            asked.wall_seconds if asked.HasField("wall_seconds") else None,
            dict(asked.calls_per_tool),
        )
        try:
            session = self.open(
                SessionSpec(
                    request.request_id,
                    request.episode_id,
                    budget,
                    request.seed,
                    request.faults_json,
                    request.cache_mode,
                )
            )
        except BadArguments as error:
            await context.abort(grpc.StatusCode.INVALID_ARGUMENT, shortened(error))
        return tools_pb2.OpenSessionResponse(
            session_id=session.id,
            lease_seconds=self._lease,
            remaining=budget_message(session.remaining()),
            endpoint=self._endpoint,
        )

    async def CloseSession(self, request, context):
        session = self.close(request.session_id)
        if session is None:
            return tools_pb2.CloseSessionResponse()
        return tools_pb2.CloseSessionResponse(tool_calls=session.tool_calls, output_tokens=session.output_tokens)

    async def CallTool(self, request, context):
        left = context.time_remaining()
        seconds = DEFAULT_DEADLINE if left is None else min(left, MAX_DEADLINE)
        if not request.call_id:
            await context.abort(grpc.StatusCode.INVALID_ARGUMENT, "call_id is empty")
        try:
            reply = await self.call(
                request.session_id, request.call_id, request.tool, request.arguments_json, time.monotonic() + seconds
            )
            return tools_pb2.CallToolResponse.FromString(reply)
        except RetryLater as error:
            await context.abort(grpc.StatusCode.RESOURCE_EXHAUSTED, shortened(error), retry_metadata(error))
        except tuple(STATUS) as error:
            await context.abort(STATUS[type(error)], shortened(error))
        except TimeoutError:
            await context.abort(
                grpc.StatusCode.DEADLINE_EXCEEDED, shortened(f"{request.tool}: no result in {seconds:g} s")
            )
        except Exception as error:
            logger.exception("%s failed in session %s", request.tool, request.session_id)
            await context.abort(grpc.StatusCode.INTERNAL, shortened(f"{request.tool}: {type(error).__name__}: {error}"))


def shortened(message: object) -> str:
    """Returns a message of bounded length: gRPC drops trailing metadata above 8 KiB, and messages may echo a caller."""
    text = str(message)
    return text if len(text) <= 500 else text[:500] + "..."


def retry_metadata(error: RetryLater) -> tuple[tuple[str, str | bytes], ...]:
    """Returns the retry delay in the two forms that clients read: gRPC's pushback and google.rpc.RetryInfo."""
    whole, part = divmod(error.retry_seconds, 1.0)
    delay = duration_pb2.Duration(seconds=int(whole), nanos=int(part * 1e9))
    detail = any_pb2.Any()
    detail.Pack(error_details_pb2.RetryInfo(retry_delay=delay))
    code = grpc.StatusCode.RESOURCE_EXHAUSTED.value[0]
    status = status_pb2.Status(code=code, message=str(error), details=[detail])
    return (
        ("grpc-retry-pushback-ms", str(math.ceil(1000 * error.retry_seconds))),
        ("grpc-status-details-bin", status.SerializeToString()),
    )


def _reply_message(session: Session, outcome: int, output: ToolOutput, injected: Sequence[str]):
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
        remaining=budget_message(session.remaining()),
        faults=injected,
    )


def budget_message(budget: Budget):
    return tools_pb2.Budget(
        tool_calls=budget.tool_calls,
        output_tokens=budget.output_tokens,
        wall_seconds=budget.wall_seconds,
        calls_per_tool=budget.calls_per_tool,
    )
