"""The implicit-context rule: a long result is stored in a file; the model gets its beginning and its path.

The shortened text keeps whole lines: the head and the first passages of each block (one query, one page), with the
space divided evenly between blocks. The file tool reads the rest.
"""

import hashlib
import re
from pathlib import Path

from tools_env.errors import ToolError
from tools_env.search.citations import syllables
from tools_env.tools import workspace

FOLDER = "results"
_MARK = re.compile(r" \\cite\{\w+\}$")


def store_result(folder: Path, text: str) -> str:
    """Stores a result in a workspace and returns its path, "" on failure; equal texts get equal paths."""
    name = f"{FOLDER}/{syllables(hashlib.sha256(text.encode()).digest(), 3)}.md"
    try:
        workspace.replace(folder, name, text.encode())
    except ToolError:  # the shell may have made the folder unusable; the beginning is still shown
        return ""
    return name


def shorten_result(text: str, blocks: list[str], path: str, max_chars: int) -> str:
    """Returns at most about `max_chars` characters: the start of every block and the path of the whole text."""
    where = f"stored in {path}; read with file" if path else "in all; the rest could not be stored in the workspace"
    tail = f"... {len(text)} characters {where}"
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

    It does not end with the head of an omitted passage. When not even the first passage fits, that passage is cut and
    keeps its citation.
    """
    if len(text) <= max_chars:
        return text
    end = text.rfind("\n", 0, max_chars + 1)
    kept = text[:end].split("\n") if end > 0 else []
    if any(_MARK.search(line) for line in kept):
        while not _MARK.search(kept[-1]):
            kept.pop()
        return "\n".join(kept)
    room = max_chars - sum(len(line) + 1 for line in kept)
    following = text.split("\n", len(kept) + 1)[len(kept)]
    mark = _MARK.search(following)
    end_mark = "..." + (mark.group() if mark else "")
    if room > len(end_mark) + 20 and (mark or not kept):
        kept.append(following[: room - len(end_mark)] + end_mark)
    return "\n".join(kept)
