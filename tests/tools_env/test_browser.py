"""Facts about the browser tool, with the real Chromium on a small site on loopback."""

import asyncio
import contextlib
import dataclasses
import shutil
import time
from pathlib import Path

import psutil
import pytest
from aiohttp import web

from tools_env.errors import BadArguments, ToolError, ToolHostError
from tools_env.tools import arguments, browser
from tools_env.tools.base import CallContext
from tools_env.web.egress import EgressPolicy

CHROMIUM = next(
    (path for name in ("chromium", "chromium-browser", "google-chrome") if (path := shutil.which(name))), None
)
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
    f'<p style="height:90px;background:hsl({i * 47 % 360},90%,{20 + i * 13 % 60}%);width:{10 + i * 29 % 90}%">Line {i}.</p>'
    for i in range(40)
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
            return web.Response(
                text=f"<h1>You said {request.query.get('q')} {request.query.get('c')}</h1>", content_type="text/html"
            )
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

    def __init__(self, tool, site: Site, folder: Path, port: int, state: browser.BrowserTool):
        self.tool, self.site, self.folder, self.port, self.state = tool, site, folder, port, state

    async def __call__(self, action: str, session: str = "a", seconds: float = 30.0, **rest):
        directory = self.folder / session
        (directory / "workspace").mkdir(parents=True, exist_ok=True)
        given = {"action": action, **rest}
        arguments.check_arguments(self.tool.schema, given)
        return await self.tool.run(CallContext(directory, {}, time.monotonic() + seconds, 700), given)

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
        tool = browser.build_tool(options, resources, EgressPolicy(["atlas.test", "other.test"], port))
        yield Room(tool, site, tmp_path, port, tool.run.__self__)
    await runner.cleanup()


@pytest.fixture(scope="module")
def runner():
    """One event loop for the tests of this file, which share a browser where they do not say otherwise."""
    with asyncio.Runner() as runner:
        yield runner


@pytest.fixture(scope="module")
def shared(runner, tmp_path_factory):
    resources = contextlib.AsyncExitStack()
    yield runner.run(resources.enter_async_context(opened(tmp_path_factory.mktemp("shared"))))
    runner.run(resources.aclose())


@pytest.fixture
def run(runner):
    return runner.run


@pytest.fixture
def room(request, tmp_path):
    """`async with room(**options) as use:` gives the tool over a site; without options it is the shared one."""

    @contextlib.asynccontextmanager
    async def make(**options):
        if options:
            async with opened(tmp_path, **options) as use:
                yield use
        else:
            common.site.requests.clear()
            common.site.extra = {}
            common.folder = tmp_path
            yield common

    common = request.getfixturevalue("shared")
    return make


def test_a_session_reads_clicks_types_and_goes_back(run, room, tmp_path):
    async def main():
        async with room() as use:
            home = await use("open", url="atlas.test")
            assert home.text.splitlines()[0] == "Home | http://atlas.test/"
            assert (
                "# Atlas" in home.text and "A short page about Austria." in home.text and "never seen" not in home.text
            )
            assert "Vienna came late" in home.text and "[8 button Press]" in home.text
            assert "[3 textbox Capital]" in home.text and "euro / forint" in home.text and "hunter2" not in home.text
            assert (tmp_path / "a/workspace/screenshots/1.png").read_bytes().startswith(b"\x89PNG")
            pressed = await use("click", target="Press")
            assert "[8 button pressed]" in pressed.text
            with pytest.raises(
                ToolError, match=r"2 elements show 'second': 1 \(Second page\), 2 \(Second page again\)"
            ):
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

    run(main())


