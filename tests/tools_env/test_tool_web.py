"""Facts about opening pages over real HTTP."""

import asyncio
import contextlib
import gzip
import time
import tracemalloc
import zlib

import pytest
from aiohttp import web

from tools_env.errors import ToolError
from tools_env.web import page
from tools_env.web.charset import decode_body
from tools_env.web.egress import EgressPolicy
from tools_env.web.fetch import FetchedPage, Fetcher


async def opened(it, *urls, session=None, call_id="0.0"):
    session = session or await it.client.open_session("e")
    return await session.call("batch_web_surfer", {"urls": list(urls)}, call_id=call_id)


def test_opened_passages_have_the_ids_that_search_gave_them(running):
    async def main():
        async with running() as it:
            session = await it.client.open_session("e")
            found = await session.call("batch_web_surfer", {"queries": ["Austria"], "topk": 10}, call_id="0")
            known = {(s.url, s.text): s.id for s in found.sources if s.url == "http://atlas.test/en/austria"}
            page = await opened(it, "http://atlas.test/en/austria", session=session, call_id="1")
            assert page.text.splitlines()[0] == "Austria | http://atlas.test/en/austria | 2025-03-01"
            assert {(s.url, s.text): s.id for s in page.sources} == known
            assert len(known) == 3 and {s.authority for s in page.sources} == {2}

    asyncio.run(main())


def test_a_link_with_tls_to_a_host_that_is_served_here_is_the_same_page(running):
    async def main():
        async with running() as it:
            plain = await opened(it, "http://atlas.test/en/austria")
            secure = await opened(it, "https://atlas.test/en/austria")
            port = await opened(it, "https://atlas.test:444/en/austria")
            assert secure.outcome == "ok" and [s.id for s in secure.sources] == [s.id for s in plain.sources]
            assert port.outcome == "tool_error"

    asyncio.run(main())


def test_citation_id_opens_its_page_only_after_it_was_shown(running):
    async def main():
        async with running() as it:
            session = await it.client.open_session("e")
            found = await session.call("batch_web_surfer", {"queries": ["capital of Austria"]}, call_id="0")
            by_id = await opened(it, found.sources[0].id, session=session, call_id="1")
            assert by_id.text.startswith("Austria | http://atlas.test/en/austria")
            stranger = await opened(it, found.sources[0].id)
            assert stranger.outcome == "tool_error" and "not a citation shown in this session" in stranger.text

    asyncio.run(main())


def test_every_item_fails_for_itself(running):
    async def main():
        async with running(fetch_timeout=0.3, max_page_bytes=100_000, max_observation_chars=5000) as it:
            it.site.failures = 1
            reasons = {
                "http://atlas.test/none": "HTTP 404",
                "http://flaky.test/good": "HTTP 503",
                "http://slow.test/good": "timed out",
                "http://atlas.test/loop": "too many redirects",
                "http://atlas.test/picture": "unsupported type image/png",
                "http://atlas.test/huge": "larger than 100000 bytes",
                "http://nowhere.test/": "unknown host",
                "http://atlas.test/inside": "unknown host",
                "not a url": "not an http address",
            }
            mixed = await opened(it, *reasons, "http://atlas.test/old")
            assert mixed.outcome == "ok" and not mixed.cache_hit
            for url, reason in reasons.items():
                assert f"{url}: {reason}" in mixed.text.splitlines()
            for url, reason in list(reasons.items())[:2]:
                it.site.failures = 1
                alone = await opened(it, url)
                assert (alone.outcome, alone.text) == ("tool_error", f"{url}: {reason}")

    asyncio.run(main())


def test_failure_is_not_cached(running):
    async def main():
        async with running() as it:
            it.site.failures = 1
            session = await it.client.open_session("e")
            first = await opened(it, "http://flaky.test/good", session=session, call_id="0")
            second = await opened(it, "http://flaky.test/good", session=session, call_id="1")
            third = await opened(it, "http://flaky.test/good", session=session, call_id="2")
            assert [r.outcome for r in (first, second, third)] == ["tool_error", "ok", "ok"]
            assert [r.cache_hit for r in (first, second, third)] == [False, False, True]
            assert len(it.site.requests) == 2

    asyncio.run(main())


def test_redirect_leads_to_the_final_address_without_fragment(running):
    async def main():
        async with running() as it:
            for spelling in ("http://atlas.test/old", "atlas.test/old#x", " HTTP://ATLAS.test:80/old "):
                result = await opened(it, spelling)
                assert {s.url for s in result.sources} == {"http://atlas.test/en/austria"}

    asyncio.run(main())


def test_charset_of_the_document_is_respected(running):
    async def main():
        async with running() as it:
            result = await opened(it, "http://atlas.test/gbk")
            assert result.sources[0].text == "奥地利的首都是维也纳。" and result.sources[0].title == "奥地利"

    asyncio.run(main())


