"""Error rates of offline speech and text recognition on generated speech and rendered pages.

python -m tools_env.check.media_bench

Speech: espeak-ng and flite, where installed. Pages: text drawn by Pillow at several sizes, clean and noisy.
"""

import asyncio
import io
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from rapidfuzz.distance import Levenshtein

from tools_env.errors import ToolError
from tools_env.tools import analyze_image, asr

SENTENCES = (
    "The capital of Austria is Vienna.",
    "Researchers counted the birds on the island every spring.",
    "The price of oil fell by three percent last week.",
    "A new bridge across the river was opened in October.",
    "Many people learn a second language at school.",
    "The report was written by a group of five experts.",
    "Heavy rain closed the mountain road for two days.",
    "The museum shows paintings from the last century.",
)
VOICES = {
    "flite rms": ["flite", "-voice", "rms", "-o", "{file}", "-t", "{text}"],
    "flite kal16": ["flite", "-voice", "kal16", "-o", "{file}", "-t", "{text}"],
    "espeak-ng 140 words a minute": ["espeak-ng", "-s", "140", "-w", "{file}", "{text}"],
}


def word_error_rate(said: str, heard: str) -> float:
    """Returns the word error rate: word edits per word said."""
    words = [re.findall(r"[\w']+", text.lower()) for text in (said, heard)]
    return Levenshtein.distance(*words) / max(len(words[0]), 1)


def character_error_rate(shown: str, read: str) -> float:
    """Returns the character error rate; white space counts as one space."""
    one, two = (" ".join(text.split()) for text in (shown, read))
    return Levenshtein.distance(one, two) / max(len(one), 1)


def speak(voice: str, text: str) -> bytes | None:
    """Returns WAV of `text`, or None where the program is missing."""
    command = VOICES[voice]
    if shutil.which(command[0]) is None:
        return None
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "speech.wav")
        subprocess.run([part.format(file=file, text=text) for part in command], check=True, capture_output=True)
        return file.read_bytes()


def page(size: int, noise: bool = False) -> tuple[str, bytes]:
    """Returns (text, PNG) of a page in letters of `size` pixels."""
    import numpy as np
    from PIL import Image, ImageDraw, ImageFont

    text = "\n".join(SENTENCES)
    picture = Image.new("L", (40 * size, (len(SENTENCES) + 2) * 2 * size), 255)
    font = ImageFont.load_default(size)
    ImageDraw.Draw(picture).multiline_text((size, size), text, fill=0, font=font, spacing=size // 2)
    if noise:
        values = np.asarray(picture) + np.random.default_rng(0).normal(0, 90, picture.size[::-1])
        picture = Image.fromarray(values.clip(0, 255).astype("uint8")).rotate(3, fillcolor=255)
    out = io.BytesIO()
    picture.save(out, "PNG")
    return text, out.getvalue()


async def _main() -> None:
    print("| speech | words wrong |\n|---|---|")
    for voice in VOICES:
        rates = []
        for text in SENTENCES:
            if (wav := speak(voice, text)) is None:
                break
            rates.append(word_error_rate(text, await asr.recognize_speech(wav, 120)))
        print(f"| {voice} | {sum(rates) / len(rates):.0%} |" if rates else f"| {voice} | not installed |")
    print("\n| page | characters wrong |\n|---|---|")
    for size, noise in ((12, False), (16, False), (28, False), (28, True)):
        text, png = page(size, noise)
        rate = character_error_rate(text, await analyze_image.recognize_text(png, 60, "eng"))
        print(f"| {size} pixels, {'noise and 3 degrees' if noise else 'clean'} | {rate:.1%} |")


def main() -> int:
    try:
        asyncio.run(_main())
    except (ToolError, FileNotFoundError) as error:
        print(f"media_bench: {error}; install pocketsphinx and tesseract-ocr", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
