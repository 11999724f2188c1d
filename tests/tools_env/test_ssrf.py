"""Requests that try to reach the machine's own network, by the fetcher and by the browser's proxy.

No test sends anything beyond loopback: names are looked up by a table, and connections are made by a stand-in that
notes the address or, for real ones, only to the test's own server.
"""

import asyncio
import base64
import contextlib

import pytest

from tools_env.errors import ToolError
from tools_env.web.egress import EgressPolicy, is_public, literal_address
from tools_env.web.fetch import Fetcher
from tools_env.web.proxy import ForwardProxy

PUBLIC = "93.184.215.14"

# Each leads to a private place, by an address or by a name that the table below answers.
PRIVATE = [
    "127.0.0.1",
    "127.8.9.10",
    "0.0.0.0",
    "10.0.0.1",
    "172.16.0.1",
    "192.168.1.1",
    "100.64.0.1",  # shared address space, and a cloud's metadata at 100.100.100.200
    "169.254.169.254",  # metadata
    "169.254.0.1",
    "168.63.129.16",  # metadata at a public number
    "192.0.0.192",  # metadata
    "224.0.0.1",
    "255.255.255.255",
    "[::1]",
    "[::]",
    "[::ffff:127.0.0.1]",
    "[::ffff:169.254.169.254]",
    "[::127.0.0.1]",
    "[fe80::1]",
    "[fd00::1]",
    "[fd00:ec2::254]",
    "[ff02::1]",
    "[64:ff9b::7f00:1]",  # 127.0.0.1 through NAT64
    "[2002:7f00:1::]",  # 127.0.0.1 through 6to4
    "2130706433",
    "017700000001",
    "0x7f000001",
    "0x7f.1",
    "127.1",
    "127.0.1",
    "0177.0.0.1",
    "127.0.0.1.",
    "①②⑦.⓪.⓪.①",
    "127。0。0。1",
    "localhost",
    "LOCALHOST",
    "localhost.",
    "inside.example",
    "inside6.example",
    "mixed.example",
]
TABLE = {
    "localhost": ["127.0.0.1", "::1"],
    "localhost.": ["127.0.0.1"],
    "inside.example": ["10.1.2.3"],
    "inside6.example": ["fe80::1%1", "fd00::1"],
    "mixed.example": ["127.0.0.1", "169.254.169.254"],
    "good.example": [PUBLIC],
    "both.example": ["127.0.0.1", PUBLIC],
}


async def table(host: str, port: int) -> list[str]:
    """Looks a name up in TABLE; what spells an address is taken for it, as a resolver of the system does."""
    if host in TABLE:
        return TABLE[host]
    literal = literal_address(host)
    if literal is None:
        raise OSError("no such name")
    return [str(literal)]


def egress_policy(port: int = 1, **options) -> EgressPolicy:
    return EgressPolicy(["atlas.test"], port, True, lookup=options.get("lookup", table))


class Wires:
    """Stands in for connections: notes where they would go and makes none, but to `allowed` ports of 127.0.0.1."""

    def __init__(self):
        self.tried: list[tuple[str, int]] = []
        self.allowed: set[int] = set()

    async def __call__(self, address: str, port: int, **rest):
        self.tried.append((address, port))
        if address != "127.0.0.1" or port not in self.allowed:
            raise ConnectionRefusedError
        return await asyncio.open_connection(address, port, **rest)


@pytest.fixture
def wires(monkeypatch):
    """Every socket of asyncio's loops goes through this: nothing but the test's own server is ever connected to."""
    found = Wires()

    async def connect(loop, sock, address):
        found.tried.append(address[:2])
        if address[0] != "127.0.0.1" or address[1] not in found.allowed:
            raise ConnectionRefusedError
        return await real(loop, sock, address)

    real = asyncio.selector_events.BaseSelectorEventLoop.sock_connect
    monkeypatch.setattr(asyncio.selector_events.BaseSelectorEventLoop, "sock_connect", connect)
    return found


