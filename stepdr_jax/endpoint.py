"""Requests to HTTP endpoints that serve models: JSON in and out, useful retries, errors that name the fix."""

import asyncio
import json
import time
from typing import Any

import aiohttp

RETRIED_STATUS = frozenset({408, 409, 425, 429, 500, 502, 503, 504})


class EndpointError(Exception):
    """An endpoint refused, was unreachable or sent no JSON object; the text says how to fix it."""


class Endpoint:
    """One server.

    Args:
        base_url: paths are appended to it.
        key: API key; empty sends no Authorization header.
        timeout: seconds for one try, counted from when it is sent; all tries together have twice as many.
        retries: further tries after a timeout, a connection error or one of RETRIED_STATUS.
        backoff: seconds before the first retry; doubles each time. A Retry-After header is obeyed, up to 60 s.
        concurrency: requests in flight at once; others wait, and their timeout has not begun.

    Usable from one event loop after another.
    """

    def __init__(
        self,
        base_url: str,
        key: str = "",
        *,
        timeout: float = 300.0,
        retries: int = 4,
        backoff: float = 1.0,
        concurrency: int = 32,
    ):
        self.base_url, self.key = base_url.rstrip("/"), key
        self.timeout, self.retries, self.backoff, self.concurrency = timeout, retries, backoff, concurrency
        self._http: aiohttp.ClientSession | None = None
        self._gate: asyncio.Semaphore | None = None
        self._loop: asyncio.AbstractEventLoop | None = None

    async def post(self, path: str, body: dict[str, Any], headers: dict[str, str] | None = None) -> dict[str, Any]:
        """Returns the reply's JSON object. Raises EndpointError after the last retry, at once when that cannot help."""
        return await self._request("POST", path, body, headers)

    async def get(self, path: str) -> dict[str, Any]:
        """As `post`, without a body."""
        return await self._request("GET", path, None, None)

    async def _request(self, method: str, path: str, body: dict[str, Any] | None, headers) -> dict[str, Any]:
        http = self._session()
        async with self._gate:
            return await self._tried(http, method, self.base_url + path, body, headers)

    async def _tried(self, http: aiohttp.ClientSession, method: str, url: str, body, headers) -> dict[str, Any]:
        wait, problem, tries, end = self.backoff, "", 0, time.monotonic() + 2 * self.timeout
        while True:
            tries += 1
            limit = aiohttp.ClientTimeout(total=min(self.timeout, end - time.monotonic()))
            try:
                async with http.request(method, url, json=body, headers=headers, timeout=limit) as reply:
                    text = await reply.text(errors="replace")
                    if reply.status == 200:
                        return _json_object(text, url)
                    problem = f"HTTP {reply.status}: {_error_text(text)}"
                    if reply.status not in RETRIED_STATUS:
                        model = f" model {body['model']!r}" if body and body.get("model") else " the request"
                        raise EndpointError(f"{url} refused{model}: {problem}{_advice(reply.status)}")
                    after = reply.headers.get("Retry-After", "")
                    wait = max(wait, min(float(after), 60.0)) if after.replace(".", "", 1).isdigit() else wait
            except (aiohttp.ClientError, TimeoutError) as error:
                problem = f"{type(error).__name__} {error}".strip()
            if tries > self.retries or time.monotonic() + wait >= end:
                break
            await asyncio.sleep(wait)
            wait *= 2
        raise EndpointError(
            f"{url} failed {tries} times, last with {problem}; check that the endpoint is up and reachable"
        )

    def _session(self) -> aiohttp.ClientSession:
        loop = asyncio.get_running_loop()
        if self._http is None or self._http.closed or self._loop is not loop:
            headers = {"Authorization": f"Bearer {self.key}"} if self.key else {}
            self._http = aiohttp.ClientSession(headers=headers, connector=aiohttp.TCPConnector(limit=0))
            self._gate, self._loop = asyncio.Semaphore(self.concurrency), loop
        return self._http

    async def close(self) -> None:
        """Closes the connections; a later request opens new ones."""
        if self._http is not None:
            await self._http.close()


def _json_object(text: str, url: str) -> dict:
    try:
        value = json.loads(text)
    except ValueError:
        value = None
    if not isinstance(value, dict):
        raise EndpointError(
            f"{url}: expected a JSON object, got {text[:200]!r}; is this the kind of endpoint it is named as?"
        )
    return value


def _error_text(text: str) -> str:
    try:
        error = json.loads(text)["error"]
        return str(error["message"] if isinstance(error, dict) else error)[:300]
    except (ValueError, KeyError, TypeError):
        return text[:300]


def _advice(status: int) -> str:
    return {
        401: "; set the API key's environment variable",
        403: "; the key may not use this model",
        404: "; check the base URL and the model's name",
    }.get(status, "")
