"""Serves the tools to a client of the Model Context Protocol (MCP) over standard input and output.

python -m tools_env.server --mcp --offline_web=DIR

One client is one session: its own workspace, todo list and citations. Calls go through the same handlers, checks and
limits as over gRPC. The fields of a reply other than its text (outcome, sources, truncation) are under META in `_meta`.
"""

import contextlib
import itertools
import json
import time

from mcp import types
from mcp.server.lowlevel import Server
from mcp.server.stdio import stdio_server

from tools_env.errors import CallUnfinished, RetryLater, Unavailable, UnknownSession
from tools_env.protocol import tools_pb2
from tools_env.service.assembly import make_service
from tools_env.service.metrics import Metrics
from tools_env.service.service import DEFAULT_DEADLINE, ToolService
from tools_env.service.sessions import Budget, Session, SessionSpec
from tools_env.service.settings import HostSettings

META = "stepdr.tools/v1"


class McpAdapter:
    """MCP handlers of one client."""

    def __init__(self, service: ToolService):
        self._service = service
        self._session: Session | None = None
        self._numbers = itertools.count()

    async def list_tools(self, context, params) -> types.ListToolsResult:
        return types.ListToolsResult(
            tools=[
                types.Tool(name=tool.name, description=tool.description, input_schema=tool.schema)
                for tool in self._service.list_tools()
            ]
        )

    async def call_tool(self, context, params: types.CallToolRequestParams) -> types.CallToolResult:
        """Calls a tool. An outcome other than OK, or a busy or broken service, is a result with `isError`."""
        arguments = json.dumps(params.arguments or {}, ensure_ascii=False)
        try:
            reply = await self._call(params.name, arguments)
        except (RetryLater, Unavailable, CallUnfinished) as error:
            return _result(str(error), failed=True)
        except TimeoutError:
            return _result(f"{params.name}: no result in {DEFAULT_DEADLINE:g} s", failed=True)
        sources = [
            {"id": s.id, "url": s.url, "title": s.title, "text": s.text, "authority": s.authority}
            for s in reply.sources
        ]
        outcome = tools_pb2.Outcome.Name(reply.outcome).removeprefix("OUTCOME_").lower()
        meta = {META: {"outcome": outcome, "truncated": reply.truncated, "sources": sources}}
        return _result(reply.text, failed=reply.outcome != tools_pb2.OUTCOME_OK, meta=meta)

    async def _call(self, tool: str, arguments_json: str) -> tools_pb2.CallToolResponse:
        if self._session is not None:
            try:
                return await self._in_session(tool, arguments_json)
            except UnknownSession:  # the lease ended; open a new session
                pass
        self._session = self._service.open(SessionSpec("", "mcp", Budget()))
        return await self._in_session(tool, arguments_json)

    async def _in_session(self, tool: str, arguments_json: str) -> tools_pb2.CallToolResponse:
        deadline = time.monotonic() + DEFAULT_DEADLINE
        reply = await self._service.call(self._session.id, str(next(self._numbers)), tool, arguments_json, deadline)
        return tools_pb2.CallToolResponse.FromString(reply)

    def close(self) -> None:
        if self._session is not None:
            self._service.close(self._session.id)


def _result(text: str, *, failed: bool, meta: dict | None = None) -> types.CallToolResult:
    return types.CallToolResult(content=[types.TextContent(type="text", text=text)], is_error=failed, _meta=meta)


async def serve_mcp(settings: HostSettings) -> None:
    """Serves one client until standard input ends. Raises ToolHostError."""
    async with contextlib.AsyncExitStack() as resources:
        adapter = McpAdapter(await make_service(settings, resources, Metrics()))
        resources.callback(adapter.close)
        server = Server("stepdr-tools", on_list_tools=adapter.list_tools, on_call_tool=adapter.call_tool)
        async with stdio_server() as (incoming, outgoing):
            await server.run(incoming, outgoing, server.create_initialization_options())