def test_screenshots_are_kept_when_the_screen_changes_and_left_out_when_it_barely_does(run, room, tmp_path):
    async def main():
        async with room() as use:
            first = await use("open", url="http://atlas.test/long")
            assert first.text.splitlines()[1] == "screenshot: screenshots/1.png"
            again = await use("open", url="http://atlas.test/long")
            assert again.text.splitlines()[1] == "the screen is as in screenshots/1.png"
            use.site.extra = {"/long": LONG.replace("Line 3.", "Line three.")}
            worded = await use("open", url="http://atlas.test/long")
            assert (
                worded.text.splitlines()[1] == "the screen looks as in screenshots/1.png"
                and "Line three." in worded.text
            )
            down = await use("scroll")
            assert down.text.splitlines()[1:4] == [
                *("screenshot: screenshots/2.png", "... 6 lines above; scroll up to read them", "Line 6."),
            ]
            assert (await use("look")).text.splitlines()[1] == "the screen looks as in screenshots/2.png"
            up = await use("scroll", direction="up")
            assert up.text.splitlines()[1:3] == ["screenshot: screenshots/3.png", "Line 0."]
            # Nothing that is read has changed, but the screen has: a look sees it.
            await use.state.tab(tmp_path / "a").page.evaluate("document.body.style.transform = 'rotate(90deg)'")
            assert (await use("look")).text.splitlines()[1] == "screenshot: screenshots/4.png"
            use.site.extra = {"/long": LONG, "/twin": LONG.replace("Line", "Row")}
            await use("open", url="http://atlas.test/long")
            twin = await use("open", url="http://atlas.test/twin")
            assert twin.text.splitlines()[1] == "screenshot: screenshots/6.png", (
                "another text at another address is new"
            )
        assert sorted(p.name for p in (tmp_path / "a/workspace/screenshots").iterdir()) == [
            f"{i}.png" for i in range(1, 7)
        ]

    run(main())


WALLS = pytest.mark.parametrize("walled", [True, False], ids=["own network", "host's network"])


def without_bubblewrap(monkeypatch):
    which = shutil.which
    monkeypatch.setattr(shutil, "which", lambda name: None if name == "bwrap" else which(name))


@pytest.fixture
def walls(monkeypatch):
    """Whether the browser has a network of its own; without, its proxy and flags alone hold it."""

    def choose(walled: bool) -> dict:
        if walled:
            if shutil.which("bwrap") is None:
                pytest.skip("needs bubblewrap")
            return {}
        without_bubblewrap(monkeypatch)
        return {"accept_weaker_isolation": True}

    return choose


PROBES = """<title>Probes</title><p id="said">...</p><script>
const port = %d, udp = %d, out = [];
const tried = (name, promise) => promise.then(() => out.push(name + ' reached'), () => out.push(name + ' failed'));
const socket = (url) => new Promise((yes, no) => { const s = new WebSocket(url); s.onopen = yes; s.onerror = no; });
const image = (url) => new Promise((yes, no) => { const i = new Image(); i.onload = yes; i.onerror = no; i.src = url; });
const worker = new Worker(URL.createObjectURL(new Blob([`fetch('http://127.0.0.1:${port}/worker', {mode: 'no-cors'}).then(
  () => postMessage(1), () => postMessage(0))`])));
const rtc = async () => {
  const peer = new RTCPeerConnection({iceServers: [{urls: `stun:127.0.0.1:${udp}`}]});
  peer.createDataChannel('x');
  await peer.setLocalDescription(await peer.createOffer());
  await new Promise((yes) => setTimeout(yes, 1500));
};
Promise.all([
  tried('fetch', fetch(`http://127.0.0.1:${port}/fetch`)),
  tried('opaque', fetch(`http://127.0.0.1:${port}/opaque`, {mode: 'no-cors'})),
  tried('post', fetch(`http://localhost:${port}/post`, {method: 'POST', body: 'x', mode: 'no-cors'})),
  tried('short', fetch(`http://127.1:${port}/short`, {mode: 'no-cors'})),
  tried('six', fetch(`http://[::1]:${port}/six`, {mode: 'no-cors'})),
  tried('tls', fetch(`https://127.0.0.1:${port}/tls`, {mode: 'no-cors'})),
  tried('websocket', socket(`ws://127.0.0.1:${port}/socket`)),
  tried('image', image(`http://127.0.0.1:${port}/image`)),
  tried('moved', fetch(`/away?to=http://127.0.0.1:${port}/moved`, {mode: 'no-cors'})),
  tried('beacon', Promise.resolve(navigator.sendBeacon(`http://127.0.0.1:${port}/beacon`, 'x'))),
  new Promise((yes) => worker.onmessage = yes),
  rtc(),
]).then(() => said.textContent = out.join(', '));
</script><iframe src="http://127.0.0.1:%d/frame"></iframe><link rel="prefetch" href="http://127.0.0.1:%d/prefetch">
<link rel="preconnect" href="http://127.0.0.1:%d">"""


