"""Text snapshot of a page: its visible lines, with numbers for the elements that can be clicked or filled in.

The script runs beside the page's own scripts, which may tamper with it. So its result is validated and bounded here,
and it is only ever displayed.
"""

import dataclasses
import hashlib
from pathlib import Path
from typing import Any

from tools_env.errors import ToolError

MAX_FRAMES = 8
MAX_ELEMENTS = 3000
_MAX_CHARS = 300_000
_SCRIPT = Path(__file__).with_name("snapshot.js").read_text(encoding="utf-8")


@dataclasses.dataclass
class Element:
    handle: Any  # Playwright's JSHandle of the frame's elements
    index: int
    name: str


@dataclasses.dataclass
class PageSnapshot:
    """The state of a page. Elements are numbered from 1 across all frames."""

    url: str
    title: str
    lines: list[str]
    above: int  # lines above the viewport
    scroll: int  # pixels from the top
    elements: list[Element]

    @property
    def digest(self) -> str:
        return hashlib.sha256("\n".join(self.lines).encode(errors="replace")).hexdigest()

    def text(self) -> str:
        """Returns the lines in the viewport and below."""
        head = [f"... {self.above} lines above; scroll up to read them"] if self.above else []
        return "\n".join([*head, *self.lines[self.above :]]) or "No text."

    def find(self, target: str) -> Element:
        """Returns the element with this number, or the only one with this text. Raises ToolError."""
        wanted = target.strip().strip("[]").strip()
        if wanted.isdecimal():
            if not 1 <= int(wanted) <= len(self.elements):
                raise ToolError(f"there is no element {wanted}; the page has {len(self.elements)}")
            return self.elements[int(wanted) - 1]
        folded = wanted.casefold()
        for fits in (str.__eq__, str.startswith, str.__contains__):
            found = [
                i for i, element in enumerate(self.elements, 1) if folded and fits(element.name.casefold(), folded)
            ]
            if len(found) == 1:
                return self.elements[found[0] - 1]
            if found:
                shown = ", ".join(f"{i} ({self.elements[i - 1].name})" for i in found[:10])
                raise ToolError(f"{len(found)} elements show {wanted!r}: {shown}; give a number")
        raise ToolError(f"no element shows {wanted!r}; give the number of one, as the page's text has it")

    async def dispose(self) -> None:
        for handle in {id(element.handle): element.handle for element in self.elements}.values():
            try:
                await handle.dispose()
            except Exception:  # the page has navigated, and its handles are gone
                pass


async def take_snapshot(page) -> PageSnapshot:
    """Returns the snapshot of a Playwright page with its frames. Raises Playwright's errors."""
    lines, elements, above, scroll = [], [], 0, 0
    for number, frame in enumerate(page.frames[:MAX_FRAMES]):
        try:
            handle = await frame.evaluate_handle(_SCRIPT, len(elements) + 1)
            found = await handle.evaluate("found => ({lines: found.lines, names: found.names})") or {}
        except Exception:
            if number == 0:
                raise
            continue  # a frame that was removed or shows no page
        lists = [value if isinstance(value := found.get(name), list) else [] for name in ("lines", "names")]
        rows = [row for row in lists[0] if isinstance(row, list) and len(row) == 3]
        if number and rows:
            lines.append(f"--- frame {frame.url[:200]}")
        lines += [str(row[0]) for row in rows]
        names = [str(name) for name in lists[1]][: MAX_ELEMENTS - len(elements)]
        elements += [Element(handle, index, name) for index, name in enumerate(names)]
        if number == 0:
            bottoms = [row[2] if isinstance(row[2], int | float) else 0 for row in rows]
            above = next((i for i, bottom in enumerate(bottoms) if bottom > 0), max(len(rows) - 1, 0))
            offset = await page.evaluate("scrollY")
            scroll = round(offset) if isinstance(offset, int | float) and abs(offset) < 1e9 else 0
    kept, size = [], 0
    for line in lines:
        size += len(line) + 1
        if size > _MAX_CHARS:
            break
        kept.append(line)
    return PageSnapshot(page.url, (await page.title())[:200], kept, min(above, len(kept)), scroll, elements)
