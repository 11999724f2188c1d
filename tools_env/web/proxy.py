"""The browser's only network access: a forward proxy on loopback that applies the egress policy.

Each connection serves one request, so that a reply cannot be taken for that of another host. Requests must carry a
secret, so that neither other users of the machine nor the browser's background traffic are served.
"""

import asyncio
import base64
import hmac
import logging
import socket
from collections.abc import Awaitable, Callable
from urllib.parse import urlsplit

from tools_env.errors import ToolError
from tools_env.web.egress import EgressPolicy

logger = logging.getLogger(__name__)

REFUSAL_HEADER = "proxy-status"  # header (RFC 9209) of the proxy's own replies
_MAX_HEAD = 64 << 10  # bytes of the head of a request or reply
_MAX_UPLOAD = 8 << 20
_CONNECT_SECONDS = 5.0
_HOP_BY_HOP = frozenset({"connection", "keep-alive", "te", "trailer", "upgrade", "expect"})

Connect = Callable[..., Awaitable[tuple[asyncio.StreamReader, asyncio.StreamWriter]]]


class _Refused(Exception):
    """A refusal by the proxy itself: a status line, headers and a reason."""

    def __init__(self, status: str, reason: str, *headers: str):
        super().__init__(reason)
        self.status = status
        self.headers = headers


