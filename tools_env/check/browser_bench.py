"""Distances between perceptual hashes of screenshots, and latency of the browser tool.

python -m tools_env.check.browser_bench --articles=plaintext_articles.tar.xz

Shows real articles in a plain template with a search form in Chromium. Small changes (a typed word, a ticked box, a
changed line) should lie below the browser tool's threshold, other views above it.
"""

import argparse
import asyncio
import contextlib
import html
import statistics
import sys
import tarfile
import tempfile
import time
from collections import defaultdict
from pathlib import Path

import psutil
from aiohttp import web

from tools_env.browser import screenshots
from tools_env.tools import browser
from tools_env.tools.base import CallContext
from tools_env.web.egress import EgressPolicy

_PAGE = """<!doctype html><meta charset=utf-8><title>{title}</title><style>body{{font:16px sans-serif;margin:0}}
header{{background:#246;color:#fff;padding:14px 40px}}main{{width:760px;margin:24px 40px}}</style>
<header><b>Library</b> <a href=/>Home</a> <form style=display:inline><input name=q>
<label><input type=checkbox> exact</label>
<button>Search</button></form></header><main><h1>{title}</h1><p id=status>3 readers</p>{body}</main>"""


def articles(path: str, count: int) -> list[str]:
    """Returns the first `count` long articles of an archive of plain texts, as pages."""
    pages = []
    with tarfile.open(path) as archive:
        for member in archive:
            if member.isfile() and member.name.endswith(".txt"):
                text = archive.extractfile(member).read().decode("utf-8", "replace")
                blocks = [" ".join(block.split()) for block in text.split("\n\n")]
                blocks = [html.escape(block) for block in blocks if len(block) > 40]
                if sum(map(len, blocks)) > 6000:
                    title = html.escape(Path(member.name).stem.replace("_", " "))
                    pages.append(_PAGE.format(title=title, body="".join(f"<p>{block}</p>" for block in blocks)))
                if len(pages) == count:
                    break
    return pages


async def measure(pages: list[str]) -> None:
    async def answer(request: web.Request) -> web.Response:
        number = request.path.strip("/")
        if not number.isdecimal():
            raise web.HTTPNotFound
        return web.Response(text=pages[int(number)], content_type="text/html")

    app = web.Application()
    app.router.add_get("/{path:.*}", answer)
    runner = web.AppRunner(app, access_log=None)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0).start()
    apart, seconds = defaultdict(list), defaultdict(list)
    async with contextlib.AsyncExitStack() as resources:
        tool = browser.build_tool({}, resources, EgressPolicy(["library.test"], runner.addresses[0][1]))
        folder = Path(resources.enter_context(tempfile.TemporaryDirectory()))
        (folder / "workspace").mkdir()

        async def act(**arguments) -> None:
            began = time.monotonic()
            await tool.run(CallContext(folder, {}, time.monotonic() + 60, 700), arguments)
            seconds[arguments["action"]].append(time.monotonic() - began)

        async def seen():
            tab = tool.run.__self__.tab(folder)
            return screenshots.perceptual_hash(
                await tab.page.screenshot(type="png", animations="disabled", caret="hide")
            )

        before = None
        for number in range(len(pages)):
            await act(action="open", url=f"http://library.test/{number}")
            first = await seen()
            if before is not None:
                apart["another article"].append(screenshots.distance(before, first))
            before = first
            apart["the same again"].append(screenshots.distance(first, await seen()))
            page = tool.run.__self__.tab(folder).page
            await page.evaluate("document.getElementById('status').textContent = '4 readers'")
            apart["a digit of the text"].append(screenshots.distance(first, await seen()))
            await act(action="type", target="2", text="Vienna")
            apart["a typed word"].append(screenshots.distance(first, await seen()))
            await act(action="click", target="3")
            apart["and a ticked box"].append(screenshots.distance(first, await seen()))
            await act(action="scroll")
            apart["scrolled by 640 pixels"].append(screenshots.distance(first, await seen()))
        chromium = [p for p in psutil.Process().children(recursive=True) if "chrom" in p.name()]
        memory = sum(p.memory_full_info().pss for p in chromium) / 2**20
    await runner.cleanup()
    print("bits apart, of 64        least  median  95 %   max   at most 4   at most 8")
    for name, bits in apart.items():
        ranked = sorted(bits)
        shares = [sum(b <= most for b in bits) / len(bits) for most in (4, 8)]
        row = (ranked[0], statistics.median(bits), ranked[int(0.95 * (len(bits) - 1))], ranked[-1])
        print(f"{name:24} {row[0]:5} {row[1]:7.0f} {row[2]:5} {row[3]:5} {shares[0]:11.0%} {shares[1]:11.0%}")
    for name, taken in seconds.items():
        print(
            f"{name}: median {statistics.median(taken):.2f} s, longest {max(taken):.2f} s (the "
            "first one starts the browser)"
        )
    print(f"memory of the browser with one page: {memory:.0f} MiB (proportional set size)")


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--articles", required=True, help="tar archive of plain texts")
    parser.add_argument("--count", type=int, default=40, help="articles")
    flags = parser.parse_args(argv)
    asyncio.run(measure(articles(flags.articles, flags.count)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
