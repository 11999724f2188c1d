"""The tools of a run: a client that many episodes share, and the host behind it, restarted when it has died."""

import asyncio
import os
from pathlib import Path
from typing import Protocol

from ml_collections import ConfigDict

from stepdr_jax.errors import UserError
from tools_env.client import ToolsClient


class Host(Protocol):
    """A running tool host (`tools_env.process.ToolHost`)."""

    address: str

    def alive(self) -> bool: ...

    def restart(self) -> str: ...


class Tools:
    """A client of a tool host; restarts the host when it owns it and finds it dead."""

    def __init__(
        self,
        address: str,
        *,
        call_timeout: float,
        host: Host | None = None,
        token: str | None = None,
        tls_ca: str | None = None,
    ):
        self.host, self.restarts = host, 0
        self._lock = asyncio.Lock()
        self._client = ToolsClient(address, token=token, call_timeout=call_timeout, tls_ca=tls_ca)

    @classmethod
    def from_config(cls, config: ConfigDict, host: Host | None) -> "Tools":
        """Connects to our own `host`, or if it is None to the one at config.tools.address."""
        t = config.tools
        if host is not None:
            return cls(host.address, call_timeout=t.call_timeout, host=host)
        if t.tls_ca and not Path(t.tls_ca).is_file():
            raise UserError(
                f"tools.tls_ca: expected a PEM file, got {t.tls_ca}, which is not one; correct --config.tools.tls_ca"
            )
        token = os.environ.get(t.token_env)
        return cls(t.address, call_timeout=t.call_timeout, token=token, tls_ca=t.tls_ca or None)

    async def client(self) -> ToolsClient:
        """The client, after making sure that an owned host is alive."""
        if self.host is not None:
            async with self._lock:  # one restart, however many episodes found it dead
                if not self.host.alive():
                    self.restarts += 1
                    await asyncio.to_thread(self.host.restart)
        return self._client

    async def close(self) -> None:
        await self._client.close()
