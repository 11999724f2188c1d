"""OpenAI-compatible endpoint of the tools that use a model."""

import dataclasses
import os
from typing import Any

import aiohttp

from tools_env.errors import ToolError, ToolHostError

MAX_REPLY = 4 << 20  # bytes


@dataclasses.dataclass(frozen=True)
class Endpoint:
    """`url` ends in /v1 or an equivalent; `key_variable` names the environment variable with the key."""

    url: str = ""
    model: str = ""
    key_variable: str = ""

    async def post(self, path: str, seconds: float, **body: Any) -> dict[str, Any]:
        """Returns the JSON reply. Raises ToolError with a reason that names no address and no key."""
        key = os.environ.get(self.key_variable, "") if self.key_variable else ""
        headers = {"Authorization": f"Bearer {key}"} if key else {}
        timeout = aiohttp.ClientTimeout(total=max(seconds, 0.1))
        try:
            async with aiohttp.ClientSession(timeout=timeout, headers=headers) as client:
                async with client.post(f"{self.url.rstrip('/')}{path}", allow_redirects=False, **body) as response:
                    if response.status != 200:
                        raise ToolError(f"the model's endpoint answered {response.status}")
                    if (response.content_length or 0) > MAX_REPLY:
                        raise ToolError("the model's endpoint answered too much")
                    reply = await response.json(content_type=None)
        except TimeoutError:
            raise ToolError("the model's endpoint took too long") from None
        except (aiohttp.ClientError, ValueError, OSError):
            raise ToolError("the model's endpoint cannot be reached or gave no JSON") from None
        if not isinstance(reply, dict):
            raise ToolError("the model's endpoint gave another reply than expected")
        return reply


def read_endpoint_options(tool: str, options: dict[str, Any]) -> Endpoint | None:
    """Returns the endpoint that a host's options name, or None. Raises ToolHostError."""
    names = [field.name for field in dataclasses.fields(Endpoint)]
    for name, value in options.items():
        if name not in names or not isinstance(value, str):
            raise ToolHostError(
                f"{tool} has no option {name} of this kind; its options are {', '.join(names)}, all text"
            )
    endpoint = Endpoint(**options)
    if not options:
        return None
    if not endpoint.url.startswith(("http://", "https://")) or not endpoint.model:
        raise ToolHostError(f"{tool} needs both url (http://host/v1) and model, or neither")
    return endpoint
