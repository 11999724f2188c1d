"""`asr`: transcribes audio of the workspace, by an endpoint's /audio/transcriptions or, without one, by pocketsphinx.

python -m tools_env.tools.asr < FILE.wav     the offline recognizer alone, in a process as the tool runs it
"""

import asyncio
import contextlib
import functools
import importlib.util
import io
import json
import resource
import sys
import wave
from typing import Any

import aiohttp

from tools_env.errors import ToolError, ToolHostError
from tools_env.tools import endpoint, workspace
from tools_env.tools.base import CallContext, Tool, ToolOutput
from tools_env.tools.child import run_child

MAX_FILE_BYTES = 25 << 20
MAX_SECONDS = 600  # of audio, offline
RATE = 16_000
WEAK = "[offline recogniser, English only, weak: of generated speech it got 6 to 81 words in 100 wrong, by the voice]"
SCHEMA = {
    "type": "object",
    "properties": {
        "path": {"type": "string", "minLength": 1, "description": "audio file, relative to the workspace"},
        "language": {"type": "string", "description": "two letters, such as en or zh, when known"},
    },
    "required": ["path"],
}


async def run_asr(model: endpoint.Endpoint | None, call: CallContext, arguments: dict[str, Any]) -> ToolOutput:
    """Runs the tool; `model` None uses pocketsphinx."""
    name = workspace.shown(arguments["path"])
    content = await asyncio.to_thread(workspace.read_bytes, call.workspace, name, MAX_FILE_BYTES)
    if model is None:
        if arguments.get("language", "en") != "en":
            raise ToolError("this host has no speech model but the offline one, which knows English only")
        return ToolOutput(
            f"{WEAK}\n{await recognize_speech(content, call.seconds_left() - 0.5) or 'No speech was recognised.'}"
        )
    form = aiohttp.FormData()
    form.add_field("model", model.model)
    form.add_field("file", content, filename=name.rpartition("/")[2], content_type="application/octet-stream")
    if "language" in arguments:
        form.add_field("language", arguments["language"])
    reply = await model.post("/audio/transcriptions", call.seconds_left() - 0.5, data=form)
    if not isinstance(reply.get("text"), str):
        raise ToolError("the model's endpoint gave no text")
    return ToolOutput(reply["text"].strip() or "No speech was recognised.")


async def recognize_speech(content: bytes, seconds: float) -> str:
    """Returns the words that pocketsphinx recognizes in a WAV file. Raises ToolError."""
    command = [sys.executable, "-m", "tools_env.tools.asr"]
    environment = {"PATH": "/usr/bin:/bin", "PYTHONPATH": ":".join(sys.path), "OPENBLAS_NUM_THREADS": "1"}
    too_slow = "the recording takes too long to recognise; give a shorter one"
    _, out = await run_child(command, content, seconds, environment, too_slow)
    try:
        answer = json.loads(out)
    except ValueError:
        raise ToolError("the recording could not be read") from None
    if "error" in answer:
        raise ToolError(answer["error"])
    return answer["text"]


def _samples(content: bytes) -> bytes:
    """Returns 16-bit mono samples at 16 kHz of a WAV file."""
    import numpy as np

    try:
        with wave.open(io.BytesIO(content)) as audio:
            width, channels, rate = audio.getsampwidth(), audio.getnchannels(), audio.getframerate()
            if width != 2 or not 4_000 <= rate <= 200_000:
                raise ToolError("expected WAV of 16-bit samples; convert it (ffmpeg -i IN -ar 16000 -ac 1 OUT.wav)")
            if audio.getnframes() > MAX_SECONDS * rate:
                raise ToolError(f"the recording is longer than {MAX_SECONDS} s; cut it")
            frames = np.frombuffer(audio.readframes(MAX_SECONDS * rate), "<i2")
    except (wave.Error, EOFError):
        raise ToolError("no WAV file; convert it (ffmpeg -i IN -ar 16000 -ac 1 OUT.wav)") from None
    mono = frames[: len(frames) // channels * channels].reshape(-1, channels).mean(axis=1)
    if rate != RATE and len(mono):
        mono = np.interp(np.arange(0, len(mono), rate / RATE), np.arange(len(mono)), mono)
    return mono.astype("<i2").tobytes()


def main() -> int:
    """Reads WAV from standard input and prints one JSON object."""
    resource.setrlimit(resource.RLIMIT_AS, (4 << 30, 4 << 30))
    resource.setrlimit(resource.RLIMIT_CPU, (300, 300))
    try:
        samples = _samples(sys.stdin.buffer.read())
        import pocketsphinx

        decoder = pocketsphinx.Decoder(samprate=RATE, loglevel="FATAL")
        decoder.start_utt()
        decoder.process_raw(samples, full_utt=True)
        decoder.end_utt()
        found = decoder.hyp()
        answer = {"text": found.hypstr if found else ""}
    except ToolError as error:
        answer = {"error": str(error)}
    sys.stdout.write(json.dumps(answer))
    return 0


def build_tool(options: dict[str, Any], resources: contextlib.AsyncExitStack) -> Tool:
    """Returns the tool for a host. `options`: url, model, key_variable of an endpoint. Raises ToolHostError."""
    model = endpoint.read_endpoint_options("asr", options)
    if model is None and importlib.util.find_spec("pocketsphinx") is None:
        raise ToolHostError("asr needs an endpoint (options url and model) or the package pocketsphinx; install it")
    return Tool(
        name="asr",
        description="Write down the speech of an audio file of the workspace."
        + ("" if model else " Offline, English, WAV only; many words will be wrong."),
        schema=SCHEMA,
        run=functools.partial(run_asr, model),
    )


if __name__ == "__main__":
    sys.exit(main())
