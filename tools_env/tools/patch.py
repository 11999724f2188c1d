"""Replaces one anchored fragment of a text: exact match first, else the one close and clearly best run of lines.

The model sends the changed fragment and a minimal anchor instead of the whole file, which saves most of its output
tokens; small slips in the anchor (a typo, other spaces) must not cost another turn.
"""

import dataclasses

from rapidfuzz import fuzz, process

from tools_env.errors import ToolError

MIN_SCORE = 85.0  # rapidfuzz ratio, 0-100, of the anchor and a run of lines
MIN_MARGIN = 5.0  # by which the best run must beat the best run that does not overlap it


@dataclasses.dataclass(frozen=True)
class Patched:
    text: str
    first_line: int  # 1-based, in the old text
    last_line: int
    exact: bool


def apply(text: str, anchor: str, replacement: str) -> Patched:
    """Returns the text with the anchored place replaced. Raises ToolError when there is no such place or several."""
    if not anchor.strip():
        raise ToolError("anchor is empty; give a piece of the text that is there now")
    count = text.count(anchor)
    if count > 1:
        raise ToolError(f"anchor stands in {count} places; give a longer one")
    if count == 1:
        start = text.index(anchor)
        first = text.count("\n", 0, start) + 1
        last = first + anchor.rstrip("\n").count("\n")
        return Patched(text[:start] + replacement + text[start + len(anchor) :], first, last, exact=True)
    lines = text.split("\n")
    wanted = anchor.strip("\n").split("\n")
    height = len(wanted)
    windows = ["\n".join(lines[i : i + height]) for i in range(len(lines) - height + 1)]
    found = process.extract("\n".join(wanted), windows, scorer=fuzz.ratio, limit=2 * height + 1)
    if not found or found[0][1] < MIN_SCORE:
        best = f"; the closest is line {found[0][2] + 1}" if found and found[0][1] > 0 else ""
        raise ToolError(f"anchor not found{best}; read the file and copy the anchor")
    _, score, at = found[0]
    others = [other for _, other, start in found[1:] if abs(start - at) >= height]
    if others and score - others[0] < MIN_MARGIN:
        raise ToolError("anchor fits several places about as well; give a longer or exact one")
    new = lines[:at] + replacement.strip("\n").split("\n") + lines[at + height :]
    if not replacement:
        new = lines[:at] + lines[at + height :]
    return Patched("\n".join(new), at + 1, at + height, exact=False)
