"""HTTP client of a search provider, with limits on time and size and typed failures."""

import asyncio
import json
import os
from typing import Any

import aiohttp

from tools_env.errors import ToolError, ToolHostError, Unavailable

MAX_REPLY = 8 << 20  # bytes


class Remote:
    """A provider at one address. Connections are reused; the next request replaces a broken one."""

    def __init__(self, url: str, what: str, timeout: float, headers: dict[str, str] | None = None):
        """
        Args:
          url: http:// or https://, without a slash at the end.
          what: description of the provider for errors, which name no address and no key.
          timeout: seconds for one request.

        Raises ToolHostError for other addresses.
        """
        if not url.startswith(("http://", "https://")):
            raise ToolHostError(f"expected {what} as http://host:port or https://host, got {url!r}; correct the url")
        self.url = url.rstrip("/")
        self._what, self._timeout, self._headers = what, timeout, headers or {}
        self._clients: dict[asyncio.AbstractEventLoop, aiohttp.ClientSession] = {}

    async def get(self, path: str, seconds: float, **how: Any) -> dict[str, Any]:
        return await self._request("GET", path, seconds, **how)

    async def post(self, path: str, seconds: float, **how: Any) -> dict[str, Any]:
        return await self._request("POST", path, seconds, **how)

    async def put(self, path: str, seconds: float, **how: Any) -> dict[str, Any]:
        return await self._request("PUT", path, seconds, **how)

    async def _request(self, method: str, path: str, seconds: float, **how: Any) -> dict[str, Any]:
        """Returns the JSON object. Raises ToolError for a refused query (400, 404, 422), else Unavailable."""
        loop = asyncio.get_running_loop()
        if loop not in self._clients:
            self._clients = {other: client for other, client in self._clients.items() if not other.is_closed()}
            self._clients[loop] = aiohttp.ClientSession(headers=self._headers)
        timeout = aiohttp.ClientTimeout(total=max(min(seconds, self._timeout), 0.05))
        try:
            request = self._clients[loop].request(
                method, f"{self.url}{path}", timeout=timeout, allow_redirects=False, **how
            )
            async with request as response:
                body = await _read(response)
                status = response.status
        except TimeoutError:
            raise Unavailable(f"{self._what} took too long") from None
        except (aiohttp.ClientError, OSError):
            raise Unavailable(f"{self._what} cannot be reached") from None
        if status in (400, 404, 422):
            raise ToolError(f"{self._what} refused this query ({status})")
        if status not in (200, 201):
            raise Unavailable(f"{self._what} answered {status}")
        try:
            reply = json.loads(body)
        except (ValueError, TypeError):
            raise Unavailable(f"{self._what} gave no JSON") from None
        if not isinstance(reply, dict):
            raise Unavailable(f"{self._what} gave another reply than documented")
        return reply

    async def close(self) -> None:
        for loop, client in self._clients.items():
            if loop is asyncio.get_running_loop():
                await client.close()
        self._clients = {}


async def _read(response: aiohttp.ClientResponse) -> bytes | None:
    """Returns the body, None when it is too large."""
    body = bytearray()
    async for block in response.content.iter_chunked(1 << 16):
        body += block
        if len(body) > MAX_REPLY:
            return None
    return bytes(body)


def read_secret(variable: str, what: str) -> str:
    """Returns the value of an environment variable. Raises ToolHostError when it is not set."""
    value = os.environ.get(variable, "")
    if not value:
        raise ToolHostError(f"${variable} is not set; put the key of {what} there, or name another key_variable")
    return value