async def fetch_failure(egress: EgressPolicy, url: str) -> str:
    fetcher = Fetcher(egress)
    try:
        with pytest.raises(ToolError) as failure:
            await fetcher.fetch(url)
        return str(failure.value)
    finally:
        await fetcher.close()


@pytest.mark.parametrize("host", PRIVATE)
def test_fetcher_never_connects_to_a_private_address(host, wires):
    why = asyncio.run(fetch_failure(egress_policy(), f"http://{host}/latest/meta-data"))
    assert wires.tried == [] and why in ("unknown host", "not an http address")


@pytest.mark.parametrize("host", PRIVATE)
def test_proxy_never_connects_to_a_private_address(host):
    async def main():
        wires = Wires()
        async with proxied(egress_policy(), wires) as ask:
            ascii_host = host if host.isascii() else host.encode("idna").decode()
            for line in (f"GET http://{ascii_host}/ HTTP/1.1", f"CONNECT {ascii_host}:443 HTTP/1.1"):
                status, _ = await ask(line)
                assert status == 403, line
        assert wires.tried == []

    asyncio.run(main())


@contextlib.asynccontextmanager
async def proxied(where: EgressPolicy, connect, **limits):
    """Yields a function that sends one request's head (and body) to a proxy: (status, whole reply)."""
    proxy = ForwardProxy(where, "secret", connect=connect, **limits)
    port = await proxy.start()

    async def ask(line: str, *headers: str, body: bytes = b"", secret: str = "secret") -> tuple[int, bytes]:
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        token = base64.b64encode(f"browser:{secret}".encode()).decode()
        head = [line, f"Proxy-Authorization: Basic {token}", *headers, "", ""]
        writer.write("\r\n".join(head).encode() + body)
        reply = b""
        with contextlib.suppress(ConnectionError):
            while part := await reader.read(1 << 16):
                reply += part
        writer.close()
        return int(reply.split(b" ")[1]) if reply.startswith(b"HTTP/") else 0, reply

    try:
        yield ask
    finally:
        await proxy.close()


@pytest.mark.parametrize(
    "url",
    [
        "http://good.example@127.0.0.1/",
        "http://good.example:80@127.0.0.1/",
        "http://atlas.test@127.0.0.1/",
        "http://atlas.test\\@127.0.0.1/",
        "http://127.0.0.1#@atlas.test/",
        "http://127.0.0.1\t/",
        "http://atlas.test:22/",
        "http://atlas.test:0/",
        "https://atlas.test:8443/",
        "http://good.example:22/",
        "http://good.example:25/",
        "http://1.2.3.4.5/",
        "file:///etc/passwd",
        "file://localhost/etc/passwd",
        "ftp://good.example/",
        "gopher://good.example:70/_x",
        "unix:///run/x.sock",
        "data:text/html,x",
        "javascript:alert(1)",
        "//127.0.0.1/",
        "http:///etc/passwd",
        "http://",
        "http://[::1",
    ],
)
def test_fetcher_refuses_tricks_and_other_schemes(url, wires):
    why = asyncio.run(fetch_failure(egress_policy(), url))
    assert wires.tried == [] and why in ("unknown host", "cannot connect", "not an http address")


@pytest.mark.parametrize(
    ("line", "status"),
    [
        ("GET file:///etc/passwd HTTP/1.1", 400),
        ("GET ftp://good.example/ HTTP/1.1", 400),
        ("GET https://good.example/ HTTP/1.1", 400),
        ("GET / HTTP/1.1", 400),
        ("GET http://good.example@127.0.0.1/ HTTP/1.1", 400),
        ("GET http://atlas.test:22/ HTTP/1.1", 403),
        ("CONNECT atlas.test:443 HTTP/1.1", 403),
        ("CONNECT good.example:25 HTTP/1.1", 403),
    ],
)
def test_proxy_refuses_other_schemes_and_ports(line, status):
    async def main():
        wires = Wires()
        async with proxied(egress_policy(), wires) as ask:
            assert (await ask(line))[0] == status
        assert wires.tried == []

    asyncio.run(main())


