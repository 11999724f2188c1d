"""A three-country world on disk, its pages behind a real HTTP server, and a tool host over both."""

import asyncio
import contextlib
import dataclasses
import json
from pathlib import Path

import pytest
from aiohttp import web

from tools_env.client import ToolsClient
from tools_env.service.host import start_host
from tools_env.service.settings import HostSettings

COUNTRIES = {
    "austria": ("Austria", "Vienna", "奥地利", "维也纳", "euro"),
    "hungary": ("Hungary", "Budapest", "匈牙利", "布达佩斯", "forint"),
    "guinea": ("Guinea", "Conakry", "几内亚", "科纳克里", "Guinean franc"),
    "papua_new_guinea": ("Papua New Guinea", "Port Moresby", "巴布亚新几内亚", "莫尔兹比港", "kina"),
    "guinea_bissau": ("Guinea-Bissau", "Bissau", "几内亚比绍", "比绍", "CFA franc"),
    **{f"land{i}": (f"Land{i}", f"Town{i}", f"国{chr(0x6000 + i)}", f"城{chr(0x7000 + i)}", "coin") for i in range(40)},
}
AUTHORITY = {
    "atlas.test": 2,
    "gazette.test": 2,
    "mirror.test": 0,
    "quickfacts.test": 0,
    "slow.test": 1,
    "flaky.test": 1,
}


def documents() -> list[dict]:
    rows = []
    for key, (name, capital, zh, zh_capital, currency) in COUNTRIES.items():
        facts = [
            f"The capital of {name} is [{capital}](http://atlas.test/en/{key}_capital).",
            f"The currency of {name} is the **{currency}**.",
            f"The neighbours of {name} are Hungary and Guinea.",
        ]
        zh_facts = [f"{zh}的首都是{zh_capital}。", f"{zh}的货币是{currency}。"]
        wrong = [f"The capital of {name} is Salzburg."]
        for host, lang, title, lines in (
            ("mirror.test", "en", name, facts),
            ("quickfacts.test", "en", f"{name} in numbers", wrong),
            ("atlas.test", "en", name, facts),
            ("atlas.test", "zh", zh, zh_facts),
        ):
            rows.append(
                {
                    "id": f"{host}/{lang}/{key}",
                    "url": f"http://{host}/{lang}/{key}",
                    "title": title,
                    "text": "\n".join([f"# {title}", *lines]),
                    "lang": lang,
                    "source": "world",
                    "authority": AUTHORITY[host],
                    "published_at": "2025-03-01",
                    "links": [],
                }
            )
    return rows


def write_offline_web(folder: Path) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    lines = [json.dumps(row, ensure_ascii=False) + "\n" for row in documents()]
    (folder / "documents.jsonl").write_text("".join(lines), encoding="utf-8")
    hosts = {host: {"authority": authority} for host, authority in AUTHORITY.items()}
    (folder / "sites.json").write_text(json.dumps({"hosts": hosts, "fingerprint": "test"}))
    return folder


@pytest.fixture(scope="session")
def offline_web(tmp_path_factory) -> Path:
    """A world directory; the index in it is built by the first test that needs it. Read only."""
    return write_offline_web(tmp_path_factory.mktemp("world"))


AUSTRIA = """<!doctype html><html><head><title>Austria</title><meta name="date" content="2025-03-01"></head><body>
<nav><a href="/">Home</a></nav><main><h1>Austria</h1>
<p>The capital of Austria is <a href="/en/austria_capital">Vienna</a>.</p>
<p>The currency of Austria is the <b>euro</b>.</p>
<p>The neighbours of Austria are Hungary
 and Guinea.</p></main><footer>imprint</footer></body></html>"""


class Site:
    """The pages of all world hosts. `requests` counts what was asked; `gate`, when set, holds replies of slow.test."""

    def __init__(self):
        self.requests: list[str] = []
        self.cancelled = 0
        self.gate: asyncio.Event | None = None
        self.failures = 0  # so many next requests to flaky.test answer 503

    async def answer(self, request: web.Request) -> web.Response:
        host, path = request.host.partition(":")[0], request.path
        self.requests.append(f"{host}{path}")
        if host == "slow.test":
            try:
                await (self.gate or asyncio.Event()).wait()
            except asyncio.CancelledError:
                self.cancelled += 1
                raise
        if host == "flaky.test" and self.failures > 0:
            self.failures -= 1
            return web.Response(status=503)
        if path == "/old":
            raise web.HTTPFound("http://atlas.test/en/austria#top")
        if path == "/loop":
            raise web.HTTPFound("/loop")
        if path == "/inside":
            raise web.HTTPFound("http://127.0.0.1:22/")
        if path == "/picture":
            return web.Response(body=b"x", content_type="image/png")
        if path == "/huge":
            return web.Response(body=b"x" * 200_000, content_type="text/plain")
        if path == "/gbk":
            page = '<html><head><meta charset="gb2312"><title>奥地利</title></head><body><article><p>奥地利的首都是维也纳。</p>'
            return web.Response(body=page.encode("gb18030"), headers={"Content-Type": "text/html"})
        if path == "/long":
            lines = "".join(f"<p>Line {i} says that {i} is a number.</p>" for i in range(100))
            return web.Response(text=f"<title>Long</title><main>{lines}</main>", content_type="text/html")
        if path == "/plainhtml":
            text = "".join(
                f"<p>Paragraph {i} of a page without a main element, long enough to count.</p>" for i in range(5)
            )
            return web.Response(text=f"<html><body><div>{text}</div></body></html>", content_type="text/html")
        if path in ("/en/austria", "/good"):
            return web.Response(text=AUSTRIA, content_type="text/html")
        return web.Response(status=404)


@dataclasses.dataclass
class Running:
    client: ToolsClient
    host: object
    site: Site
    address: str


@contextlib.asynccontextmanager
async def _running(offline_web: Path, *, client_token: str | None = None, **settings):
    site = Site()
    app = web.Application()
    app.router.add_route("*", "/{path:.*}", site.answer)
    # The test's own connections are cut at the end; the handler of a cancelled request must be cancelled too.
    runner = web.AppRunner(app, access_log=None, handler_cancellation=True)
    await runner.setup()
    tcp = web.TCPSite(runner, "127.0.0.1", 0, shutdown_timeout=0.1)
    await tcp.start()
    port = runner.addresses[0][1]
    host = await start_host(
        HostSettings(
            offline_web=str(offline_web),
            **({"web_port": port, "drain": 0.5, "cache_failure_seconds": 0.0} | settings),
        )
    )
    client = ToolsClient(host.address, token=client_token)
    try:
        yield Running(client, host, site, host.address)
    finally:
        await client.close()
        await host.stop()
        await runner.cleanup()


@pytest.fixture
def running(offline_web):
    """`async with running(**settings) as it:` gives a client, the host and the site, all on this event loop."""
    return lambda **settings: _running(offline_web, **settings)
