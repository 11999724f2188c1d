"""`analyze_image`: describes an image of the workspace, by an endpoint's vision model or, without one, by tesseract."""

import asyncio
import base64
import contextlib
import functools
import io
import shutil
from typing import Any

from tools_env.errors import ToolError, ToolHostError
from tools_env.tools import endpoint, workspace
from tools_env.tools.base import CallContext, Tool, ToolOutput
from tools_env.tools.child import run_child

MAX_FILE_BYTES = 20 << 20
MAX_PIXELS = 40_000_000
FORMATS = {"PNG": "image/png", "JPEG": "image/jpeg", "WEBP": "image/webp", "GIF": "image/gif"}
WEAK = (
    "[offline: only printed text, read by tesseract; nothing else was looked at. Of clean "
    "rendered pages it got about 1 "
    "character in 100 wrong; noisy or slanted ones it does not read]"
)
SCHEMA = {
    "type": "object",
    "properties": {
        "path": {"type": "string", "minLength": 1, "description": "picture, relative to the workspace"},
        "question": {"type": "string", "description": "what to find out; default: describe it"},
    },
    "required": ["path"],
}


async def run_analyze_image(
    model: endpoint.Endpoint | None, call: CallContext, arguments: dict[str, Any]
) -> ToolOutput:
    """Runs the tool; `model` None uses tesseract."""
    name = workspace.shown(arguments["path"])
    content = await asyncio.to_thread(workspace.read_bytes, call.workspace, name, MAX_FILE_BYTES)
    media_type = picture_media_type(content)
    seconds = call.seconds_left() - 0.5
    if model is None:
        return ToolOutput(f"{WEAK}\n{await recognize_text(content, seconds) or 'No text was found.'}")
    picture = f"data:{media_type};base64,{base64.b64encode(content).decode()}"
    question = arguments.get("question") or "Describe this picture and write down all text in it."
    message = [{"type": "text", "text": question}, {"type": "image_url", "image_url": {"url": picture}}]
    body = {"model": model.model, "messages": [{"role": "user", "content": message}]}
    reply = await model.post("/chat/completions", seconds, json=body)
    try:
        return ToolOutput(str(reply["choices"][0]["message"]["content"]).strip())
    except (KeyError, IndexError, TypeError):
        raise ToolError("the model's endpoint gave no text") from None


def picture_media_type(content: bytes) -> str:
    """Returns the media type of an image from its header. Raises ToolError, also for too many pixels."""
    from PIL import Image, UnidentifiedImageError

    try:
        with Image.open(io.BytesIO(content), formats=list(FORMATS)) as picture:
            width, height = picture.size
            media_type = FORMATS[picture.format or ""]
    except (UnidentifiedImageError, OSError, ValueError, KeyError, SyntaxError, Image.DecompressionBombError):
        raise ToolError(f"no picture that can be read; known are {', '.join(FORMATS)}") from None
    if width * height > MAX_PIXELS:
        raise ToolError(f"the picture has {width} x {height} pixels, at most {MAX_PIXELS:,} in all are read")
    return media_type


async def recognize_text(content: bytes, seconds: float, languages: str = "") -> str:
    """Returns the printed text of an image by tesseract; default: English and Chinese where installed."""
    languages = languages or "+".join(await _languages())
    limits = ["prlimit", f"--as={4 << 30}", "--cpu=60", "--fsize=0", "--"]
    command = [*limits, "tesseract", "stdin", "stdout", "-l", languages]
    environment = {"PATH": "/usr/local/bin:/usr/bin:/bin", "OMP_THREAD_LIMIT": "1", "LANG": "C.UTF-8"}
    too_slow = "the picture takes too long to read; cut it"
    status, out = await run_child(command, content, seconds, environment, too_slow)
    if status != 0:
        raise ToolError("the picture could not be read")
    return out.decode(errors="replace").strip()


async def _languages() -> list[str]:
    process = await asyncio.create_subprocess_exec(
        "tesseract", "--list-langs", stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.STDOUT
    )
    out, _ = await process.communicate()
    found = [line.strip() for line in out.decode().splitlines()[1:]]
    return [name for name in ("eng", "chi_sim") if name in found] or ["eng"]


def build_tool(options: dict[str, Any], resources: contextlib.AsyncExitStack) -> Tool:
    """Returns the tool for a host. `options`: url, model, key_variable of an endpoint. Raises ToolHostError."""
    model = endpoint.read_endpoint_options("analyze_image", options)
    try:
        import PIL  # noqa: F401
    except ImportError:
        raise ToolHostError("analyze_image needs the package pillow; install it (pip install pillow)") from None
    if model is None and (shutil.which("tesseract") is None or shutil.which("prlimit") is None):
        raise ToolHostError(
            "analyze_image needs an endpoint (options url and model), or tesseract: apt-get install tesseract-ocr"
        )
    return Tool(
        name="analyze_image",
        description="Say what a picture of the workspace shows."
        + ("" if model else " Offline: only its printed text, nothing else."),
        schema=SCHEMA,
        run=functools.partial(run_analyze_image, model),
    )
