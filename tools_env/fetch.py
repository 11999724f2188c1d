"""Gets one page over HTTP, with limits on time, size, type and where a request may go.

The world's hosts are logical names (atlas.test); they resolve to its server on loopback. No other address is reached
unless the internet is allowed, and then never a private one: pages are written by strangers, and their links must not
lead into the machine's own network.
"""

import asyncio
import dataclasses
import ipaddress
import socket
from collections.abc import Collection
from urllib.parse import urljoin, urlsplit

import aiohttp
from aiohttp.abc import AbstractResolver

from tools_env.errors import ToolError
from tools_env.search.citations import canonical_url

TYPES = frozenset({"text/html", "application/xhtml+xml", "text/plain", "text/markdown", "application/pdf"})
_REDIRECTS = frozenset({301, 302, 303, 307, 308})


@dataclasses.dataclass(frozen=True)
class Fetched:
    url: str  # after redirects, canonical
    media_type: str  # one of TYPES
    charset: str | None  # as the header says
    body: bytes


class _Resolver(AbstractResolver):
    """World hosts to loopback; public addresses only if allowed."""

    def __init__(self, hosts: Collection[str], web_port: int, allow_internet: bool):
        self._hosts = hosts
        self._port = web_port
        self._system = aiohttp.ThreadedResolver() if allow_internet else None

    async def resolve(self, host, port=0, family=socket.AF_INET):
        if host in self._hosts:
            return [
                dict(hostname=host, host="127.0.0.1", port=self._port, family=socket.AF_INET, proto=0, flags=0),
            ]
        if self._system is None:
            raise OSError(f"{host} is not in this web")
        found = await self._system.resolve(host, port, family)
        public = [address for address in found if _is_public(address["host"])]
        if not public:
            raise OSError(f"{host} has no public address")
        return public

    async def close(self):
        if self._system is not None:
            await self._system.close()


class Fetcher:
    """One HTTP client for all sessions. Create and use it on one event loop; close it at the end."""

    def __init__(
        self,
        hosts: Collection[str],
        web_port: int,
        *,
        timeout: float = 2.0,
        max_bytes: int = 4 << 20,
        max_redirects: int = 5,
        concurrency: int = 64,
        allow_internet: bool = False,
    ):
        self._hosts = frozenset(hosts)
        self._allow_internet = allow_internet
        self._timeout = timeout
        self._max_bytes = max_bytes
        self._max_redirects = max_redirects
        self._client = aiohttp.ClientSession(
            connector=aiohttp.TCPConnector(
                resolver=_Resolver(self._hosts, web_port, allow_internet), limit=concurrency, limit_per_host=0
            ),
            headers={"User-Agent": "stepdr-tools", "Accept": "text/html, application/pdf, text/plain;q=0.9"},
            auto_decompress=True,
            cookie_jar=aiohttp.DummyCookieJar(),
        )

    async def fetch(self, url: str) -> Fetched:
        """Returns the page behind `url`. Raises ToolError with a short reason that names no time or address."""
        try:
            async with asyncio.timeout(self._timeout):
                return await self._follow(url)
        except TimeoutError:
            raise ToolError("timed out") from None
        except (aiohttp.ClientError, OSError, ValueError) as error:
            raise ToolError(_reason(error)) from None

    async def _follow(self, url: str) -> Fetched:
        for _ in range(self._max_redirects + 1):
            url = self._checked(url)
            async with self._client.get(url, allow_redirects=False) as response:
                if response.status in _REDIRECTS and "Location" in response.headers:
                    url = urljoin(url, response.headers["Location"])
                    continue
                if response.status != 200:
                    raise ToolError(f"HTTP {response.status}")
                media_type = response.content_type
                if media_type not in TYPES:
                    raise ToolError(f"unsupported type {media_type}")
                return Fetched(url, media_type, response.charset, await self._body(response))
        raise ToolError("too many redirects")

    async def _body(self, response: aiohttp.ClientResponse) -> bytes:
        parts, size = [], 0
        async for part in response.content.iter_chunked(1 << 16):
            size += len(part)
            if size > self._max_bytes:
                raise ToolError(f"larger than {self._max_bytes} bytes")
            parts.append(part)
        return b"".join(parts)

    def _checked(self, url: str) -> str:
        """Returns the canonical form of `url` if a request to it is allowed."""
        url = canonical_url(url)
        parts = urlsplit(url)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise ToolError("not an http address")
        if parts.hostname in self._hosts:
            if parts.scheme != "http" or parts.port not in (None, 80):
                raise ToolError("cannot connect")
        elif not self._allow_internet:
            raise ToolError("unknown host")
        else:
            try:
                # aiohttp does not resolve literal addresses, so the resolver's check does not see them.
                if not _is_public(parts.hostname):
                    raise ToolError("unknown host")
            except ValueError:
                pass
        return url

    async def close(self) -> None:
        await self._client.close()


def _is_public(address: str) -> bool:
    """Raises ValueError when `address` is a name."""
    parsed = ipaddress.ip_address(address)
    return (getattr(parsed, "ipv4_mapped", None) or parsed).is_global


def _reason(error: Exception) -> str:
    if isinstance(error, aiohttp.ClientConnectorDNSError):
        return "unknown host"
    if isinstance(error, aiohttp.ClientConnectionError):
        return "cannot connect"
    if isinstance(error, aiohttp.InvalidURL | ValueError):
        return "not an http address"
    return "broken reply"