class ForwardProxy:
    """One proxy on the running event loop; `close` ends it and every connection through it."""

    def __init__(
        self,
        egress: EgressPolicy,
        secret: str,
        *,
        max_bytes: int = 32 << 20,
        seconds: float = 60.0,
        connections: int = 256,
        connect: Connect = asyncio.open_connection,
    ):
        """
        Args:
          secret: password that every request must carry; the user name is "browser".
          max_bytes: limit of one reply, or of one tunnel in each direction.
          seconds: limit of one connection.
          connections: concurrent connections; further ones are closed at once.
        """
        self._egress = egress
        self._expected = b"Basic " + base64.b64encode(b"browser:" + secret.encode())
        self._max_bytes = max_bytes
        self._seconds = seconds
        self._most = connections
        self._connect = connect
        self._server: asyncio.Server | None = None
        self._open: set[asyncio.Task] = set()

    async def start(self, listening: socket.socket | None = None) -> int:
        """Serves on a bound socket, or on a free port of 127.0.0.1, and returns the port."""
        if listening is None:
            listening = socket.create_server(("127.0.0.1", 0))
        self._server = await asyncio.start_server(self._answer, sock=listening, limit=_MAX_HEAD)
        return listening.getsockname()[1]

    async def close(self) -> None:
        if self._server is not None:
            self._server.close()
        for task in list(self._open):
            task.cancel()
        await asyncio.gather(*self._open, return_exceptions=True)

    async def _answer(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        if len(self._open) >= self._most:
            writer.transport.abort()
            return
        self._open.add(task)
        try:
            async with asyncio.timeout(self._seconds):
                await self._serve(reader, writer)
        except _Refused as refusal:
            await _send_refusal(writer, refusal)
        except (TimeoutError, OSError, EOFError, ValueError):  # either side disconnected or did not speak HTTP
            writer.transport.abort()
        except asyncio.CancelledError:  # the proxy is closing
            writer.transport.abort()
        finally:
            self._open.discard(task)
            writer.close()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        first, headers = await _head(reader)
        method, target, *_ = first.split(" ")
        given = next((value for name, value in headers if name.lower() == "proxy-authorization"), "")
        if not hmac.compare_digest(given.encode("latin-1"), self._expected):
            raise _Refused("407 Proxy Authentication Required", "no", 'Proxy-Authenticate: Basic realm="tools"')
        if method == "CONNECT":
            parts = urlsplit("//" + target)
            upstream = await self._upstream(parts.hostname or "", parts.port or 443)
            writer.write(b"HTTP/1.1 200 Connected\r\n\r\n")
            await self._exchange((reader, writer), upstream)
            return
        parts = urlsplit(target)
        if parts.scheme != "http" or not parts.hostname or "@" in parts.netloc:
            raise _Refused("400 Bad Request", "not an http address")
        length = next((int(value) for name, value in headers if name.lower() == "content-length"), 0)
        if any(name.lower() == "transfer-encoding" for name, _ in headers) or not 0 <= length <= _MAX_UPLOAD:
            raise _Refused("413 Content Too Large", "the upload is too large")
        upstream = await self._upstream(parts.hostname, parts.port or 80)
        kept = [row for row in headers if _passes(row[0]) and row[0].lower() != "host"]
        path = (parts.path or "/") + (f"?{parts.query}" if parts.query else "")
        upstream[1].write(_encoded(f"{method} {path} HTTP/1.1", [("Host", parts.netloc), *kept]))
        await self._exchange((reader, writer), upstream, upload=length)

    async def _upstream(self, host: str, port: int):
        try:
            addresses = await self._egress.addresses(host.lower(), port)
        except ToolError as error:
            raise _Refused("403 Forbidden", str(error)) from None
        for address, at_port in addresses[:3]:
            try:
                async with asyncio.timeout(_CONNECT_SECONDS):
                    return await self._connect(address, at_port, limit=_MAX_HEAD)
            except (OSError, TimeoutError):
                continue
        raise _Refused("502 Bad Gateway", "cannot connect")

    async def _exchange(self, client, upstream, upload: int | None = None) -> None:
        """Relays bytes both ways until one side ends. `upload`: length of a request's body; None: a tunnel."""

        async def down():
            if upload is not None:
                status = "100"
                while status.startswith("1"):  # interim replies are not forwarded
                    first, headers = await _head(upstream[0])
                    status = first.split(" ")[1]
                client[1].write(_encoded(first, [row for row in headers if _passes(row[0])]))
            await _relay(upstream[0], client[1], self._max_bytes)

        async def up():
            if upload is None:
                return await _relay(client[0], upstream[1], self._max_bytes)
            left = upload
            while part := await client[0].read(
                min(left, 1 << 16) or 1 << 16
            ):  # nothing beyond the request is forwarded
                upstream[1].write(part[:left])
                left -= len(part[:left])
                await upstream[1].drain()

        tasks = [asyncio.create_task(down()), asyncio.create_task(up())]
        try:
            done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
            for task in done:
                task.result()
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            upstream[1].transport.abort()


async def _relay(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, most: int) -> None:
    """Relays bytes until the reader ends. Raises OSError for more than `most` bytes."""
    while part := await reader.read(1 << 16):
        most -= len(part)
        if most < 0:
            raise ConnectionAbortedError("too much")
        writer.write(part)
        await writer.drain()


async def _head(reader: asyncio.StreamReader) -> tuple[str, list[tuple[str, str]]]:
    try:
        raw = await reader.readuntil(b"\r\n\r\n")
    except asyncio.LimitOverrunError:
        raise _Refused("431 Request Header Fields Too Large", "the head is too large") from None
    first, *lines = raw.decode("latin-1")[:-4].split("\r\n")
    if first.count(" ") < 1 or any(":" not in line or "\n" in line or "\r" in line for line in lines):
        raise _Refused("502 Bad Gateway", "broken reply")
    return first, [(name.strip(), value.strip()) for name, _, value in (line.partition(":") for line in lines)]


def _passes(name: str) -> bool:
    name = name.lower()
    return name not in _HOP_BY_HOP and not name.startswith("proxy-")


def _encoded(first: str, headers: list[tuple[str, str]]) -> bytes:
    lines = [first, *(f"{name}: {value}" for name, value in headers), "Connection: close", "", ""]
    return "\r\n".join(lines).encode("latin-1")


async def _send_refusal(writer: asyncio.StreamWriter, refusal: _Refused) -> None:
    body = f"{refusal}\n".encode()
    headers = ["Content-Type: text/plain", f"Content-Length: {len(body)}", "Cache-Control: no-store"]
    headers += [f"Proxy-Status: stepdr_tools; details={refusal}", "Connection: close", *refusal.headers]
    writer.write("\r\n".join([f"HTTP/1.1 {refusal.status}", *headers, "", ""]).encode() + body)
    try:
        async with asyncio.timeout(1.0):
            await writer.drain()
    except (OSError, TimeoutError):
        pass