def test_page_without_main_element_is_extracted(running):
    async def main():
        async with running() as it:
            result = await opened(it, "http://atlas.test/plainhtml")
            assert len(result.sources) == 5

    asyncio.run(main())


def test_long_page_is_stored_and_summarised_and_readable_to_its_end(running):
    async def main():
        async with running() as it:
            session = await it.client.open_session("e")
            long = await opened(it, "http://atlas.test/long", session=session, call_id="0")
            assert long.truncated and len(long.text) <= 700
            assert long.text.startswith("Long | http://atlas.test/long\nLine 0 says")
            assert all(f"\\cite{{{s.id}}}" in long.text for s in long.sources)
            path = long.text.split("stored in ")[1].split(";")[0]
            whole, offset, seen = "", 0, set()
            for turn in range(1, 40):
                arguments = {"op": "read", "path": path, "offset": offset}
                part = await session.call("file", arguments, call_id=str(turn))
                assert len(part.text) <= 700
                seen |= {s.text for s in part.sources}
                body, _, note = part.text.partition("\n... ")
                whole += body + "\n"
                if not note:
                    break
                offset = int(note.rsplit(" ", 1)[1])
            assert "Line 99 says that 99 is a number." in whole and len(seen) == 100
            again = await opened(it, "http://atlas.test/long")
            assert again.text == long.text

    asyncio.run(main())


def test_summary_of_several_pages_shows_something_of_each(running):
    async def main():
        async with running() as it:
            result = await opened(
                it, "http://atlas.test/long", "http://atlas.test/none", "http://atlas.test/en/austria"
            )
            assert "Line 0 says" in result.text and "The capital of Austria is Vienna." in result.text
            assert "http://atlas.test/none: HTTP 404" in result.text and len(result.text) <= 700

    asyncio.run(main())


def test_cache_file_outlives_the_host_and_can_be_replayed(running, tmp_path):
    async def main():
        async with running(state_dir=str(tmp_path)) as it:
            first = await opened(it, "http://atlas.test/en/austria")
        async with running(state_dir=str(tmp_path), cache_mode="replay_only") as it:
            again = await opened(it, "http://atlas.test/en/austria")
            missed = await opened(it, "http://atlas.test/long")
            assert again.text == first.text and again.cache_hit and not it.site.requests
            assert missed.text == "http://atlas.test/long: not in the replayed cache"

    asyncio.run(main())


def test_pdf_paragraphs_are_read():
    lines = [
        (700, "The capital of Austria is Vienna."),
        (680, "It lies on the Danube and"),
        (660, "has two million people."),
    ]
    text = "".join(f"BT /F1 12 Tf 50 {y} Td ({line}) Tj ET\n" for y, line in lines)
    objects = [
        "<< /Type /Catalog /Pages 2 0 R >>",
        "<< /Type /Pages /Kids [3 0 R] /Count 1 >>",
        "<< /Type /Page /Parent 2 0 R /MediaBox [0 0 612 792] /Contents 4 0 R /Resources << /Font << /F1 5 0 R >> >> >>",
        f"<< /Length {len(text)} >>\nstream\n{text}endstream",
        "<< /Type /Font /Subtype /Type1 /BaseFont /Helvetica >>",
    ]
    body = "%PDF-1.4\n" + "".join(f"{i} 0 obj\n{o}\nendobj\n" for i, o in enumerate(objects, 1))
    body += "trailer << /Root 1 0 R /Size 6 >>\n%%EOF\n"
    read = page.extract_page(FetchedPage("http://atlas.test/a.pdf", "application/pdf", None, body.encode()))
    assert read.passages == [
        "The capital of Austria is Vienna.",
        "It lies on the Danube and has two million people.",
    ]
    with pytest.raises(ToolError, match="unreadable PDF"):
        page.extract_page(FetchedPage("http://atlas.test/a.pdf", "application/pdf", None, b"no pdf"))


@pytest.mark.parametrize("body", [b"", b"<", b"\x00\xff", b"<html></html>", b"<?xml version='1.0' encoding='x'?><p>hi"])
def test_broken_html_is_never_a_fault(body):
    page.extract_page(FetchedPage("http://atlas.test/", "text/html", "no-such-charset", body))


