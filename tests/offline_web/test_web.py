"""The world over real HTTP: what a reader extracts is what the documents file says."""

import asyncio
import random
import time
import urllib.error
import urllib.request
from concurrent.futures import ThreadPoolExecutor

import aiohttp
import pytest
import trafilatura

from tools_env.errors import ToolHostError
from tools_env.offline_web.pages import HOSTS
from tools_env.offline_web.server import OfflineWebServer, make_offline_web_app, render_page
from tools_env.search import text
from tools_env.web.fetch import FetchedPage
from tools_env.web.page import extract_page


class _Stay(urllib.request.HTTPRedirectHandler):
    def redirect_request(self, *arguments):
        return None


OPENER = urllib.request.build_opener(_Stay)


def get(port: int, url: str):
    """Returns status, headers, body of one request to a logical host."""
    host, _, path = url.removeprefix("http://").partition("/")
    request = urllib.request.Request(f"http://127.0.0.1:{port}/{path}", headers={"Host": host})
    try:
        with OPENER.open(request, timeout=10) as reply:
            return reply.status, reply.headers, reply.read()
    except urllib.error.HTTPError as error:
        with error:
            return error.code, error.headers, error.read()


def fetched(port: int, url: str) -> FetchedPage:
    status, headers, body = get(port, url)
    assert status == 200, url
    return FetchedPage(url, headers.get_content_type(), headers.get_content_charset(), body)


def sample(documents: dict, per_host: int = 4) -> list[dict]:
    rng = random.Random(0)
    chosen = []
    for host in HOSTS:
        for lang in ("en", "zh"):
            rows = [row for url, row in documents.items() if f"//{host}/" in url and row["lang"] == lang]
            chosen += rng.sample(rows, min(per_host, len(rows)))
    chosen += [
        row for url, row in documents.items() if url.endswith(("/region/caribbean", "/currency/euro", "/en", "/zh"))
    ]
    return [row for row in chosen if "//flaky.test" not in row["url"]]


def test_a_reader_gets_exactly_the_passages_title_and_date(web_port, documents):
    for row in sample(documents):
        page = extract_page(fetched(web_port, row["url"]))
        assert page.passages == text.passages(row["text"]), row["url"]
        assert (page.title, page.published_at) == (row["title"], row["published_at"])


def test_main_text_is_found_on_pages_that_do_not_mark_it(documents):
    rows = [
        r for u, r in documents.items() if u.startswith(("http://travelnotes.test/en", "http://quickfacts.test/en"))
    ]
    for row in random.Random(1).sample(rows, 40):
        page = render_page(row)
        assert "<main" not in page and "<article" not in page
        found = trafilatura.extract(page, output_format="markdown", favor_recall=True)
        assert text.passages(found) == text.passages(row["text"]), row["url"]


def test_every_link_is_on_the_page(web_port, documents):
    import lxml.html

    for url in ("http://atlas.test/en/austria", "http://mirror.test/en/austria", "http://gazette.test/zh/china"):
        if url in documents:
            root = lxml.html.fromstring(get(web_port, url)[2])
            shown = {(a.text_content(), a.get("href")) for a in root.iter("a")}
            assert shown >= {(link["anchor"], link["url"]) for link in documents[url]["links"]}


def test_a_longer_name_wins_the_place_of_a_shorter_one():
    links = [{"anchor": name, "url": f"http://atlas.test/{i}"} for i, name in enumerate(("Guinea", "Papua New Guinea"))]
    row = {"url": "http://atlas.test/x", "title": "T", "lang": "en", "links": links}
    page = render_page(row | {"text": "Papua New Guinea & Guineans & Guinea."})
    assert (
        '<p><a href="http://atlas.test/1">Papua New Guinea</a> &amp; Guineans &amp; <a href="http://atlas.test/0">Guinea</a>.</p>'
        in page
    )


def test_markup_in_a_document_stays_text():
    row = {"url": "http://library.test/x", "title": "<b>T</b>", "lang": "en", "links": []}
    page = render_page(row | {"text": "# <b>T</b>\n## a < b\n<script>alert(1)</script> & more"})
    assert "<script>" not in page and "<h2>a &lt; b</h2>" in page
    assert "<p>&lt;script&gt;alert(1)&lt;/script&gt; &amp; more</p>" in page


def test_absent_pages_and_hosts_are_404_and_the_down_host_is_503(web_port, documents):
    assert get(web_port, "http://atlas.test/en/atlantis")[0] == 404
    assert get(web_port, "http://nowhere.test/en/austria")[0] == 404
    down = next(url for url in documents if "//flaky.test/" in url)
    assert get(web_port, down)[0] == 503


def test_old_addresses_redirect(web_port):
    status, headers, _ = get(web_port, "http://atlas.test/en/republic_of_austria")
    assert (status, headers["Location"]) == (301, "/en/austria")


def test_the_slow_host_is_slow_and_does_not_hold_up_others(web_port, documents):
    slow = [url for url in documents if "//slow.test/" in url][:8]
    started = time.monotonic()
    with ThreadPoolExecutor(8) as pool:
        assert [reply[0] for reply in pool.map(lambda url: get(web_port, url), slow)] == [200] * 8
    assert 0.3 <= time.monotonic() - started < 8 * 0.3


def test_a_page_with_a_wrong_charset_is_still_readable(web_port, documents):
    url = "http://quickfacts.test/zh/china"
    page = fetched(web_port, url)
    assert page.charset == "utf-8"
    with pytest.raises(UnicodeDecodeError):
        page.body.decode("utf-8")
    assert extract_page(page).passages == text.passages(documents[url]["text"])


def test_one_page_is_too_large_to_read(web_port):
    assert len(get(web_port, "http://travelnotes.test/en/scrapbook")[2]) > 4 << 20


def test_it_runs_on_the_callers_own_event_loop(offline_web_dir):
    async def fetch() -> str:
        runner = aiohttp.web.AppRunner(make_offline_web_app(offline_web_dir))
        await runner.setup()
        await aiohttp.web.TCPSite(runner, "127.0.0.1", 0).start()
        try:
            async with aiohttp.ClientSession() as session:
                address = f"http://127.0.0.1:{runner.addresses[0][1]}/en/austria"
                async with session.get(address, headers={"Host": "atlas.test"}) as reply:
                    return await reply.text()
        finally:
            await runner.cleanup()

    assert "<title>Austria</title>" in asyncio.run(fetch())


def test_a_stopped_web_starts_again_and_frees_its_port(offline_web_dir):
    served = OfflineWebServer(offline_web_dir)
    served.stop()
    first = served.start()
    served.stop()
    with pytest.raises(OSError):
        get(first, "http://atlas.test/en/austria")
    assert get(served.start(), "http://atlas.test/en/austria")[0] == 200
    served.stop()


def test_a_missing_or_damaged_world_is_named(tmp_path):
    with pytest.raises(ToolHostError, match="sites.json does not exist; build the offline web first"):
        OfflineWebServer(tmp_path)
    (tmp_path / "sites.json").write_text('{"hosts": {}}')
    (tmp_path / "documents.jsonl").write_text('{"url": 3}\n')
    with pytest.raises(ToolHostError, match="documents.jsonl line 1 is not a document"):
        OfflineWebServer(tmp_path)
