"""Hostile bytes on the wire: none of them stops the host or holds up its callers."""

import asyncio
import contextlib
import os
import random
import struct

import grpc
import pytest

from tools_env.client import ToolsClient
from tools_env.protocol import tools_pb2
from tools_env.service.host import SERVICE

PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
METHODS = ("ListTools", "OpenSession", "CallTool", "CloseSession")


def frame(kind: int, flags: int, stream: int, body: bytes) -> bytes:
    return struct.pack(">I", len(body))[1:] + bytes([kind, flags]) + struct.pack(">I", stream) + body


RAW = {
    "random bytes": [random.Random(i).randbytes(2000) for i in range(10)],
    "http/1": [
        b"GET /metrics HTTP/1.1\r\nHost: x\r\n\r\n",
        b"POST /stepdr.tools.v1.ToolService/CallTool HTTP/1.1\r\nContent-Length: 99999999999\r\n\r\n{}",
        b"GET / HTTP/1.1\r\n" + b"X: " + b"a" * 200_000 + b"\r\n\r\n",
    ],
    "tls hello": [b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + bytes(500)],
    "broken frames": [
        PREFACE + frame(4, 0, 0, b"\x00" * 5),  # settings of a wrong length
        PREFACE + frame(4, 0, 0, b"") + frame(0, 1, 1, b"data of no stream"),
        PREFACE + frame(4, 0, 0, b"") + frame(1, 4, 1, b"\xff" * 300),  # headers that are no HPACK
        PREFACE + frame(4, 0, 0, b"") + frame(8, 0, 0, b"\x00" * 4),  # a window of nothing
        PREFACE + frame(4, 0, 0, b"") + b"\xff\xff\xff" + bytes(6),  # a length that never comes
        PREFACE + frame(4, 0, 0, b"") + b"".join(frame(3, 0, i, b"\x00" * 4) for i in range(1, 4000, 2)),  # resets
        PREFACE + b"".join(frame(6, 0, 0, bytes(8)) for _ in range(5000)),  # a flood of pings
    ],
}


async def well(it, number: int) -> None:
    """The host answers an honest caller, over a new connection, within seconds."""
    client = ToolsClient(it.address)
    session = await client.open_session("honest")
    assert (await session.call("todo", {}, call_id=str(number), timeout=5.0)).outcome == "ok"
    await session.close()
    await client.close()


@pytest.mark.parametrize("kind", RAW)
def test_bytes_that_are_no_grpc_end_nothing(running, kind):
    async def main():
        async with running() as it:
            host, port = it.address.split(":")
            for i, body in enumerate(RAW[kind]):
                reader, writer = await asyncio.open_connection(host, int(port))
                with contextlib.suppress(OSError):
                    writer.write(body)
                    await asyncio.wait_for(writer.drain(), 2)
                    writer.write_eof()
                    async with asyncio.timeout(2):
                        reply = await reader.read(1 << 16)
                    assert b"200 OK" not in reply
                writer.close()
                await well(it, i)

    asyncio.run(main())


def test_half_open_connections_hold_nobody_up(running):
    async def main():
        async with running() as it:
            host, port = it.address.split(":")
            held = [await asyncio.open_connection(host, int(port)) for _ in range(200)]
            for i, (_, writer) in enumerate(held):
                writer.write(PREFACE[: i % 25])
            await well(it, 0)
            for _, writer in held:
                writer.close()

    asyncio.run(main())


def valid(method: str, session: str) -> bytes:
    return {
        "ListTools": tools_pb2.ListToolsRequest(),
        "OpenSession": tools_pb2.OpenSessionRequest(
            request_id="r", episode_id="e", budget=tools_pb2.Budget(tool_calls=3, calls_per_tool={"file": 2}), seed=3
        ),
        "CallTool": tools_pb2.CallToolRequest(session_id=session, call_id="1", tool="todo", arguments_json="{}"),
        "CloseSession": tools_pb2.CloseSessionRequest(session_id="session_0_ffff"),
    }[method].SerializeToString()


