"""Fetches a page over HTTP, with limits on time, size and media type, and an egress policy."""

import asyncio
import dataclasses
import html
import re
import socket
import zlib
from urllib.parse import urljoin

import aiohttp
from aiohttp.abc import AbstractResolver

from tools_env.errors import ToolError
from tools_env.search.citations import canonical_url
from tools_env.web.egress import EgressPolicy

TYPES = frozenset({"text/html", "application/xhtml+xml", "text/plain", "text/markdown", "application/pdf"})
_UNTOLD = frozenset({"application/octet-stream", "binary/octet-stream"})  # also the type when none is declared
_REDIRECTS = frozenset({301, 302, 303, 307, 308})
_HTML_START = re.compile(rb"(?:\xef\xbb\xbf)?\s*<(?:!doctype\s+html|html)\b", re.IGNORECASE)
_UNSEEN = re.compile(rb"<!--.*?-->|<noscript\b.*?</noscript\s*>", re.DOTALL | re.IGNORECASE)
_META = re.compile(rb"<meta\s[^>]{0,2000}", re.IGNORECASE)
_REFRESH = re.compile(rb"http-equiv\s*=\s*[\"']?refresh\b", re.IGNORECASE)
_REFRESH_TO = re.compile(
    rb"content\s*=\s*[\"']?\s*(\d+(?:\.\d*)?)\s*[;,]\s*(?:url\s*=\s*)?[\"']?([^\"'>\s]+)", re.IGNORECASE
)
_REFRESH_SECONDS = 5  # a page with a longer delay is not a redirect


@dataclasses.dataclass(frozen=True)
class FetchedPage:
    url: str  # after redirects, canonical
    media_type: str  # one of TYPES
    charset: str | None  # from the header
    body: bytes


class _Resolver(AbstractResolver):
    """Resolver of aiohttp's connector that applies the egress policy."""

    def __init__(self, egress: EgressPolicy):
        self._egress = egress

    async def resolve(self, host, port=0, family=socket.AF_INET):
        try:
            found = await self._egress.addresses(host, port)
        except ToolError as error:
            raise OSError(str(error)) from None
        families = {True: socket.AF_INET6, False: socket.AF_INET}
        return [dict(hostname=host, host=ip, port=at, family=families[":" in ip], proto=0, flags=0) for ip, at in found]

    async def close(self):
        pass