@contextlib.asynccontextmanager
async def odd_server(replies: dict[bytes, bytes], slow: frozenset = frozenset()):
    """Yields a fetcher of atlas.test, whose server writes the bytes of `replies` by path, some of them drop by drop."""

    async def talk(reader, writer):
        with contextlib.suppress(ConnectionError, asyncio.IncompleteReadError):
            path = (await reader.readuntil(b"\r\n\r\n")).split(b" ")[1]
            if path in slow:
                for i in range(len(replies[path])):
                    writer.write(replies[path][i : i + 1])
                    await writer.drain()
                    await asyncio.sleep(0.05)
            writer.write(replies.get(path, b"HTTP/1.1 404 no\r\nContent-Length: 0\r\n\r\n"))
            await writer.drain()
        writer.close()

    server = await asyncio.start_server(talk, "127.0.0.1", 0)
    port = server.sockets[0].getsockname()[1]
    fetcher = Fetcher(EgressPolicy(["atlas.test"], port), timeout=1.0, max_bytes=100_000)
    try:
        yield fetcher
    finally:
        await fetcher.close()
        server.close()


def reply(body: bytes, *headers: str, kind: str | None = "text/html", status: str = "200 ok") -> bytes:
    lines = [f"HTTP/1.1 {status}", "Connection: close", *([f"Content-Type: {kind}"] if kind else []), *headers, "", ""]
    return "\r\n".join(lines).encode() + body


LINE = b"<p>The capital of Austria is Vienna.</p>"
BOMB = gzip.compress(b"x" * 50_000_000)


@pytest.mark.parametrize(
    ("answer", "why"),
    [
        (reply(BOMB, "Content-Encoding: gzip"), "larger than 100000 bytes"),
        (reply(zlib.compress(b"x" * 50_000_000), "Content-Encoding: deflate"), "larger than 100000 bytes"),
        (reply(gzip.compress(BOMB), "Content-Encoding: gzip, gzip"), "packed more than once"),
        (reply(LINE, "Content-Encoding: br"), "unsupported encoding br"),
        (reply(LINE, "Content-Encoding: gzip"), "broken reply"),
        (reply(LINE, "X: " + "y" * 100_000), "broken reply"),
        (reply(LINE, *(f"X{i}: y" for i in range(5000))), "broken reply"),
        (reply(LINE, "Content-Length: 5000"), "broken reply"),
        (reply(LINE, "Transfer-Encoding: chunked"), "broken reply"),
        (b"SSH-2.0-OpenSSH_9.2\r\n", "broken reply"),
        (b"", "cannot connect"),
        (reply(LINE, kind="image/png"), "unsupported type image/png"),
        (reply(b"\x89PNG\r\n\x1a\n\0\0\0\0", kind="text/html"), "not text/html, as it says"),
        (reply(b"\x89PNG\r\n\x1a\n\0\0\0\0", kind=None), "unsupported type application/octet-stream"),
        (reply(b"", "Location: /loop", status="302 Found"), "too many redirects"),
        (reply(b"<meta http-equiv=refresh content='0;url=/loop2'>"), "too many redirects"),
    ],
)
def test_hostile_and_broken_replies_fail_for_themselves(answer, why):
    async def main():
        tracemalloc.start()
        async with odd_server({b"/loop": answer, b"/loop2": answer.replace(b"loop2", b"loop")}) as fetcher:
            with pytest.raises(ToolError, match=why):
                await fetcher.fetch("http://atlas.test/loop")
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert peak < 5_000_000

    asyncio.run(main())


def test_a_server_that_drips_is_left_in_time():
    async def main():
        async with odd_server({b"/": reply(LINE)}, slow=frozenset({b"/"})) as fetcher:
            with pytest.raises(ToolError, match="timed out"):
                await fetcher.fetch("http://atlas.test/")

    asyncio.run(main())


@pytest.mark.parametrize(
    ("answer", "kind"),
    [
        (reply(gzip.compress(LINE), "Content-Encoding: gzip"), "text/html"),
        (reply(zlib.compress(LINE), "Content-Encoding: deflate"), "text/html"),
        (reply(zlib.compress(LINE, wbits=-15), "Content-Encoding: deflate"), "text/html"),
        (reply(b"<!DOCTYPE html>" + LINE, kind=None), "text/html"),
        (reply(b" <html>" + LINE, kind="text/plain"), "text/html"),
        (reply(b"%PDF-1.4 x", kind="application/octet-stream"), "application/pdf"),
        (reply(b"%PDF-1.4 x", kind="text/html"), "application/pdf"),
        (reply(LINE, kind="text/plain; charset=utf-8"), "text/plain"),
        (reply(b"<meta http-equiv=refresh content='300'>" + LINE), "text/html"),
        (reply(b"<meta http-equiv=refresh content='0; url=/'>" + LINE), "text/html"),
        (reply(b"<noscript><meta http-equiv=refresh content='0; url=/none'></noscript>" + LINE), "text/html"),
    ],
)
def test_odd_but_honest_replies_are_read(answer, kind):
    async def main():
        async with odd_server({b"/": answer}) as fetcher:
            found = await fetcher.fetch("http://atlas.test/")
        assert found.media_type == kind and (LINE in found.body or found.body.startswith(b"%PDF"))

    asyncio.run(main())


