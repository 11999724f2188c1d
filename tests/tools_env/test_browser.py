"""Facts about the browser tool, with the real Chromium on a small site on loopback."""

import asyncio
import contextlib
import json
import shutil
import time
from pathlib import Path

import psutil
import pytest
from aiohttp import web

from tools_env.browser import sandbox, shots
from tools_env.errors import BadArguments, ToolError, ToolHostError
from tools_env.reach import Reach
from tools_env.tools import arguments, browser, optional
from tools_env.tools.base import Call

CHROMIUM = next((path for name in ("chromium", "chromium-browser", "google-chrome") if (path := shutil.which(name))), None)
pytestmark = [
    pytest.mark.browser,
    pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on PATH (apt-get install chromium)"),
]

HOME = """<!doctype html><title>Home</title><body><h1>Atlas</h1><p>A short page about <b>Austria</b>.</p>
<a href="/second">Second page</a> <a href="/second?again">Second page again</a>
<form action="/answer"><label>Capital <input name="q"></label><select name="c"><option>euro<option>forint</select>
<input type="checkbox" name="sure"><input type="password" name="p" value="hunter2"><button>Ask</button></form>
<div id="late"></div><div style="display:none">never seen</div><script>
setTimeout(() => fetch('/data').then(r => r.text()).then(t => late.innerHTML = '<p>' + t + '</p><a onclick="late.lastChild.textContent=\\'pressed\\'">Press</a>'), 50)
</script>"""
LONG = "<title>Long</title>" + "".join(
    f'<p style="height:90px;background:hsl({i * 47 % 360},90%,{20 + i * 13 % 60}%);width:{10 + i * 29 % 90}%">Line {i}.</p>' for i in range(40)
)


class Site:
    """Pages of atlas.test and other.test; `requests` are "host path" of what reached it."""

    def __init__(self):
        self.requests: list[str] = []

    async def answer(self, request: web.Request) -> web.Response:
        host, path = request.host.partition(":")[0], request.path
        self.requests.append(f"{host} {path}")
        pages = {"/": HOME, "/second": "<title>Second</title><h1>Second</h1><p>Another text.</p>", "/long": LONG}
        if path == "/data":
            return web.Response(text="Vienna came late")
        if path == "/answer":
            return web.Response(text=f"<h1>You said {request.query.get('q')} {request.query.get('c')}</h1>", content_type="text/html")
        if path == "/cookie":
            seen = request.cookies.get("who", "nobody")
            reply = web.Response(text=f"<p>cookie {seen}</p>", content_type="text/html")
            reply.set_cookie("who", "somebody")
            return reply
        if path == "/away":
            raise web.HTTPFound(request.query["to"])
        if path == "/file":
            return web.Response(body=b"x", headers={"Content-Disposition": "attachment; filename=a.bin"})
        if path == "/slow":
            await asyncio.sleep(30)
        if path in self.extra:
            return web.Response(text=self.extra[path], content_type="text/html")
        if path in pages:
            return web.Response(text=pages[path], content_type="text/html")
        return web.Response(status=404, text="<h1>Not here</h1>", content_type="text/html")

    extra: dict[str, str] = {}


class Room:
    """The tool over a site, and calls of sessions named by their folder."""

    def __init__(self, tool, site: Site, folder: Path, port: int, state: browser.Browser):
        self.tool, self.site, self.folder, self.port, self.state = tool, site, folder, port, state

    async def __call__(self, action: str, session: str = "a", seconds: float = 30.0, **rest):
        directory = self.folder / session
        (directory / "workspace").mkdir(parents=True, exist_ok=True)
        given = {"action": action, **rest}
        arguments.check(self.tool.schema, given)
        return await self.tool.run(Call(directory, {}, time.monotonic() + seconds, 700), given)

    def processes(self) -> list[psutil.Process]:
        """Chromium's, below this one."""
        return [p for p in psutil.Process().children(recursive=True) if "chrom" in _name(p)]


def _name(process: psutil.Process) -> str:
    try:
        return process.name()
    except psutil.NoSuchProcess:
        return ""


@contextlib.asynccontextmanager
async def opened(tmp_path: Path, **options):
    site = Site()
    app = web.Application()
    app.router.add_route("*", "/{path:.*}", site.answer)
    runner = web.AppRunner(app, access_log=None, handler_cancellation=True)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0, shutdown_timeout=0.1).start()
    port = runner.addresses[0][1]
    async with contextlib.AsyncExitStack() as resources:
        tool = browser.build(options, resources, Reach(["atlas.test", "other.test"], port))
        yield Room(tool, site, tmp_path, port, tool.run.__self__)
    await runner.cleanup()


@pytest.fixture
def room(tmp_path):
    return lambda **options: opened(tmp_path, **options)


def test_a_session_reads_clicks_types_and_goes_back(room, tmp_path):
    async def main():
        async with room() as use:
            home = await use("open", url="atlas.test")
            assert home.text.splitlines()[0] == "Home | http://atlas.test/"
            assert "# Atlas" in home.text and "A short page about Austria." in home.text and "never seen" not in home.text
            assert "Vienna came late" in home.text and "[8 button Press]" in home.text
            assert "[3 textbox Capital]" in home.text and "euro / forint" in home.text and "hunter2" not in home.text
            assert (tmp_path / "a/workspace/shots/1.png").read_bytes().startswith(b"\x89PNG")
            pressed = await use("click", target="Press")
            assert "[8 button pressed]" in pressed.text
            with pytest.raises(ToolError, match="2 elements show 'second page a?'|Second page again"):
                await use("click", target="second")
            typed = await use("type", target="3", text="Vienna")
            assert "[3 textbox Capital = Vienna]" in typed.text
            assert "forint" in (await use("type", target="4", text="forint")).text
            answer = await use("type", target="Capital", text="Wien", submit=True)
            assert "# You said Wien forint" in answer.text
            back = await use("back")
            assert back.text.startswith("Home | http://atlas.test/")
            second = await use("click", target="second page")
            assert second.text.startswith("Second | http://atlas.test/second\n")

    asyncio.run(main())
