"""Compliance checks for servers of stepdr.tools.v1, run against any address.

python -m tools_env.check.compliance --address=host:port [--tls_ca=PEM] (a token is read from $STEPDR_TOOLS_TOKEN)

Each check is a function whose docstring states what it checks. Checks that need a tool which the server lacks are
skipped. The exit status is 1 when a check fails. Each check closes the sessions it opens.
"""

import argparse
import asyncio
import contextlib
import dataclasses
import json
import os
import sys
import uuid
from collections.abc import AsyncIterator
from pathlib import Path

import grpc
import jsonschema
from google.rpc import error_details_pb2, status_pb2
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc

from tools_env.protocol import tools_pb2 as pb
from tools_env.protocol import tools_pb2_grpc
from tools_env.service.settings import TOKEN_VARIABLE

SERVICE = pb.DESCRIPTOR.services_by_name["ToolService"].full_name
SECONDS = 20.0  # timeout of one RPC
CODE = grpc.StatusCode


class CheckFailed(Exception):
    """The server does not comply; the message says what it returned."""


class CheckSkipped(Exception):
    """The check needs something that this server does not have."""


class CheckedServer:
    """The server under test: raw stubs, so that nothing is retried or translated."""

    def __init__(self, address: str, token: str | None = None, tls_ca: str | None = None):
        self.address, self.token, self._tls_ca = address, token, tls_ca
        self.channel = self.connect()
        self.tools: dict[str, pb.Tool] = {}

    def connect(self) -> grpc.aio.Channel:
        options = [("grpc.enable_http_proxy", 0), ("grpc.use_local_subchannel_pool", 1)]
        if self._tls_ca:
            credentials = grpc.ssl_channel_credentials(Path(self._tls_ca).read_bytes())
            return grpc.aio.secure_channel(self.address, credentials, options=options)
        return grpc.aio.insecure_channel(self.address, options=options)

    async def ask(self, method: str, request, *, channel: grpc.aio.Channel | None = None, token: str | None = None):
        token = self.token if token is None else token
        metadata = (("authorization", f"Bearer {token}"),) if token else ()
        stub = tools_pb2_grpc.ToolServiceStub(channel or self.channel)
        return await getattr(stub, method)(request, timeout=SECONDS, metadata=metadata)

    @contextlib.asynccontextmanager
    async def session(self, budget: pb.Budget | None = None, **fields) -> AsyncIterator[str]:
        request = pb.OpenSessionRequest(request_id=uuid.uuid4().hex, episode_id="compliance", budget=budget, **fields)
        opened = (await self.ask("OpenSession", request)).session_id
        try:
            yield opened
        finally:
            with contextlib.suppress(grpc.aio.AioRpcError):
                await self.ask("CloseSession", pb.CloseSessionRequest(session_id=opened))

    async def call(self, session: str, call_id: str, tool: str, arguments: dict | str, **how):
        text = arguments if isinstance(arguments, str) else json.dumps(arguments)
        return await self.ask(
            "CallTool",
            pb.CallToolRequest(session_id=session, call_id=call_id, tool=tool, arguments_json=text),
            **how,
        )

    def need(self, tool: str) -> str:
        if tool not in self.tools:
            raise CheckSkipped(f"no tool {tool}")
        return tool


def expect(found, wanted, what: str) -> None:
    if found != wanted:
        raise CheckFailed(f"{what}: expected {wanted!r}, got {found!r}")


async def expect_status(work, *codes: grpc.StatusCode) -> grpc.aio.AioRpcError:
    names = " or ".join(code.name for code in codes)
    try:
        reply = await work
    except grpc.aio.AioRpcError as error:
        if error.code() not in codes:
            raise CheckFailed(f"expected {names}, got {error.code().name}: {error.details()}") from None
        return error
    raise CheckFailed(f"expected {names}, got a reply: {str(reply)[:100]!r}")


async def health(server: CheckedServer) -> None:
    """The standard health check says SERVING for the service, without a token."""
    check = health_pb2_grpc.HealthStub(server.channel).Check
    reply = await check(health_pb2.HealthCheckRequest(service=SERVICE), timeout=SECONDS)
    expect(reply.status, health_pb2.HealthCheckResponse.SERVING, "status")


