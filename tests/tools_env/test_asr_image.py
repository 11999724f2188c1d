"""Speech and pictures: a stand-in endpoint that speaks the real protocol, and the offline recognisers themselves."""

import asyncio
import contextlib
import importlib.util
import io
import shutil
import struct
import time
import wave
import zlib

import pytest
from aiohttp import web

from tools_env.check import media_bench
from tools_env.errors import ToolError, ToolHostError
from tools_env.tools import analyze_image, arguments, asr
from tools_env.tools.base import CallContext

needs_sphinx = pytest.mark.skipif(importlib.util.find_spec("pocketsphinx") is None, reason="pocketsphinx not installed")
needs_tesseract = pytest.mark.skipif(shutil.which("tesseract") is None, reason="tesseract is not installed")
needs_pillow = pytest.mark.skipif(importlib.util.find_spec("PIL") is None, reason="pillow is not installed")


@pytest.fixture
def room(tmp_path):
    (tmp_path / "workspace").mkdir()
    return tmp_path


async def use(tool, room, seconds: float = 60, **given) -> str:
    arguments.check_arguments(tool.schema, given)
    return (await tool.run(CallContext(room, {}, time.monotonic() + seconds, 700), given)).text


@contextlib.asynccontextmanager
async def endpoint(answer):
    """An HTTP server; gives its address. `answer` takes a request and returns a response."""
    app = web.Application()
    app.router.add_post("/{path:.*}", answer)
    runner = web.AppRunner(app, access_log=None)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0, shutdown_timeout=0.1)
    await site.start()
    try:
        yield f"http://127.0.0.1:{runner.addresses[0][1]}/v1"
    finally:
        await runner.cleanup()


def silence(seconds: int = 1, rate: int = 16_000) -> bytes:
    out = io.BytesIO()
    with wave.open(out, "wb") as audio:
        audio.setnchannels(1)
        audio.setsampwidth(2)
        audio.setframerate(rate)
        audio.writeframes(b"\0\0" * rate * seconds)
    return out.getvalue()


def png(width: int, height: int) -> bytes:
    """The head of a PNG of this size with hardly anything behind it."""

    def chunk(name: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))

    head = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(b"\0" * 9)) + chunk(b"IEND", b"")


def test_speech_goes_to_the_endpoint_with_model_language_and_key(room, monkeypatch):
    monkeypatch.setenv("SPEECH_KEY", "key1")
    seen = {}

    async def answer(request):
        form = await request.post()
        seen.update(
            path=request.path, key=request.headers["Authorization"], **{n: form[n] for n in ("model", "language")}
        )
        seen["audio"] = form["file"].file.read()
        return web.json_response({"text": " Guten Tag. "})

    async def run():
        async with endpoint(answer) as url:
            tool = asr.build_tool({"url": url, "model": "speech", "key_variable": "SPEECH_KEY"}, None)
            (room / "workspace" / "a.mp3").write_bytes(b"audio")
            return await use(tool, room, path="a.mp3", language="de")

    assert asyncio.run(run()) == "Guten Tag."
    assert seen == {
        "path": "/v1/audio/transcriptions",
        "key": "Bearer key1",
        "model": "speech",
        "language": "de",
        "audio": b"audio",
    }


@needs_pillow
def test_a_picture_goes_to_the_endpoint_with_the_question(room):
    seen = {}

    async def answer(request):
        seen.update(await request.json(), path=request.path)
        return web.json_response({"choices": [{"message": {"content": "A cat."}}]})

    async def run():
        async with endpoint(answer) as url:
            tool = analyze_image.build_tool({"url": url, "model": "vision"}, None)
            (room / "workspace" / "a.png").write_bytes(png(3, 3))
            return await use(tool, room, path="a.png", question="What is it?")

    assert asyncio.run(run()) == "A cat."
    content = seen["messages"][0]["content"]
    assert seen["path"] == "/v1/chat/completions" and content[0]["text"] == "What is it?"
    assert content[1]["image_url"]["url"].startswith("data:image/png;base64,")


