"""The implicit-context rule: a long result goes to a file, its summary and its path go to the model.

The summary keeps whole lines: of each block (one query, one page) its head and its first passages, the blocks sharing
the space evenly. Nothing is lost: the file tool pages through the rest.
"""

import hashlib
import re
from pathlib import Path

from tools_env.search.citations import syllables

FOLDER = "results"
_MARK = re.compile(r" \\cite\{\w+\}$")


def store(workspace: Path, text: str) -> str:
    """Stores a result and returns its path inside the workspace; equal texts get equal paths."""
    name = f"{FOLDER}/{syllables(hashlib.sha256(text.encode()).digest(), 3)}.md"
    path = workspace / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")
    return name


def shorten(text: str, blocks: list[str], path: str, max_chars: int) -> str:
    """Returns at most about `max_chars` characters: the start of every block and where the whole text lies."""
    tail = f"... {len(text)} characters stored in {path}; read with file"
    room = max(max_chars - len(tail) - 1, 0)
    kept = []
    for position, block in enumerate(blocks):
        share = room // (len(blocks) - position)
        part = whole_lines(block, share)
        if part:
            kept.append(part)
            room -= len(part) + 1
    return "\n".join([*kept, tail])


def whole_lines(text: str, max_chars: int) -> str:
    """Returns the longest prefix of whole lines within `max_chars`.

    A long first passage is cut, its citation kept, rather than leaving nothing but the head.
    """
    if len(text) <= max_chars:
        return text
    end = text.rfind("\n", 0, max_chars + 1)
    kept = text[:end] if end > 0 else ""
    room = max_chars - len(kept) - 1
    if "\n" in kept or room < 40:
        return kept
    line = text[len(kept) :].lstrip("\n").split("\n", 1)[0]
    mark = _MARK.search(line)
    end_mark = "..." + (mark.group() if mark else "")
    return "\n".join(filter(None, [kept, line[: room - len(end_mark)] + end_mark]))
