"""Citation ids: `web_` and four syllables, derived from the page's URL and the passage's text.

Syllables take few tokens in a small tokenizer and are easy to read. With 80^4 = 41 million ids, collisions occur in a
large index, so the later of two colliding passages gets its next id. The index is built in a fixed order, which makes
the choice stable.
"""

import hashlib
import re
from collections.abc import Callable
from urllib.parse import unquote, urlsplit, urlunsplit

_CONSONANTS = "bdfghjklmnprstvz"
_VOWELS = "aeiou"
_SYLLABLES = tuple(c + v for c in _CONSONANTS for v in _VOWELS)
_SYLLABLE_NUMBERS = {syllable: i for i, syllable in enumerate(_SYLLABLES)}
PATTERN = re.compile(r"web_(?:[bdfghjklmnprstvz][aeiou]){4}")
CITED = re.compile(r"\\cite\{(web_[a-z]+)\}")


_ESCAPED_LETTERS = re.compile(r"(?:%[89A-Fa-f][0-9A-Fa-f])+")


def canonical_url(url: str) -> str:
    """Returns the canonical form of a URL: no fragment, host in lower case, letters unescaped.

    Raises ValueError for an invalid URL.
    """
    parts = urlsplit(url.strip())
    host = parts.netloc.lower().removesuffix(":80" if parts.scheme == "http" else ":443")
    path, query = (_ESCAPED_LETTERS.sub(lambda match: unquote(match.group()), part) for part in parts[2:4])
    return urlunsplit((parts.scheme, host, path or ("/" if host else ""), query, ""))


def number(name: str) -> int:
    """Returns the number of an id, below 80^4."""
    value = 0
    for at in range(len(name) - 2, 3, -2):
        value = value * len(_SYLLABLES) + _SYLLABLE_NUMBERS[name[at : at + 2]]
    return value


def owner_digest(url: str, text: str) -> bytes:
    """Returns the first 8 bytes of the digest of the passage that an id stands for."""
    return hashlib.sha256(f"{canonical_url(url)}\n{text}".encode()).digest()[:8]


def syllables(digest: bytes, count: int) -> str:
    """Returns `count` syllables that spell the leading bytes of `digest` (at least 8)."""
    number = int.from_bytes(digest[:8], "big")
    spelled = []
    for _ in range(count):
        number, index = divmod(number, len(_SYLLABLES))
        spelled.append(_SYLLABLES[index])
    return "".join(spelled)


class Citations:
    """Assigns an id to every (url, passage text); no id is assigned twice."""

    def __init__(self, given: Callable[[str], bytes | None] = lambda name: None):
        """`given` returns, for an id assigned earlier, the first 8 bytes of its owner's digest."""
        self._owner: dict[str, bytes] = {}  # id -> digest of the passage that has it
        self._given = given

    def id(self, url: str, text: str) -> str:
        key = f"{canonical_url(url)}\n{text}".encode()
        owner = hashlib.sha256(key).digest()
        digest = owner
        for salt in range(1, 1000):
            name = "web_" + syllables(digest, 4)
            if before := self._given(name):
                if before == owner[:8]:
                    return name
            elif self._owner.setdefault(name, owner) == owner:
                return name
            digest = hashlib.sha256(key + b"\n%d" % salt).digest()
        raise RuntimeError("no free citation id after 1000 tries")