async def reflection(server: CheckedServer) -> None:
    """Reflection lists the service."""
    metadata = (("authorization", f"Bearer {server.token}"),) if server.token else ()
    info = reflection_pb2_grpc.ServerReflectionStub(server.channel).ServerReflectionInfo
    stream = info(iter([reflection_pb2.ServerReflectionRequest(list_services="")]), timeout=SECONDS, metadata=metadata)
    names = [s.name async for reply in stream for s in reply.list_services_response.service]
    expect(SERVICE in names, True, f"{SERVICE} among {names}")


async def tools_have_schemas(server: CheckedServer) -> None:
    """Every tool has a name of its own, a description, and a valid JSON schema of an object."""
    reply = await server.ask("ListTools", pb.ListToolsRequest())
    names = [tool.name for tool in reply.tools]
    expect(len(names) > 0 and len(set(names)) == len(names), True, f"distinct names in {names}")
    for tool in reply.tools:
        schema = json.loads(tool.schema_json)
        jsonschema.Draft202012Validator.check_schema(schema)
        expect(schema.get("type"), "object", f"type of {tool.name}'s arguments")
        expect(bool(tool.description), True, f"{tool.name} has a description")


async def wrong_token(server: CheckedServer) -> None:
    """A wrong token is answered UNAUTHENTICATED."""
    if not server.token:
        raise CheckSkipped("no token was given")
    await expect_status(server.ask("ListTools", pb.ListToolsRequest(), token="wrong"), CODE.UNAUTHENTICATED)


async def open_is_idempotent(server: CheckedServer) -> None:
    """OpenSession with the same request id opens one session, with another id another one."""
    requests = [pb.OpenSessionRequest(request_id=uuid.uuid4().hex, episode_id="c") for _ in range(2)]
    first, again, other = [(await server.ask("OpenSession", requests[i])).session_id for i in (0, 0, 1)]
    for session in (first, other):
        await server.ask("CloseSession", pb.CloseSessionRequest(session_id=session))
    expect(again, first, "session of the repeated request")
    expect(other != first, True, "another session for another request")


async def close_is_idempotent(server: CheckedServer) -> None:
    """CloseSession may be repeated; afterwards calls of the session answer NOT_FOUND."""
    async with server.session() as session:
        for _ in range(2):
            await server.ask("CloseSession", pb.CloseSessionRequest(session_id=session))
        await expect_status(server.call(session, "0", next(iter(server.tools)), {}), CODE.NOT_FOUND)


async def unknown_session(server: CheckedServer) -> None:
    """A call in a session that was never opened answers NOT_FOUND."""
    for session in ("", "none", "../../etc", "session_0_0000000000000000", "x" * 10_000):
        await expect_status(server.call(session, "0", next(iter(server.tools)), {}), CODE.NOT_FOUND)


async def call_id_is_needed(server: CheckedServer) -> None:
    """A call without a call id answers INVALID_ARGUMENT."""
    async with server.session() as session:
        await expect_status(server.call(session, "", next(iter(server.tools)), {}), CODE.INVALID_ARGUMENT)


async def wrong_arguments_are_an_outcome(server: CheckedServer) -> None:
    """An unknown tool, broken JSON and a wrong shape are BAD_ARGUMENTS with words for the model, not a gRPC error."""
    tool = next(iter(server.tools))
    wrong = [("no_such_tool", "{}"), (tool, "{"), (tool, "[]"), (tool, '{"no_such_field": 1}'), (tool, "[" * 5000)]
    async with server.session() as session:
        for i, (name, arguments) in enumerate(wrong):
            reply = await server.call(session, str(i), name, arguments)
            expect(reply.outcome, pb.OUTCOME_BAD_ARGUMENTS, f"outcome of {name} {arguments[:30]}")
            expect(bool(reply.text), True, "a text that says what fits")


async def repeated_call_is_replayed(server: CheckedServer) -> None:
    """A repeated call id gets the same reply, also over a new connection, and spends nothing."""
    file = server.need("file")
    append = {"op": "append", "path": "a.md", "content": "字"}
    async with server.session(pb.Budget(tool_calls=5)) as session, server.connect() as other:
        first = await server.call(session, "0", file, append)
        expect(await server.call(session, "0", file, append), first, "reply of the repeated call")
        expect(await server.call(session, "0", file, append, channel=other), first, "reply over a new connection")
        read = await server.call(session, "1", file, {"op": "read", "path": "a.md"})
        expect(read.text, "字", "the file after one append that was sent three times")
        expect(read.remaining.tool_calls, 3, "calls left")