def test_a_name_that_changes_its_address_reaches_only_what_was_checked(wires):
    """DNS rebinding: public for the check, loopback for the connection."""

    def rebinding():
        answers = iter([[PUBLIC]] + [["127.0.0.1"]] * 9)

        async def lookup(host: str, port: int) -> list[str]:
            return next(answers)

        return lookup

    async def main():
        for scheme, port in (("http", 80), ("https", 443)):
            wires.tried.clear()
            await fetch_failure(egress_policy(lookup=rebinding()), f"{scheme}://rebind.example/")
            assert set(wires.tried) == {(PUBLIC, port)}
        for line in ("GET http://rebind.example/ HTTP/1.1", "CONNECT rebind.example:80 HTTP/1.1"):
            stand_in = Wires()
            async with proxied(egress_policy(lookup=rebinding()), stand_in) as ask:
                wires.allowed = set(range(1024, 65536))  # the way to the proxy itself
                assert (await ask(line))[0] == 502
            assert stand_in.tried == [(PUBLIC, 80)]

    asyncio.run(main())


def test_of_a_name_with_several_addresses_only_the_public_ones_are_tried(wires):
    async def main():
        await fetch_failure(egress_policy(), "http://both.example/")
        assert set(wires.tried) == {(PUBLIC, 80)}

    asyncio.run(main())


def test_without_the_internet_no_name_is_looked_up():
    async def lookup(host, port):
        raise AssertionError("looked up")

    closed = EgressPolicy(["atlas.test"], 1, False, lookup=lookup)

    async def main():
        for host in ("good.example", PUBLIC, "127.0.0.1"):
            with pytest.raises(ToolError, match="unknown host"):
                await closed.addresses(host, 80)
        assert await closed.addresses("atlas.test", 80) == [("127.0.0.1", 1)]

    asyncio.run(main())


@pytest.mark.parametrize("address", [PUBLIC, "2606:2800:21f:cb07:6820:80da:af6b:8b2c", "64:ff9b::5db8:d70e"])
def test_public_addresses_are_public(address):
    assert is_public(address)


@contextlib.asynccontextmanager
async def serving(answer):
    """Yields the port of a raw server on loopback: `answer(head, writer)` writes what it likes."""

    async def talk(reader, writer):
        with contextlib.suppress(ConnectionError, asyncio.IncompleteReadError):
            head = await reader.readuntil(b"\r\n\r\n")
            await answer(head, reader, writer)
        writer.close()

    server = await asyncio.start_server(talk, "127.0.0.1", 0)
    try:
        yield server.sockets[0].getsockname()[1]
    finally:
        server.close()


@pytest.mark.parametrize(
    "to",
    [
        "http://127.0.0.1:{port}/secret",
        "//127.0.0.1:{port}/secret",
        "http://127.1:{port}/secret",
        "http://localhost:{port}/secret",
        "http://169.254.169.254/latest/meta-data",
        "http://inside.example/",
        "http://atlas.test:{port}/secret",
        "file:///etc/passwd",
        "ftp://atlas.test/",
    ],
)
@pytest.mark.parametrize("way", ["header", "meta"])
def test_fetcher_follows_no_redirect_to_a_private_place(to, way, wires):
    asked = []

    async def main():
        async def answer(head, reader, writer):
            asked.append(head.split(b" ")[1])
            where = to.format(port=port)
            body = f'<meta http-equiv="Refresh" content="0; url={where}">' if way == "meta" else ""
            status = "200 ok" if way == "meta" else f"302 Found\r\nLocation: {where}"
            writer.write(
                f"HTTP/1.1 {status}\r\nContent-Type: text/html\r\nContent-Length: {len(body)}\r\n\r\n{body}".encode()
            )

        async with serving(answer) as port:
            wires.allowed = {port}
            await fetch_failure(egress_policy(port), "http://atlas.test/")
            assert set(wires.tried) == {("127.0.0.1", port)} and asked == [b"/"]

    asyncio.run(main())