@pytest.mark.parametrize("method", METHODS)
def test_mutated_truncated_and_random_messages_get_a_status_or_a_reply(running, method):
    async def main():
        draw = random.Random(method)
        async with running() as it:
            client = ToolsClient(it.address)
            session = await client.open_session("fuzz")
            body = valid(method, session.id)
            bodies = [body[:n] for n in range(len(body))] + [draw.randbytes(draw.randrange(200)) for _ in range(60)]
            for _ in range(100):  # a few bytes changed: lengths, field numbers, wire types, text that is no UTF-8
                changed = bytearray(body or b"\x00" * 8)
                for _ in range(draw.randrange(1, 4)):
                    changed[draw.randrange(len(changed))] = draw.randrange(256)
                bodies.append(bytes(changed))
            bodies += [b"\x0b" * 5000, b"\x0a\x80\x80\x80\x80\x08", b"\x08" + b"\xff" * 10, b"\x12" + b"\x7f" * 200]
            async with grpc.aio.insecure_channel(it.address) as channel:
                rpc = channel.unary_unary(f"/{SERVICE}/{method}")

                async def one(content):
                    try:
                        await rpc(content, timeout=10)
                        return "OK"
                    except grpc.aio.AioRpcError as error:
                        return error.code().name

                found = set(await asyncio.gather(*(one(content) for content in bodies)))
            assert found <= {"OK", "INTERNAL", "INVALID_ARGUMENT", "NOT_FOUND", "UNKNOWN", "ABORTED"}
            assert len(found) > 1 or method == "ListTools"
            await client.close()
            await well(it, 0)

    asyncio.run(main())


def test_odd_metadata_and_unknown_methods_are_refused(running):
    async def main():
        async with running(token="secret", client_token="secret") as it:
            authorization = ("authorization", "Bearer secret")
            async with grpc.aio.insecure_channel(it.address) as channel:

                async def status(path: str, metadata=(), body=b""):
                    try:
                        await channel.unary_unary(path)(body, timeout=5, metadata=metadata)
                        return "OK"
                    except grpc.aio.AioRpcError as error:
                        return error.code().name

                listing = f"/{SERVICE}/ListTools"
                assert await status(listing, [authorization]) == "OK"
                huge = [authorization, *((f"x-{i}", "a" * 7000) for i in range(10))]
                assert await status(listing, huge) in ("RESOURCE_EXHAUSTED", "INTERNAL", "UNAVAILABLE")
                assert await status(listing, [("authorization", "Bearer " + "s" * 5000)]) == "UNAUTHENTICATED"
                assert await status(listing, [("authorization", "Basic secret")]) == "UNAUTHENTICATED"
                assert await status(listing, [("authorization", "bearer secret")]) == "UNAUTHENTICATED"
                assert await status(listing, [("authorization-bin", b"Bearer secret")]) == "UNAUTHENTICATED"
                assert await status(listing, [authorization, ("traceparent", "00-zz")]) == "OK"
                assert await status(listing, [authorization, ("x-odd-bin", os.urandom(500))]) == "OK"
                for path in ("/x", f"/{SERVICE}/Shutdown", "/../../etc/passwd", f"/{SERVICE}/calltool"):
                    assert await status(path, [authorization]) == "UNIMPLEMENTED"
                    assert await status(path) == "UNAUTHENTICATED"  # a stranger does not learn which methods there are
                assert await status("/grpc.health.v1.Health/Check") == "OK"
                # Nobody is let in by the mark that workers put on the calls they pass on.
                assert await status(listing, [("stepdr-passed-on", "1")]) == "UNAUTHENTICATED"

    asyncio.run(main())


@pytest.mark.parametrize("megabytes, answer", [(15, "OK"), (17, "RESOURCE_EXHAUSTED")])
def test_messages_are_bounded(running, megabytes, answer):
    """The bound of gRPC itself is 4 MiB; ours is 16 MiB, with arguments of a million characters."""

    async def main():
        async with running() as it:
            session = await it.client.open_session("e")
            request = tools_pb2.CallToolRequest(
                session_id=session.id, call_id="1", tool="file", arguments_json="x" * (megabytes << 20)
            )
            async with grpc.aio.insecure_channel(it.address, [("grpc.max_send_message_length", -1)]) as channel:
                rpc = channel.unary_unary(
                    f"/{SERVICE}/CallTool",
                    tools_pb2.CallToolRequest.SerializeToString,
                    tools_pb2.CallToolResponse.FromString,
                )
                try:
                    reply = await rpc(request, timeout=20)
                    assert answer == "OK" and reply.outcome == tools_pb2.OUTCOME_BAD_ARGUMENTS
                    assert "more than 1000000 characters" in reply.text
                except grpc.aio.AioRpcError as error:
                    assert error.code().name == answer
            await well(it, 0)

    asyncio.run(main())
