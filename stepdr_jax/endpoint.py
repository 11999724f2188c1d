"""Requests to HTTP endpoints that serve models: JSON in, JSON out, retried where that can help, errors that name the fix."""

import asyncio
import json
from typing import Any

import aiohttp

RETRIED_STATUS = frozenset({408, 409, 425, 429, 500, 502, 503, 504})


class EndpointError(Exception):
    """An endpoint refused, was unreachable or answered nonsense; the text names the fix."""


class Endpoint:
    """One server.

    Args:
        base_url: what paths are appended to.
        key: API key; empty sends no Authorization header.
        timeout: seconds for one request.
        retries: further tries after a timeout, a connection error or one of RETRIED_STATUS.
        backoff: seconds before the first retry; doubles each time. A Retry-After header is obeyed, up to 60 s.
        concurrency: requests in flight at once.
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

    async def post(self, path: str, body: dict[str, Any], headers: dict[str, str] | None = None) -> dict[str, Any]:
        """Returns the reply's JSON object. Raises EndpointError after the last retry, at once when that cannot help."""
        url, wait, problem = self.base_url + path, self.backoff, ""
        for attempt in range(self.retries + 1):
            try:
                async with self._session().post(url, json=body, headers=headers) as reply:
                    text = await reply.text()
                    if reply.status == 200:
                        return _json_object(text, url)
                    problem = f"HTTP {reply.status}: {_error_text(text)}"
                    if reply.status not in RETRIED_STATUS:
                        model = f" model {body['model']!r}" if body.get("model") else " the request"
                        raise EndpointError(f"{url} refused{model}: {problem}{_advice(reply.status)}")
                    after = reply.headers.get("Retry-After", "")
                    wait = max(wait, min(float(after), 60.0)) if after.replace(".", "", 1).isdigit() else wait
            except (aiohttp.ClientError, TimeoutError) as error:
                problem = f"{type(error).__name__} {error}".strip()
            if attempt < self.retries:
                await asyncio.sleep(wait)
                wait *= 2
        raise EndpointError(
            f"{url} failed {self.retries + 1} times, last with {problem}; check that the endpoint is up and reachable"
        )

    def _session(self) -> aiohttp.ClientSession:
        if self._http is None or self._http.closed:
            headers = {"Authorization": f"Bearer {self.key}"} if self.key else {}
            self._http = aiohttp.ClientSession(
                headers=headers,
                timeout=aiohttp.ClientTimeout(total=self.timeout),
                connector=aiohttp.TCPConnector(limit=self.concurrency),
            )
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