def test_proxy_serves_nobody_without_its_secret():
    async def main():
        wires = Wires()
        async with proxied(egress_policy(), wires) as ask:
            for line in ("GET http://atlas.test/ HTTP/1.1", "CONNECT atlas.test:80 HTTP/1.1"):
                assert (await ask(line, secret="other"))[0] == 407
        assert wires.tried == []

    asyncio.run(main())


def test_proxy_passes_one_request_and_says_which_host_it_is_for():
    async def main():
        heads = []

        async def answer(head, reader, writer):
            heads.append(head)
            body = await reader.read(100)
            writer.write(
                b"HTTP/1.1 200 ok\r\nConnection: keep-alive\r\nProxy-Evil: 1\r\nContent-Length: 4\r\n\r\n" + body
            )
            await reader.read(100)  # an open connection is not used for a second request

        async with serving(answer) as port:
            wires = Wires()
            wires.allowed = {port}
            async with proxied(egress_policy(port), wires, seconds=0.5) as ask:
                status, reply = await ask(
                    *(
                        "POST http://atlas.test/a?b HTTP/1.1",
                        "Host: inside.example",
                        "Content-Length: 4",
                        "Connection: x",
                    ),
                    body=b"bodyGET http://other.test/ HTTP/1.1\r\n\r\n",
                )
        head, _, body = reply.partition(b"\r\n\r\n")
        assert status == 200 and body == b"body" and b"Connection: close" in head
        assert b"keep-alive" not in head and b"Evil" not in head
        assert heads[0].startswith(b"POST /a?b HTTP/1.1\r\nHost: atlas.test\r\n") and b"Proxy-Auth" not in heads[0]
        assert b"inside.example" not in heads[0] and len(heads) == 1

    asyncio.run(main())


def test_proxy_bounds_size_time_and_number_of_connections():
    async def main():
        async def answer(head, reader, writer):
            if b"/big" in head:
                writer.write(b"HTTP/1.1 200 ok\r\n\r\n" + b"x" * 300_000)
                await writer.drain()
            elif b"/head" in head:
                writer.write(b"HTTP/1.1 200 ok\r\nX: " + b"y" * 100_000 + b"\r\n\r\n")
                await writer.drain()
            else:
                await reader.read()

        async with serving(answer) as port:
            wires = Wires()
            wires.allowed = {port}
            limits = {"max_bytes": 100_000, "seconds": 0.5, "connections": 2}
            async with proxied(egress_policy(port), wires, **limits) as ask:
                assert len((await ask("GET http://atlas.test/big HTTP/1.1"))[1]) < 101_000
                assert (await ask("GET http://atlas.test/head HTTP/1.1"))[0] == 431
                assert (await ask("GET http://atlas.test/ HTTP/1.1", "X: " + "y" * 100_000))[0] in (0, 431)
                assert (await ask("POST http://atlas.test/ HTTP/1.1", "Content-Length: 99999999"))[0] == 413
                many = await asyncio.gather(*(ask("GET http://atlas.test/never HTTP/1.1") for _ in range(4)))
                assert [status for status, _ in many] == [0] * 4
                before = len(wires.tried)
            assert before == 2 + 2  # two of the four were let in

    asyncio.run(main())


@pytest.mark.parametrize("url", ["ftp://atlas.test:80/", "file://atlas.test:80/etc/passwd", "http://1.2.3.4.5/", "x"])
def test_what_is_no_web_address_is_refused_before_any_client_sees_it(url):
    """A client would take 1.2.3.4.5 for an address and ask the system about it, past the lookup that is checked."""
    with pytest.raises(ToolError, match="not an http address"):
        egress_policy().url(url)


@pytest.mark.parametrize("host", ["0x5db8d70e", "1572394766", "93.12113678", "0135.0270.0327.016", PUBLIC])
def test_an_address_is_connected_to_in_its_plain_spelling(host):
    assert egress_policy().url(f"http://{host}/a").raw_host == PUBLIC
