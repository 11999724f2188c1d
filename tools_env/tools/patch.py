"""Replaces one anchored fragment of a text: an exact match, else the best approximate run of lines or sentences.

The model sends the changed fragment and a minimal anchor instead of the whole file, which saves most of its output
tokens; small errors in the anchor (a typo, other spaces) must not cost another turn.
"""

import dataclasses
import re

from rapidfuzz import fuzz, process
from rapidfuzz.distance import Levenshtein

from tools_env.errors import ToolError

_LINE = re.compile(r"[^\s][^\n]*(?<=[^\s])|\S")  # without its indentation
_SENTENCE = re.compile(r"[^\s.!?。！？](?:[^.!?。！？\n]|[.!?](?!\s))*[.!?。！？]*")
MIN_SCORE = 85.0  # rapidfuzz ratio, 0-100, of the anchor and a run of lines, or of sentences
MAX_SURPLUS = 2  # characters by which the match may be longer or shorter at either end
MIN_MARGIN = 5.0  # by which the best run must beat the best run that does not overlap it


@dataclasses.dataclass(frozen=True)
class PatchedText:
    text: str
    first_line: int  # 1-based, in the old text
    last_line: int
    exact: bool


def apply_patch(text: str, anchor: str, replacement: str) -> PatchedText:
    """Returns the text with the anchored place replaced. Raises ToolError when there is none or several."""
    if not anchor.strip():
        raise ToolError("anchor is empty; give a piece of the text that is there now")
    count = text.count(anchor)
    if count > 1:
        raise ToolError(f"anchor stands in {count} places; give a longer one")
    if count == 1:
        start = text.index(anchor)
        first = text.count("\n", 0, start) + 1
        last = first + anchor.rstrip("\n").count("\n")
        return PatchedText(text[:start] + replacement + text[start + len(anchor) :], first, last, exact=True)
    wanted = anchor.strip()
    found = max((_closest(text, wanted, cut) for cut in (_LINE, _SENTENCE)), key=lambda run: run.score)
    first = text.count("\n", 0, found.start) + 1
    if found.score < MIN_SCORE:
        near = f"; the closest is line {first}" if found.score > 0 else ""
        raise ToolError(f"anchor not found{near}; read the file and copy the anchor")
    if found.score - found.next_score < MIN_MARGIN:
        raise ToolError("anchor fits several places about as well; give a longer or exact one")
    piece = text[found.start : found.end]
    if not _same_ends(wanted, piece):
        raise ToolError(f"anchor fits line {first} but ends elsewhere than a line or sentence; copy it exactly")
    last = first + piece.count("\n")
    return PatchedText(_replaced(text, found.start, found.end, replacement), first, last, exact=False)


@dataclasses.dataclass(frozen=True)
class _Run:
    score: float
    start: int
    end: int
    next_score: float  # of the best run that does not overlap this one


def _closest(text: str, wanted: str, cut: re.Pattern) -> _Run:
    """Returns the run of lines or sentences that is most like `wanted`; with score 0 when there is none."""
    pieces = [match.span() for match in cut.finditer(text)]
    height = len(cut.findall(wanted))
    runs = [(pieces[i][0], pieces[i + height - 1][1]) for i in range(len(pieces) - height + 1)] if height else []
    found = process.extract(wanted, [text[a:b] for a, b in runs], scorer=fuzz.ratio, limit=2 * height + 1)
    if not found:
        return _Run(0.0, 0, 0, 0.0)
    _, score, at = found[0]
    others = [other for _, other, place in found[1:] if abs(place - at) >= height]
    return _Run(score, *runs[at], others[0] if others else 0.0)


def _same_ends(wanted: str, piece: str) -> bool:
    """Returns whether both begin and end at the same words; a longer run would silently lose a word."""
    same = [block for block in Levenshtein.opcodes(wanted, piece) if block.tag == "equal"]
    long = [block for block in same if block.src_end - block.src_start >= 3]
    if not long:
        return False
    first, last = long[0], long[-1]
    before = first.dest_start - first.src_start
    after = (len(piece) - last.dest_end) - (len(wanted) - last.src_end)
    return abs(before) <= MAX_SURPLUS and abs(after) <= MAX_SURPLUS


def _replaced(text: str, start: int, end: int, replacement: str) -> str:
    whole_lines = text[:start].endswith("\n") or start == 0, text[end:].startswith("\n") or end == len(text)
    if not replacement and all(whole_lines):  # deleted lines leave no empty line
        if end < len(text):
            end += 1
        elif start > 0:
            start -= 1
    return text[:start] + replacement.strip() + text[end:]