@pytest.mark.parametrize(
    ("status", "body", "message"),
    [(500, "x", "answered 500"), (302, "", "answered 302"), (200, "no json", "gave no JSON"), (200, "[]", "another reply"),
     (200, "{}", "gave no text")],
)  # fmt: skip
def test_what_an_endpoint_does_wrong_is_told_without_its_address(room, status, body, message):
    async def answer(request):
        return web.Response(
            status=status, text=body, headers={"Location": "http://127.0.0.1:1/"} if status == 302 else {}
        )

    async def run():
        async with endpoint(answer) as url:
            (room / "workspace" / "a.wav").write_bytes(b"audio")
            with pytest.raises(ToolError, match=message) as error:
                await use(asr.build_tool({"url": url, "model": "m"}, None), room, path="a.wav")
            assert "127.0.0.1" not in str(error.value)

    asyncio.run(run())


def test_a_slow_or_absent_endpoint_ends_with_the_call(room):
    async def answer(request):
        await asyncio.sleep(5)

    async def run():
        (room / "workspace" / "a.wav").write_bytes(b"audio")
        async with endpoint(answer) as url:
            started = time.monotonic()
            with pytest.raises(ToolError, match="too long"):
                await use(asr.build_tool({"url": url, "model": "m"}, None), room, seconds=0.8, path="a.wav")
            assert time.monotonic() - started < 3
        with pytest.raises(ToolError, match="cannot be reached"):
            await use(asr.build_tool({"url": url, "model": "m"}, None), room, path="a.wav")

    asyncio.run(run())


@pytest.mark.parametrize("module", [asr, analyze_image])
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"url": "http://a/v1"}, "both url"),
        ({"url": "file:///x", "model": "m"}, "both url"),
        ({"x": "y"}, "no option x"),
    ],
)
def test_wrong_options_are_refused(module, options, message):
    with pytest.raises(ToolHostError, match=message):
        module.build_tool(options, None)


def test_without_endpoint_and_recogniser_the_error_names_what_to_install(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ToolHostError, match="package pocketsphinx"):
        asr.build_tool({}, None)
    if shutil.which("prlimit"):
        monkeypatch.setattr(analyze_image.shutil, "which", lambda name: None)
        with pytest.raises(ToolHostError, match="apt-get install tesseract-ocr|package pillow"):
            analyze_image.build_tool({}, None)


@needs_sphinx
@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"no audio", "no WAV file"),
        (silence(rate=8_000)[:30], "no WAV file"),
        (silence(700, 4_000), "longer than 600 s"),
    ],
)
def test_audio_that_cannot_be_taken_is_told(room, content, message):
    (room / "workspace" / "a.wav").write_bytes(content)
    with pytest.raises(ToolError, match=message):
        asyncio.run(use(asr.build_tool({}, None), room, path="a.wav"))
    with pytest.raises(ToolError, match="English only"):
        asyncio.run(use(asr.build_tool({}, None), room, path="a.wav", language="zh"))


@needs_sphinx
@pytest.mark.skipif(shutil.which("flite") is None, reason="flite is not installed")
def test_clear_generated_speech_is_mostly_understood_and_the_weakness_is_told(room):
    said = "Researchers counted the birds on the island every spring."
    (room / "workspace" / "a.wav").write_bytes(media_bench.speak("flite rms", said))
    told, heard = asyncio.run(use(asr.build_tool({}, None), room, path="a.wav")).split("\n")
    assert told == asr.WEAK and media_bench.word_error_rate(said, heard) < 0.4


@needs_tesseract
@needs_pillow
def test_a_rendered_page_is_read_and_the_weakness_is_told(room):
    text, picture = media_bench.page(28)
    (room / "workspace" / "a.png").write_bytes(picture)
    told, read = asyncio.run(use(analyze_image.build_tool({}, None), room, path="a.png")).split("\n", 1)
    assert told == " ".join(analyze_image.WEAK.split("\n")) and media_bench.character_error_rate(text, read) < 0.03


@needs_tesseract
@needs_pillow
def test_a_picture_bomb_and_what_is_no_picture_are_refused(room):
    tool = analyze_image.build_tool({}, None)
    (room / "workspace" / "bomb.png").write_bytes(png(30_000, 30_000))
    (room / "workspace" / "wide.png").write_bytes(png(10_000, 5_000))
    (room / "workspace" / "text.png").write_bytes(b"text")
    for name, reason in (
        ("bomb.png", "pixels, at most|no picture"),
        ("wide.png", "pixels, at most"),
        ("text.png", "no picture"),
    ):
        with pytest.raises(ToolError, match=reason):
            asyncio.run(use(tool, room, path=name))


def test_error_rates_count_edits():
    assert media_bench.word_error_rate("one two three four", "one too three") == 0.5
    assert media_bench.character_error_rate("ab  cd", "ab\ncx") == 0.2
