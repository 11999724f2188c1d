"""Screenshots of a session: stored when the screen has changed, omitted when it has barely changed.

The rule (Step-DeepResearch report, arXiv:2512.20491, browser tool): consecutive screenshots that barely differ are
redundant, and the reply is text only. No screenshot is taken of a page with the same address, text and scroll offset.
If only the address or only the text is the same, the perceptual hash decides. Hashes are always of PNG, because a JPEG
of the same view differs by 12 bits. Pages that differ in both are different, although articles in one layout hash
alike.
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
      threshold: 64-bit hashes that differ in at most this many bits show the same screen.
      most: screenshots kept in the workspace.
    """

    threshold: int
    most: int
    count: int = 0
    key: tuple[str, str, int] | None = None  # address, digest of the text, scroll offset of the last page
    hash: object = None  # of the last stored screenshot
    path: str = ""  # of that screenshot

    def redundant(self, key: tuple[str, str, int]) -> bool:
        """Returns whether a page's key equals that of the last page."""
        return bool(self.path) and key == self.key

    async def add(self, folder: Path, key: tuple[str, str, int], png: bytes) -> bool:
        """Stores a screenshot in the workspace `folder` if it shows something new. Returns whether it did.

        Raises ToolError.
        """
        seen = await asyncio.to_thread(perceptual_hash, png)
        alike = self.key is not None and (key[0] == self.key[0] or key[1] == self.key[1])
        self.key = key
        if self.path and alike and distance(seen, self.hash) <= self.threshold:
            return False
        if self.count >= self.most:
            raise ToolError(f"a session keeps {self.most}")
        self.count += 1
        while workspace.exists(folder, f"{FOLDER}/{self.count}.png"):  # stored before a restart of the host
            self.count += 1
        path = f"{FOLDER}/{self.count}.png"
        await asyncio.to_thread(workspace.replace, folder, path, png)
        self.hash, self.path = seen, path
        return True


def perceptual_hash(png: bytes):
    """Returns the 64-bit perceptual hash of an image: low frequencies of its cosine transform. About 12 ms."""
    import imagehash
    from PIL import Image

    with Image.open(io.BytesIO(png), formats=["PNG"]) as picture:
        return imagehash.phash(picture)


def distance(one, other) -> int:
    """Returns the number of bits, of 64, in which two hashes differ."""
    return int(one - other)
