"""Egress policy: where the page fetcher and the browser's proxy may connect.

The offline web's hosts are logical names (atlas.test) for its server on loopback. Other addresses are refused unless
the internet is allowed, and private ones always: pages are untrusted, and their links must not lead into the machine's
own network. A name is resolved once, and the connection goes to the checked address.
"""

import asyncio
import ipaddress
import re
import socket
from collections.abc import Awaitable, Callable, Collection
from urllib.parse import urlsplit, urlunsplit

import yarl

from tools_env.errors import ToolError

OFFLINE_WEB_PORT = 80
# Internal services of clouds, at addresses that ipaddress considers public.
_CLOUD_INTERNAL = [ipaddress.ip_network(block) for block in ("168.63.129.16/32", "192.0.0.0/24")]
_NAT64 = ipaddress.ip_network("64:ff9b::/96")
_NUMBER_AT_END = re.compile(r"(?:^|\.)(?:\d+|0x[0-9a-f]*)\.?$", re.IGNORECASE)

Lookup = Callable[[str, int], Awaitable[list[str]]]


class EgressPolicy:
    """The hosts and addresses that one tool host may connect to."""

    def __init__(
        self, hosts: Collection[str], web_port: int, allow_internet: bool = False, lookup: Lookup | None = None
    ):
        """
        Args:
          hosts: the offline web's, which are served on port `web_port` of loopback.
          lookup: from host and port to IP addresses, raising OSError; default: the system's resolver.
        """
        self._hosts = frozenset(hosts)
        self._web_port = web_port
        self._allow_internet = allow_internet
        self._lookup = lookup or _system_lookup

    def served(self, address: str) -> str:
        """Returns a URL with http for https on the offline web's hosts, which have no TLS."""
        parts = urlsplit(address)
        if parts.scheme == "https" and parts.netloc in self._hosts:
            return urlunsplit(("http", *parts[1:]))
        return address

    def url(self, address: str) -> yarl.URL:
        """Returns a checked URL, with literal IP addresses normalized. Raises ToolError if it is not allowed.

        Names are not resolved here but in `addresses`.
        """
        try:
            url = yarl.URL(address)
            host, port = url.raw_host, url.port
        except ValueError:
            raise ToolError("not an http address") from None
        if url.scheme not in ("http", "https") or not host or not port:
            raise ToolError("not an http address")
        self._check(host, port)
        literal = literal_address(host)
        return url if literal is None else url.with_host(str(literal))

    async def addresses(self, host: str, port: int) -> list[tuple[str, int]]:
        """Resolves a host to the IP addresses and ports to connect to.

        Raises ToolError with a reason that names no address.
        """
        self._check(host, port)
        if host in self._hosts:
            return [("127.0.0.1", self._web_port)]
        literal = literal_address(host)
        try:
            found = [str(literal)] if literal is not None else await self._lookup(host, port)
        except (OSError, UnicodeError):
            found = []
        public = [(address, port) for address in found if is_public(address)]
        if not public:
            raise ToolError("unknown host")
        return public

    def _check(self, host: str, port: int) -> None:
        """Refuses what can be refused without resolving a name."""
        if host in self._hosts:
            if port != OFFLINE_WEB_PORT:
                raise ToolError("cannot connect")
            return
        literal = literal_address(host)
        if not self._allow_internet or (literal is not None and not is_public(str(literal))):
            raise ToolError("unknown host")
        if literal is None and _NUMBER_AT_END.search(host):
            raise ToolError("not an http address")
        if port not in (80, 443) and port < 1024:
            raise ToolError("cannot connect")  # mail, remote shells and the like


def literal_address(host: str) -> ipaddress.IPv4Address | ipaddress.IPv6Address | None:
    """Returns the IP address that `host` spells in any form of the C library (127.1, 0x7f.1, 017700000001), or None."""
    try:
        return ipaddress.ip_address(host.strip("[]"))
    except ValueError:
        pass
    try:
        return ipaddress.IPv4Address(socket.inet_aton(host.rstrip(".")))
    except OSError:
        return None


def is_public(address: str) -> bool:
    """Returns whether an IP address is public; also checks addresses embedded in IPv6 addresses."""
    ip = ipaddress.ip_address(address)
    if ip in _NAT64:
        ip = ipaddress.IPv4Address(int(ip) & 0xFFFFFFFF)
    if isinstance(ip, ipaddress.IPv6Address) and (ip.ipv4_mapped or ip.sixtofour or ip.teredo or ip.scope_id):
        return False
    return ip.is_global and not (ip.is_multicast or ip.is_reserved or any(ip in block for block in _CLOUD_INTERNAL))


async def _system_lookup(host: str, port: int) -> list[str]:
    found = await asyncio.get_running_loop().getaddrinfo(host, port, type=socket.SOCK_STREAM)
    return list(dict.fromkeys(str(row[4][0]) for row in found))