async def concurrent_duplicates_run_once(server: CheckedServer) -> None:
    """Twenty copies of a call sent at once run once and get one reply."""
    file = server.need("file")
    append = {"op": "append", "path": "a.md", "content": "x"}
    async with server.session() as session:
        replies = await asyncio.gather(*(server.call(session, "0", file, append) for _ in range(20)))
        expect(len({reply.SerializeToString(deterministic=True) for reply in replies}), 1, "different replies")
        expect((await server.call(session, "1", file, {"op": "read", "path": "a.md"})).text, "x", "the file")


async def reused_call_id_is_refused(server: CheckedServer) -> None:
    """A call id that comes back with other arguments answers INVALID_ARGUMENT."""
    async with server.session() as session:
        tool = next(iter(server.tools))
        await server.call(session, "0", tool, {})
        await expect_status(server.call(session, "0", tool, {"other": 1}), CODE.INVALID_ARGUMENT)


async def budgets_are_echoed_and_end(server: CheckedServer) -> None:
    """Each budget is told in every reply, and once it is gone calls are BUDGET_EXHAUSTED, not a gRPC error."""
    tool = server.need("todo")
    async with server.session(pb.Budget(tool_calls=2, calls_per_tool={tool: 1})) as session:
        first = await server.call(session, "0", tool, {})
        expect((first.remaining.tool_calls, first.remaining.calls_per_tool[tool]), (1, 0), "calls left")
        expect(first.remaining.HasField("output_tokens"), False, "a limit on output tokens that nobody set")
        expect((await server.call(session, "1", tool, {})).outcome, pb.OUTCOME_BUDGET_EXHAUSTED, "outcome")
    for budget in (pb.Budget(tool_calls=0), pb.Budget(output_tokens=0), pb.Budget(wall_seconds=0.0)):
        async with server.session(budget) as session:
            expect((await server.call(session, "0", tool, {})).outcome, pb.OUTCOME_BUDGET_EXHAUSTED, f"of {budget}")


async def sessions_do_not_meet(server: CheckedServer) -> None:
    """A file of one session is not seen from another, under its name or by a path that leads outside."""
    file = server.need("file")
    async with server.session() as one, server.session() as two:
        await server.call(one, "0", file, {"op": "write", "path": "secret.md", "content": "mine"})
        paths = [
            "secret.md",
            f"../{one}/secret.md",
            f"../../{one}/workspace/secret.md",
            "/etc/passwd",
            "a/../../x",
            "\0",
        ]
        for i, path in enumerate(paths):
            reply = await server.call(two, str(i), file, {"op": "read", "path": path})
            expect(reply.outcome in (pb.OUTCOME_TOOL_ERROR, pb.OUTCOME_BAD_ARGUMENTS), True, f"refusal of {path!r}")


async def faults_are_injected_and_named(server: CheckedServer) -> None:
    """A fault that the session asked for is injected and named in the reply; a wrong profile is INVALID_ARGUMENT."""
    tool = server.need("todo")
    profile = json.dumps({"tools": {tool: [{"kind": "http_error", "status": 502}]}})
    async with server.session(faults_json=profile) as session:
        reply = await server.call(session, "0", tool, {})
        expect((reply.outcome, list(reply.faults)), (pb.OUTCOME_TOOL_ERROR, ["http_error"]), "outcome and faults")
    for wrong in ({"faults_json": '{"tools": {"todo": [{"kind": "fire"}]}}'}, {"cache_mode": "sometimes"}):
        await expect_status(server.ask("OpenSession", pb.OpenSessionRequest(**wrong)), CODE.INVALID_ARGUMENT)


async def replay_only_never_computes(server: CheckedServer) -> None:
    """In cache mode replay_only a search that was never made is a tool error."""
    tool = server.need("batch_web_surfer")
    async with server.session(cache_mode="replay_only") as session:
        reply = await server.call(session, "0", tool, {"queries": [uuid.uuid4().hex]})
        expect(reply.outcome, pb.OUTCOME_TOOL_ERROR, "outcome")


