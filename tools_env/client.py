"""Asynchronous client of the tool service, with deadlines and retries.

An outcome that the model should see is a ToolResult. A failure of the service is retried where that can help and then
raised as ToolInfraError; callers mask the episode and do not score it. Imports neither the tools nor any parser.
"""

import asyncio
import dataclasses
import json
import random
import time
import uuid
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import grpc

from tools_env.protocol import tools_pb2, tools_pb2_grpc
from tools_env.service import tracing

OUTCOMES = {
    tools_pb2.OUTCOME_OK: "ok",
    tools_pb2.OUTCOME_TOOL_ERROR: "tool_error",
    tools_pb2.OUTCOME_BAD_ARGUMENTS: "bad_arguments",
    tools_pb2.OUTCOME_BUDGET_EXHAUSTED: "budget_exhausted",
}
UNAVAILABLE_ATTEMPTS = 8  # about four seconds, in which a dead worker is restarted
FIRST_BACKOFF = 0.05  # seconds; doubles, with jitter
MAX_BACKOFF = 1.0
_OPTIONS = [
    ("grpc.enable_http_proxy", 0),  # a proxy set in the environment would also get loopback addresses
    ("grpc.max_receive_message_length", 16 << 20),
    ("grpc.keepalive_time_ms", 20_000),
    ("grpc.keepalive_permit_without_calls", 1),
    ("grpc.initial_reconnect_backoff_ms", 100),
    ("grpc.min_reconnect_backoff_ms", 100),
    ("grpc.max_reconnect_backoff_ms", 1_000),
]


class ToolInfraError(Exception):
    """The service failed and retries are exhausted. `status` is the gRPC status name, e.g. UNAVAILABLE."""

    def __init__(self, message: str, status: str = "UNKNOWN"):
        super().__init__(message)
        self.status = status


@dataclasses.dataclass(frozen=True)
class CitedSource:
    """A passage that a tool returned, with its citation id. `authority`: 0 unknown, 1 ordinary, 2 authoritative."""

    id: str
    url: str
    title: str
    text: str
    authority: int
    published_at: str | None


@dataclasses.dataclass(frozen=True)
class ToolResult:
    outcome: str  # "ok", "tool_error", "bad_arguments" or "budget_exhausted"
    text: str  # what the model reads
    sources: tuple[CitedSource, ...]  # passages in the text
    truncated: bool  # the whole result is in the workspace
    cache_hit: bool
    remaining: dict[str, int]  # limited ones of tool_calls, output_tokens, wall_seconds, calls_per_tool.<tool>
    faults: tuple[str, ...] = ()  # kinds of injected faults; not shown to the model


@dataclasses.dataclass(frozen=True)
class ToolSpec:
    name: str
    description: str
    schema: dict[str, Any]  # JSON schema of the arguments