@WALLS
def test_a_page_reaches_nothing_but_the_world(run, room, walls, walled):
    """fetch, WebSocket, images, frames, workers, beacons, redirects, WebRTC: by TCP or UDP, nothing arrives."""

    async def main():
        arrived = []

        async def inside(reader, writer):
            arrived.append(await reader.read(100))
            writer.close()

        class Datagrams(asyncio.DatagramProtocol):
            def datagram_received(self, data, address):
                arrived.append(data)

        loop = asyncio.get_running_loop()
        private = await asyncio.start_server(inside, "127.0.0.1", 0)
        port = private.sockets[0].getsockname()[1]
        transport, _ = await loop.create_datagram_endpoint(Datagrams, local_addr=("127.0.0.1", 0))
        udp = transport.get_extra_info("sockname")[1]
        async with room(**walls(walled)) as use:
            use.site.extra = {"/probes": PROBES % (port, udp, port, port, port)}
            shown = await use("open", url="http://atlas.test/probes")
            for _ in range(10):
                if "fetch failed" in shown.text:
                    break
                await asyncio.sleep(0.3)
                shown = await use("look")
            for kind in ("fetch", "websocket", "image", "tls"):
                assert f"{kind} failed" in shown.text
            away = await use("open", url="http://atlas.test/")
            assert away.text.startswith("Home"), "the world is still reached"
        private.close()
        transport.close()
        assert arrived == []

    run(main())


def test_addresses_that_are_refused(run, room):
    async def main():
        async with room() as use:
            use.site.extra = {
                "/links": f'<a href="file:///etc/passwd">one</a> <a href="http://127.0.0.1:{use.port}/">two</a>'
                '<a href="chrome://version">three</a>'
            }
            for url, why in (
                ("file:///etc/passwd", "not an http address"),
                ("chrome://version", "not an http address"),
                ("view-source:http://atlas.test/", "not an http address"),
                ("data:text/html,x", "not an http address"),
                ("javascript:alert(1)", "not an http address"),
                (f"http://127.0.0.1:{use.port}/", "unknown host"),
                (f"http://localhost:{use.port}/", "unknown host"),
                ("http://169.254.169.254/", "unknown host"),
                (f"http://atlas.test:{use.port}/", "cannot connect"),
                ("https://atlas.test/", "cannot connect"),
                (f"http://atlas.test/away?to=http://127.0.0.1:{use.port}/", "unknown host"),
                ("http://atlas.test/away?to=file:///etc/passwd", "cannot open the page"),
                ("http://atlas.test/file", "a download"),
            ):
                with pytest.raises(ToolError, match=why):
                    await use("open", url=url)
            for link in ("one", "two", "three"):
                await use("open", url="http://atlas.test/links")
                shown = await use("click", target=link)
                assert "root:" not in shown.text
                assert shown.failed == (link == "two")
        assert not any(row.startswith(("127.", "localhost")) for row in use.site.requests)

    run(main())


def test_sessions_share_no_cookies_and_end_with_their_folder(run, room, tmp_path):
    async def main():
        async with room() as use:
            for session, seen in (("a", "nobody"), ("a", "somebody"), ("b", "nobody"), ("a", "somebody")):
                assert f"cookie {seen}" in (await use("open", session=session, url="http://atlas.test/cookie")).text
            contexts = use.state.tab(tmp_path / "a").context.browser.contexts
            before = len(contexts)
            shutil.rmtree(tmp_path / "a")
            for _ in range(100):
                if len(use.state.tab(tmp_path / "b").context.browser.contexts) < before:
                    break
                await asyncio.sleep(0.05)
            else:
                raise AssertionError("the context of a closed session is still open")

    run(main())


