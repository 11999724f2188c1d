"""Facts about opening pages over real HTTP."""

import asyncio

import pytest

from tools_env import page
from tools_env.errors import ToolError
from tools_env.fetch import Fetched


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
    read = page.read(Fetched("http://atlas.test/a.pdf", "application/pdf", None, body.encode()))
    assert read.passages == [
        "The capital of Austria is Vienna.",
        "It lies on the Danube and has two million people.",
    ]
    with pytest.raises(ToolError, match="unreadable PDF"):
        page.read(Fetched("http://atlas.test/a.pdf", "application/pdf", None, b"no pdf"))


@pytest.mark.parametrize("body", [b"", b"<", b"\x00\xff", b"<html></html>", b"<?xml version='1.0' encoding='x'?><p>hi"])
def test_broken_html_is_never_a_fault(body):
    page.read(Fetched("http://atlas.test/", "text/html", "no-such-charset", body))