async def broken_messages_do_no_harm(server: CheckedServer) -> None:
    """Bytes that are no message and messages that are too large get an error, and the server goes on."""
    metadata = (("authorization", f"Bearer {server.token}"),) if server.token else ()
    raw = server.channel.unary_unary(f"/{SERVICE}/CallTool")
    for body in (b"\xff" * 64, bytes(range(256)), b"\x0a\xff\xff\xff\xff\x0f"):
        work = raw(body, timeout=SECONDS, metadata=metadata)
        await expect_status(work, CODE.INTERNAL, CODE.INVALID_ARGUMENT, CODE.UNKNOWN, CODE.NOT_FOUND)
    async with server.session() as session:
        huge = server.call(session, "0", next(iter(server.tools)), "x" * (20 << 20))
        await expect_status(huge, CODE.RESOURCE_EXHAUSTED, CODE.INVALID_ARGUMENT)
        await server.ask("ListTools", pb.ListToolsRequest())


async def refusals_say_when_to_come_back(server: CheckedServer) -> None:
    """If a burst of 2,000 calls is more than the server takes, what it refuses is RESOURCE_EXHAUSTED with RetryInfo."""
    tool = next(iter(server.tools))
    async with server.session() as session:
        calls = (server.call(session, str(i), tool, {}) for i in range(2000))
        for result in await asyncio.gather(*calls, return_exceptions=True):
            if not isinstance(result, grpc.aio.AioRpcError):
                continue
            expect(result.code(), CODE.RESOURCE_EXHAUSTED, "status of a refused call")
            told = dict(result.trailing_metadata() or ()).get("grpc-status-details-bin", b"")
            details = status_pb2.Status.FromString(told).details
            expect([d.Is(error_details_pb2.RetryInfo.DESCRIPTOR) for d in details], [True], "RetryInfo")


CHECKS = (
    health,
    reflection,
    tools_have_schemas,
    wrong_token,
    open_is_idempotent,
    close_is_idempotent,
    unknown_session,
    call_id_is_needed,
    wrong_arguments_are_an_outcome,
    repeated_call_is_replayed,
    concurrent_duplicates_run_once,
    reused_call_id_is_refused,
    budgets_are_echoed_and_end,
    sessions_do_not_meet,
    faults_are_injected_and_named,
    replay_only_never_computes,
    broken_messages_do_no_harm,
    refusals_say_when_to_come_back,
)


@dataclasses.dataclass(frozen=True)
class CheckResult:
    check: str
    fact: str
    state: str  # "passed", "failed" or "skipped"
    reason: str = ""


async def check_server(address: str, token: str | None = None, tls_ca: str | None = None) -> list[CheckResult]:
    """Runs all checks in sequence and returns their results."""
    server, results = CheckedServer(address, token, tls_ca), []
    try:
        with contextlib.suppress(grpc.aio.AioRpcError):
            server.tools = {t.name: t for t in (await server.ask("ListTools", pb.ListToolsRequest())).tools}
        for one in CHECKS:
            fact, state, reason = " ".join(one.__doc__.split()), "passed", ""
            try:
                if not server.tools and one is not health:
                    raise CheckFailed("the server lists no tools")
                await one(server)
            except CheckSkipped as error:
                state, reason = "skipped", str(error)
            except grpc.aio.AioRpcError as error:
                state, reason = "failed", f"{error.code().name}: {error.details()}"
            except (CheckFailed, ValueError, jsonschema.SchemaError) as error:
                state, reason = "failed", str(error)
            results.append(CheckResult(one.__name__, fact, state, reason))
    finally:
        await server.channel.close()
    return results


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="compliance", description="Checks a server of stepdr.tools.v1.")
    parser.add_argument("--address", required=True, help="host:port")
    parser.add_argument("--tls_ca", help="PEM file of the authority that signed the server's certificate")
    flags = parser.parse_args(argv)
    results = asyncio.run(check_server(flags.address, os.environ.get(TOKEN_VARIABLE) or None, flags.tls_ca))
    for result in results:
        print(f"{result.state:8}{result.fact}" + (f"\n        {result.reason}" if result.reason else ""))
    counts = {state: sum(r.state == state for r in results) for state in ("passed", "failed", "skipped")}
    print(", ".join(f"{number} {state}" for state, number in counts.items()))
    return 1 if counts["failed"] else 0


if __name__ == "__main__":
    sys.exit(main())