def test_pages_and_screenshots_are_bounded_and_sessions_are_told(run, room, monkeypatch):
    async def main():
        monkeypatch.setattr(browser, "_GRACE_SECONDS", 0.0)
        async with room(contexts=1, screenshots=1) as use:
            await use("open", session="a", url="http://atlas.test/second")
            more = await use("open", session="a", url="http://atlas.test/long")
            assert more.text.splitlines()[1] == "no screenshot: a session keeps 1" and "Line 0." in more.text
            await use("open", session="b", url="http://atlas.test/second")
            with pytest.raises(ToolError, match="closed to make room for others; open an address first"):
                await use("look", session="a")
            with pytest.raises(ToolError, match="no page is open; open an address first"):
                await use("look", session="a")
            slow = asyncio.create_task(use("open", session="b", url="http://atlas.test/slow", seconds=4.0))
            await asyncio.sleep(0.3)
            with pytest.raises(ToolError, match="no page could be opened; try again later"):
                await use("open", session="a", url="http://atlas.test/second", seconds=2.2)
            with pytest.raises(ToolError, match="another call of this session still uses the page"):
                await use("look", session="b", seconds=2.1)
            with pytest.raises(ToolError, match="open timed out; look at what has loaded"):
                await slow
            assert (await use("look", session="b")).text.startswith("Second")
            use.state._options = dataclasses.replace(use.state._options, idle=1)
            while use.state.tab(use.folder / "b").context is not None:
                await asyncio.sleep(0.1)
            with pytest.raises(ToolError, match="closed after 1 s without use; open an address first"):
                await use("look", session="b")

    run(main())


def test_a_host_serves_it_and_its_pictures_can_be_looked_at(run, running):
    async def main():
        async with running(tools="browser,analyze_image") as it:
            session = await it.client.open_session("e")
            opened = await session.call("browser", {"action": "open", "url": "atlas.test/en/austria"}, call_id="0")
            assert opened.outcome == "ok" and "The capital of Austria is [2 link Vienna] ." in opened.text
            assert opened.text.splitlines()[:2] == [
                "Austria | http://atlas.test/en/austria",
                "screenshot: screenshots/1.png",
            ]
            seen = await session.call("analyze_image", {"path": "screenshots/1.png"}, call_id="1")
            assert "The capital of Austria is Vienna" in seen.text
            long = await session.call("browser", {"action": "open", "url": "http://atlas.test/long"}, call_id="2")
            assert long.truncated and len(long.text) <= 700 and "screenshot: screenshots/2.png" in long.text
            stored = long.text.split("stored in ")[1].split(";")[0]
            read = await session.call("file", {"op": "read", "path": stored}, call_id="3")
            assert "Line 9 says that 9 is a number." in read.text
            wrong = await session.call("browser", {"action": "open", "url": "http://127.0.0.1/"}, call_id="4")
            assert (wrong.outcome, wrong.text) == ("tool_error", "unknown host")
            again = await session.call("browser", {"action": "open", "url": "http://127.0.0.1/"}, call_id="4")
            assert again.text == wrong.text, "a repeated call is not run again"
            await session.close()

    run(main())


def test_a_browser_that_is_killed_is_started_again(run, room):
    async def main():
        async with room(screenshots=5) as use:
            await use("open", url="http://atlas.test/second")
            main_process = next(p for p in use.processes() if "--type=" not in " ".join(p.cmdline()))
            slow = asyncio.create_task(use("open", session="b", url="http://atlas.test/slow"))
            while "atlas.test /slow" not in use.site.requests:
                await asyncio.sleep(0.02)
            main_process.kill()
            with pytest.raises(ToolError, match="the browser stopped"):
                await slow
            with pytest.raises(ToolError, match="the browser stopped"):
                await use("look")
            assert (await use("open", url="http://atlas.test/second")).text.startswith("Second")
        assert main_process.pid not in [p.pid for p in use.processes()]

    run(main())


def test_a_page_that_crashes_or_hangs_is_closed_in_time_and_takes_no_other_down(run, room):
    async def main():
        async with room() as use:
            use.site.extra = {"/hang": "<title>Hang</title><script>while (true);</script>", "/crash": "<h1>soon</h1>"}
            await use("open", session="b", url="http://atlas.test/second")
            began = time.monotonic()
            with pytest.raises(ToolError, match="the page hung and was closed"):
                await use("open", url="http://atlas.test/hang", seconds=4.0)
            assert time.monotonic() - began < 4.0
            await use("open", url="http://atlas.test/crash")
            page = use.state.tab(use.folder / "a").page
            with contextlib.suppress(Exception):
                await page.goto("chrome://crash", timeout=1000)
            with pytest.raises(ToolError, match="crashed"):
                await use("look")
            assert (await use("look", session="b")).text.startswith("Second")
            with pytest.raises(ToolError, match="open timed out; look at what has loaded"):
                await use("open", url="http://atlas.test/slow", seconds=5.0)

    run(main())


