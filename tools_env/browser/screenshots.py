"""Screenshots of a session: kept when the screen has changed, left out when it barely has.

The rule (Step-DeepResearch report, arXiv:2512.20491, browser tool): consecutive screenshots that barely differ are
redundant, and the answer is text only. A page with the same address, text and scroll offset is not even photographed;
if the address or the text is the same, the perceptual hash of the picture decides, always of a PNG: the same view as JPEG
hashes 12 bits away. Pages that differ in both are different, although articles in one layout hash alike.
"""

import asyncio
import dataclasses
import io
from pathlib import Path

from tools_env.errors import ToolError
from tools_env.tools import workspace

FOLDER = "screenshots"


@dataclasses.dataclass
class Screenshots:
    """The screenshots of one session.

    Attributes:
      threshold: hashes of 64 bits that differ in at most so many are of the same screen.
      most: pictures kept in the workspace.
    """

    threshold: int
    most: int
    count: int = 0
    key: tuple[str, str, int] | None = None  # address, digest of the text, scroll offset of the last page looked at
    hash: object = None  # of the last picture kept
    path: str = ""  # of that picture

    def redundant(self, key: tuple[str, str, int]) -> bool:
        """Returns whether a page is, by its key alone, as it was when it was last looked at."""
        return bool(self.path) and key == self.key

    async def add(self, folder: Path, key: tuple[str, str, int], png: bytes) -> bool:
        """Keeps a picture in the workspace `folder` if it shows something new. Raises ToolError if it cannot."""
        seen = await asyncio.to_thread(perceptual_hash, png)
        alike = self.key is not None and (key[0] == self.key[0] or key[1] == self.key[1])
        self.key = key
        if self.path and alike and distance(seen, self.hash) <= self.threshold:
            return False
        if self.count >= self.most:
            raise ToolError(f"a session keeps {self.most}")
        self.count += 1
        while workspace.exists(
            folder, f"{FOLDER}/{self.count}.png"
        ):  # of this session before the host was started again
            self.count += 1
        path = f"{FOLDER}/{self.count}.png"
        await asyncio.to_thread(workspace.replace, folder, path, png)
        self.hash, self.path = seen, path
        return True


def perceptual_hash(png: bytes):
    """Returns the 64-bit perceptual hash of a picture: low frequencies of its cosine transform. About 12 ms."""
    import imagehash
    from PIL import Image

    with Image.open(io.BytesIO(png), formats=["PNG"]) as picture:
        return imagehash.phash(picture)


def distance(one, other) -> int:
    """Returns in how many of 64 bits two hashes differ."""
    return int(one - other)