class ToolsClient:
    """Connections to one tool host. May be used from one event loop after another; a new loop gets new channels."""

    def __init__(
        self,
        address: str,
        *,
        token: str | None = None,
        call_timeout: float = 15.0,
        channels: int = 1,
        tls_ca: str | None = None,
        tls_cert: str | None = None,
        tls_key: str | None = None,
    ):
        """
        Args:
          address: host:port.
          token: bearer token, if the host requires one.
          call_timeout: seconds for one call, retries included, unless the call names its own.
          channels: connections that the sessions share; one carries about a thousand sessions.
          tls_ca: PEM file of the authority that signed the host's certificate; with it the connection is TLS.
          tls_cert: PEM file of the client's certificate, where the host requires one.
          tls_key: PEM file of its key.
        """
        self.address = address
        self.call_timeout = call_timeout
        self._metadata = (("authorization", f"Bearer {token}"),) if token else ()
        self._tls = (tls_ca, tls_key, tls_cert)
        self._pool = channels
        self._turn = 0
        self._loop: asyncio.AbstractEventLoop | None = None
        self._channels: dict[tuple[str, int], grpc.aio.Channel] = {}
        self._stubs: dict[grpc.aio.Channel, tools_pb2_grpc.ToolServiceStub] = {}

    def _channel(self, address: str = "", place: int = 0) -> grpc.aio.Channel:
        loop = asyncio.get_running_loop()
        if self._loop is not loop:
            self._loop = loop
            self._channels, self._stubs = {}, {}
        at = (address or self.address, place % self._pool)
        if at not in self._channels:
            # With the default global pool, channels to one address would share a connection.
            options = [*_OPTIONS, ("grpc.use_local_subchannel_pool", 1)]
            if self._tls[0]:
                pem = [Path(path).read_bytes() if path else None for path in self._tls]
                self._channels[at] = grpc.aio.secure_channel(at[0], grpc.ssl_channel_credentials(*pem), options=options)
            else:
                self._channels[at] = grpc.aio.insecure_channel(at[0], options=options)
        return self._channels[at]

    def _connected(self, address: str = "", place: int = 0) -> tools_pb2_grpc.ToolServiceStub:
        channel = self._channel(address, place)
        if channel not in self._stubs:
            self._stubs[channel] = tools_pb2_grpc.ToolServiceStub(channel)
        return self._stubs[channel]

    async def wait_ready(self, timeout: float) -> None:
        """Returns when the host's health check says SERVING. Raises ToolInfraError after `timeout` seconds."""
        from grpc_health.v1 import health_pb2, health_pb2_grpc

        check = health_pb2_grpc.HealthStub(self._channel()).Check
        end = time.monotonic() + timeout
        state = "no answer"
        while (left := end - time.monotonic()) > 0:
            try:
                reply = await check(health_pb2.HealthCheckRequest(), timeout=left, wait_for_ready=True)
                if reply.status == health_pb2.HealthCheckResponse.SERVING:
                    return
                state = health_pb2.HealthCheckResponse.ServingStatus.Name(reply.status)
            except grpc.aio.AioRpcError as error:
                state = error.code().name
            await asyncio.sleep(min(0.05, max(end - time.monotonic(), 0)))
        raise ToolInfraError(f"tool host {self.address} is not ready after {timeout:g} s: {state}", "UNAVAILABLE")

    async def list_tools(self) -> list[ToolSpec]:
        """Returns the host's tools. Raises ToolInfraError."""
        reply = await self._call("ListTools", tools_pb2.ListToolsRequest(), self.call_timeout)
        return [ToolSpec(tool.name, tool.description, json.loads(tool.schema_json)) for tool in reply.tools]

    async def open_session(
        self,
        episode_id: str,
        *,
        max_tool_calls: int | None = None,
        max_output_tokens: int | None = None,
        wall_seconds: float | None = None,
        calls_per_tool: Mapping[str, int] | None = None,
        seed: int = 0,
        faults: Mapping[str, Any] | None = None,
        cache_mode: str = "",
    ) -> "ToolSession":
        """Opens an episode's session. Raises ToolInfraError.

        Args:
          max_tool_calls, max_output_tokens, wall_seconds, calls_per_tool: limits; None: no limit.
          seed: seeds the episode's injected faults.
          faults: fault profile, see tools_env/service/faults.py.
          cache_mode: "live", "read_through" or "replay_only"; empty: the host's setting.
        """
        request = tools_pb2.OpenSessionRequest(
            request_id=uuid.uuid4().hex,
            episode_id=episode_id,
            budget=tools_pb2.Budget(
                tool_calls=max_tool_calls,
                output_tokens=max_output_tokens,
                wall_seconds=wall_seconds,
                calls_per_tool=calls_per_tool or {},
            ),
            seed=seed,
            faults_json=json.dumps(faults) if faults else "",
            cache_mode=cache_mode,
        )
        self._turn += 1
        place = self._turn
        reply = await self._call("OpenSession", request, self.call_timeout, place=place)
        return ToolSession(self, reply.session_id, reply.endpoint, place)

    async def close(self) -> None:
        if self._loop is asyncio.get_running_loop():
            for channel in self._channels.values():
                await channel.close()
        self._loop, self._channels, self._stubs = None, {}, {}

    async def _call(self, method: str, request, timeout: float, *, address: str = "", place: int = 0):
        """Calls one RPC with retries within one deadline.

        RESOURCE_EXHAUSTED is retried as long as the deadline allows.
        """
        end = time.monotonic() + timeout
        backoff, unavailable = FIRST_BACKOFF, 0
        rpc = getattr(self._connected(address, place), method)
        metadata = (*self._metadata, *tracing.outgoing_trace_context())
        while True:
            try:
                return await rpc(request, timeout=max(end - time.monotonic(), 0.0), metadata=metadata)
            except grpc.aio.AioRpcError as error:
                status = error.code()
                unavailable += status is grpc.StatusCode.UNAVAILABLE
                pause = backoff * random.uniform(0.5, 1.5)
                for key, value in error.trailing_metadata() or ():
                    if key == "grpc-retry-pushback-ms":
                        pause = int(value) / 1000 * random.uniform(1.0, 1.5)
                worth = status is grpc.StatusCode.RESOURCE_EXHAUSTED or (
                    status is grpc.StatusCode.UNAVAILABLE and unavailable < UNAVAILABLE_ATTEMPTS
                )
                if not worth or time.monotonic() + pause >= end:
                    raise ToolInfraError(
                        f"tool host {address or self.address}: {method}: {status.name}: {error.details()}", status.name
                    ) from None
                await asyncio.sleep(pause)
                backoff = min(2 * backoff, MAX_BACKOFF)


class ToolSession:
    """One episode's session. `id` is the session id that the host assigned."""

    def __init__(self, client: ToolsClient, session_id: str, endpoint: str = "", place: int = 0):
        self._client = client
        self.id = session_id
        self._where = {"address": endpoint, "place": place}

    async def call(
        self, tool: str, arguments: dict[str, Any], *, call_id: str, timeout: float | None = None
    ) -> ToolResult:
        """Calls a tool; repeating a `call_id` returns the first execution's result. Raises ToolInfraError."""
        request = tools_pb2.CallToolRequest(
            session_id=self.id, call_id=call_id, tool=tool, arguments_json=json.dumps(arguments)
        )
        seconds = self._client.call_timeout if timeout is None else timeout
        reply = await self._client._call("CallTool", request, seconds, **self._where)
        return ToolResult(
            outcome=OUTCOMES[reply.outcome],
            text=reply.text,
            sources=tuple(
                CitedSource(
                    s.id, s.url, s.title, s.text, s.authority, s.published_at if s.HasField("published_at") else None
                )
                for s in reply.sources
            ),
            truncated=reply.truncated,
            cache_hit=reply.cache_hit,
            remaining=_remaining(reply.remaining),
            faults=tuple(reply.faults),
        )

    async def close(self) -> None:
        """Ends the session and removes its workspace; a host that is gone needs no request."""
        try:
            await self._client._call(
                "CloseSession", tools_pb2.CloseSessionRequest(session_id=self.id), 5.0, **self._where
            )
        except ToolInfraError as error:
            if error.status not in ("UNAVAILABLE", "DEADLINE_EXCEEDED"):
                raise


def _remaining(budget) -> dict[str, int]:
    left = {field.name: int(value) for field, value in budget.ListFields() if field.name != "calls_per_tool"}
    return left | {f"calls_per_tool.{tool}": calls for tool, calls in budget.calls_per_tool.items()}