def test_redirects_by_header_by_page_and_behind_a_cookie_are_followed():
    async def main():
        moved = "301 Moved"
        replies = {
            b"/a/old": reply(b"", "Location: ../b?x=1", "Set-Cookie: seen=1", status=moved),
            b"/b?x=1": reply(b"<META content='2;URL=&quot;c&quot;' HTTP-EQUIV='refresh'>".replace(b"&quot;", b"")),
            b"/c": reply(LINE),
        }
        async with odd_server(replies) as fetcher:
            assert (await fetcher.fetch("http://atlas.test/a/old")).url == "http://atlas.test/c"

    asyncio.run(main())


def test_a_cookie_comes_back_within_a_page_and_is_forgotten_after_it():
    async def main():
        async def answer(request):
            if "seen" in request.cookies:
                return web.Response(text=LINE.decode(), content_type="text/html")
            return web.Response(status=302, headers={"Location": "/", "Set-Cookie": "seen=1"})

        app = web.Application()
        app.router.add_get("/", answer)
        runner = web.AppRunner(app, access_log=None)
        await runner.setup()
        await web.TCPSite(runner, "127.0.0.1", 0).start()
        fetcher = Fetcher(EgressPolicy(["atlas.test"], runner.addresses[0][1]), max_redirects=1)
        for _ in range(2):
            assert (await fetcher.fetch("http://atlas.test/")).body == LINE
        await fetcher.close()
        await runner.cleanup()

    asyncio.run(main())


ZH = "奥地利的首都是维也纳。这个国家的货币是欧元，邻国有匈牙利。"
TW = "奧地利的首都是維也納。這個國家的貨幣是歐元，鄰國有匈牙利。"
FR = "L'été dernier, la république a été visitée à Orléans par des élèves français, où ils étaient émerveillés."
JA = "オーストリアの首都はウィーンです。通貨はユーロです。"
RU = "Столица Австрии Вена. Валюта этой страны евро, а соседи Венгрия и Италия."


@pytest.mark.parametrize("declared", [None, "no-such-charset", "base64", "idna", "ascii; x"])
@pytest.mark.parametrize(
    ("said", "charset"),
    [
        *((ZH, name) for name in ("utf-8", "gbk", "gb18030", "utf-16", "utf-8-sig")),
        *((TW, name) for name in ("utf-8", "big5")),
        *((FR, name) for name in ("utf-8", "latin-1", "cp1252")),
        *((JA, name) for name in ("shift-jis", "euc-jp")),
        (RU, "koi8-r"),
        (RU, "cp1251"),
    ],
)
def test_charset_is_found_without_a_true_declaration(said, charset, declared):
    assert decode_body(f"<main><p>{said}</p></main>".encode(charset), declared) == f"<main><p>{said}</p></main>"


@pytest.mark.parametrize(
    ("charset", "declared"),
    [("gbk", "utf-8"), ("utf-8", "gbk"), ("utf-8", "iso-8859-1"), ("gb18030", "gb2312"), ("utf-8", "big5")],
)
def test_a_wrong_declaration_does_no_harm(charset, declared):
    assert decode_body(f"<main><p>{ZH}</p></main>".encode(charset), declared) == f"<main><p>{ZH}</p></main>"


def test_one_broken_byte_does_not_change_the_charset():
    for said, charset in ((FR, "utf-8"), (ZH * 8, "gbk")):
        body = said.encode(charset) + b"\xff!"
        assert decode_body(body, charset).startswith(said) and decode_body(body, None).startswith(said)


@pytest.mark.parametrize(
    "body",
    [
        b"<div>" * 20_000 + b"text that is deep below",
        b"<main>" + b"<div>" * 3000 + b"text that is deep below",
        b"<p>text that is deep below" + b"<a href=x>Some</a> " * 100_000,
        b"<table><tr><td>text that is deep below<td></b></p></div>",
        b"<html><body><p <b>text that is deep below<!-- never closed",
    ],
    ids=["deep", "deep main", "links", "tags", "comment"],
)
def test_invalid_and_huge_html_is_read_in_time(body):
    began = time.monotonic()
    passages = page.extract_page(FetchedPage("http://atlas.test/", "text/html", None, body)).passages
    assert any("text that is deep below" in passage for passage in passages) and time.monotonic() - began < 5


def test_tables_lists_and_quotes_become_lines():
    body = (
        "<main><h1>Facts</h1><ul><li>first <b>one</b></li><li>second one</li></ul>"
        "<table><tr><th>Country<th>Capital<tr><td>Austria<td>Vienna</table><pre>a line\nof code</pre><script>no</script></main>"
    )
    read = page.extract_page(FetchedPage("http://atlas.test/", "text/html", None, body.encode()))
    assert read.passages == ["first one", "second one", "Country | Capital", "Austria | Vienna", "a line of code"]