class Fetcher:
    """One HTTP client for all sessions. Create and use it on one event loop; close it at the end."""

    def __init__(
        self,
        egress: EgressPolicy,
        *,
        timeout: float = 2.0,
        max_bytes: int = 4 << 20,
        max_redirects: int = 5,
        concurrency: int = 64,
    ):
        self._egress = egress
        self._timeout = timeout
        self._max_bytes = max_bytes
        self._max_redirects = max_redirects
        self._client = aiohttp.ClientSession(
            connector=aiohttp.TCPConnector(resolver=_Resolver(egress), limit=concurrency, limit_per_host=0),
            headers={
                "User-Agent": "stepdr-tools",
                "Accept": "text/html, application/pdf, text/plain;q=0.9",
                "Accept-Encoding": "gzip, deflate",
            },
            auto_decompress=False,  # the client would decompress without a limit
            cookie_jar=aiohttp.DummyCookieJar(),
        )

    async def fetch(self, url: str) -> FetchedPage:
        """Returns the page behind `url`. Raises ToolError with a short reason that names no time or address."""
        try:
            async with asyncio.timeout(self._timeout):
                return await self._follow(url)
        except TimeoutError:
            raise ToolError("timed out") from None
        except (aiohttp.ClientError, OSError, ValueError, zlib.error) as error:
            raise ToolError(_reason(error)) from None

    async def _follow(self, url: str) -> FetchedPage:
        cookies = aiohttp.CookieJar()  # of this page alone: some sites set a cookie, redirect and expect it back
        for _ in range(self._max_redirects + 1):
            url = self._egress.served(canonical_url(url))
            target = self._egress.url(url)
            sent = {name: morsel.value for name, morsel in cookies.filter_cookies(target).items()}
            async with self._client.get(target, allow_redirects=False, cookies=sent) as response:
                cookies.update_cookies(response.cookies, target)
                if response.status in _REDIRECTS and "Location" in response.headers:
                    url = urljoin(url, response.headers["Location"])
                    continue
                if response.status != 200:
                    raise ToolError(f"HTTP {response.status}")
                if response.content_type not in TYPES | _UNTOLD:
                    raise ToolError(f"unsupported type {response.content_type[:80]}")
                body = await self._body(response)
            media_type = _media_type(response.content_type, body)
            moved = _refresh(body) if media_type in ("text/html", "application/xhtml+xml") else None
            if moved is None or canonical_url(moved := urljoin(url, moved)) == url:
                return FetchedPage(url, media_type, response.charset, body)
            url = moved
        raise ToolError("too many redirects")

    async def _body(self, response: aiohttp.ClientResponse) -> bytes:
        """Returns the decompressed body; neither form may be larger than the limit."""
        unpackers = [_unpacker(name) for name in response.headers.get("Content-Encoding", "").split(",")]
        unpackers = [unpacker for unpacker in reversed(unpackers) if unpacker is not None]
        if len(unpackers) > 1:
            raise ToolError("packed more than once")
        size, body = 0, bytearray()
        async for part in response.content.iter_chunked(1 << 16):
            size += len(part)
            if unpackers:
                part = unpackers[0].decompress(part, self._max_bytes + 1 - len(body))
            body += part
            if max(size, len(body)) > self._max_bytes:
                raise ToolError(f"larger than {self._max_bytes} bytes")
        return bytes(body)

    async def close(self) -> None:
        await self._client.close()


class _Deflate:
    """Decompresses "deflate", which servers send with or without a zlib header."""

    def __init__(self):
        self._stream = None

    def decompress(self, part: bytes, most: int) -> bytes:
        if self._stream is None:
            self._stream = zlib.decompressobj(wbits=15 if part[:1] and part[0] & 0x0F == 8 else -15)
        return self._stream.decompress(part, most)


def _unpacker(encoding: str):
    encoding = encoding.strip().lower()
    if encoding in ("", "identity"):
        return None
    if encoding in ("gzip", "x-gzip"):
        return zlib.decompressobj(wbits=31)
    if encoding == "deflate":
        return _Deflate()
    raise ToolError(f"unsupported encoding {encoding[:40]}")


def _media_type(declared: str, body: bytes) -> str:
    """Returns the media type, detected where the header declares none or a wrong one. Raises ToolError."""
    if body.startswith(b"%PDF-"):
        return "application/pdf"
    if declared in _UNTOLD or declared == "text/plain":
        if _HTML_START.match(body):
            return "text/html"
        if declared in _UNTOLD:
            raise ToolError(f"unsupported type {declared}")
    if declared != "application/pdf" and b"\0" in body[:1024] and not body.startswith((b"\xff\xfe", b"\xfe\xff")):
        raise ToolError(f"not {declared}, as it says")
    return declared


def _refresh(body: bytes) -> str | None:
    """Returns the target of an immediate <meta http-equiv=refresh>, or None."""
    for meta in _META.findall(_UNSEEN.sub(b"", body[: 1 << 14])):
        found = _REFRESH_TO.search(meta) if _REFRESH.search(meta) else None
        if found and float(found.group(1)) <= _REFRESH_SECONDS:
            return html.unescape(found.group(2).decode("utf-8", "replace"))
    return None


def _reason(error: Exception) -> str:
    if isinstance(error, aiohttp.ClientConnectorDNSError):
        return "unknown host"
    if isinstance(error, aiohttp.ClientConnectionError):
        return "cannot connect"
    if isinstance(error, aiohttp.InvalidURL | ValueError):
        return "not an http address"
    return "broken reply"