def test_windows_dialogs_and_downloads_are_refused_with_a_note(run, room):
    async def main():
        async with room() as use:
            use.site.extra = {
                "/odd": '<title>Odd</title><a href="/second" target="_blank">window</a> <a href="/file">file</a>'
                "<button onclick=\"alert('hello there')\">alert</button>"
                "<script>onbeforeunload = (e) => e.preventDefault()</script>"
            }
            await use("open", url="http://atlas.test/odd")
            assert "a new window was refused: http://atlas.test/second" in (await use("click", target="window")).text
            assert "a dialog was dismissed: hello there" in (await use("click", target="alert")).text
            assert "a download was refused: http://atlas.test/file" in (await use("click", target="file")).text
            assert len(use.state.tab(use.folder / "a").context.pages) == 1
            lies = ("Array.prototype.push = () => 7", "String.prototype.trim = () => 5", "Object.prototype.lines = 3")
            for lie in lies:  # told to the script that reads the page, among the page's own
                use.site.extra["/liar"] = f"<h1>x</h1><script>{lie}; scrollY = 'far'</script>"
                with contextlib.suppress(ToolError):
                    assert "liar" in (await use("open", url="http://atlas.test/liar")).text
            await use("open", url="http://atlas.test/odd")
            assert (await use("open", url="http://atlas.test/second")).text.startswith("Second")

    run(main())


def test_what_cannot_be_done_is_said(run, room):
    async def main():
        async with room() as use:
            use.site.extra = {
                "/form": '<input type="file" title="upload"><input type="checkbox" title="box"><button id=gone>gone</button>'
                '<button>covered</button><div style="position:fixed;inset:0"></div>'
            }
            with pytest.raises(ToolError, match="no page is open"):
                await use("back")
            for arguments_, needed in (
                ({"action": "open"}, "url"),
                ({"action": "type"}, "target and text"),
            ):
                with pytest.raises(BadArguments, match=f"needs {needed}"):
                    await use(**arguments_)
            missing = await use("open", url="http://atlas.test/none")
            assert missing.failed and missing.text.splitlines()[1] == "HTTP 404" and "Not here" in missing.text
            await use("open", url="http://atlas.test/form")
            for given, why in (
                ({"action": "type", "target": "upload", "text": "x"}, "files cannot be uploaded"),
                ({"action": "type", "target": "box", "text": "x"}, "a checkbox is clicked"),
                ({"action": "click", "target": "9"}, "there is no element 9; the page has 4"),
                ({"action": "click", "target": "nothing"}, "no element shows 'nothing'"),
                ({"action": "click", "target": "covered"}, "something covers it"),
            ):
                with pytest.raises(ToolError, match=why):
                    await use(**given)
            await use.state.tab(use.folder / "a").page.evaluate("document.getElementById('gone').remove()")
            with pytest.raises(ToolError, match="the element is gone"):
                await use("click", target="gone")

    run(main())


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"colour": 1}, "browser has no option colour"),
        ({"timeout": 0}, "option timeout of browser must be a positive number, got 0"),
        ({"contexts": True}, "option contexts of browser must be a positive number, got True"),
        ({"executable": "no-such-browser"}, "none was found"),
        ({"executable": "true"}, "does not start"),
    ],
)
def test_wrong_options_are_refused(options, words):
    with pytest.raises(ToolHostError, match=words):
        browser.build_tool(options, contextlib.AsyncExitStack(), EgressPolicy([], 1))


def test_weaker_walls_are_named_and_refused(monkeypatch):
    without_bubblewrap(monkeypatch)
    with pytest.raises(ToolHostError, match="no sandbox of namespaces .* accept_weaker_isolation"):
        browser.build_tool({}, contextlib.AsyncExitStack(), EgressPolicy([], 1))
