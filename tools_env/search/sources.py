"""Sources of the index command. Each yields candidates with cheap fingerprints, which are parsed only when changed."""

import dataclasses
import hashlib
import json
import re
import tarfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from tools_env.errors import ToolHostError
from tools_env.offline_web import folder
from tools_env.search import wikitext

_HOST = re.compile(r"[a-z0-9-]+(\.[a-z0-9-]+)*")


@dataclasses.dataclass(frozen=True)
class IndexSource:
    """One SOURCE of the command line. `site` is the host of documents without an address."""

    path: Path
    site: str = ""
    authority: int = 1


@dataclasses.dataclass(frozen=True)
class Candidate:
    """A document that may already be indexed. `read` returns its row or raises ToolHostError."""

    id: str
    fingerprint: str
    read: Callable[[], dict[str, Any]]


def parse_source(argument: str) -> IndexSource:
    """Parses `PATH[,site=HOST][,authority=0|1|2]`. Raises ToolHostError."""
    path, *options = argument.split(",")
    named = dict(option.partition("=")[::2] for option in options)
    unknown = sorted(set(named) - {"site", "authority"})
    if unknown:
        raise ToolHostError(f"expected SOURCE as PATH,site=HOST,authority=0|1|2, got {unknown[0]!r} in {argument!r}")
    if named.get("authority", "1") not in ("0", "1", "2"):
        raise ToolHostError(f"expected authority as 0, 1 or 2, got {named['authority']!r} in {argument!r}")
    site = named.get("site", "").lower()
    if site and not _HOST.fullmatch(site):
        raise ToolHostError(f"expected site as a host such as notes.example, got {site!r} in {argument!r}")
    found = Path(path).expanduser()
    if not found.exists():
        raise ToolHostError(f"there is no {path}; correct the source")
    return IndexSource(found, site, int(named.get("authority", "1")))


def document_candidates(source: IndexSource) -> Iterator[Candidate]:
    """Yields the documents of a source in a fixed order. Raises ToolHostError when it cannot be read."""
    name = source.path.name.lower()
    if source.path.is_dir():
        yield from _folder(source)
    elif name.endswith((".xml", ".xml.bz2")):
        yield from _dump(source)
    elif name.endswith((".jsonl", ".ndjson")):
        yield from _jsonl(source)
    elif name.endswith((".tar", ".tar.gz", ".tgz", ".tar.xz", ".txz", ".tar.bz2")):
        yield from _tar(source)
    else:
        raise ToolHostError(
            f"expected a folder, .xml, .xml.bz2, .jsonl or .tar(.gz, .xz, .bz2), got {source.path}; correct the source"
        )


def _folder(source: IndexSource) -> Iterator[Candidate]:
    root, site = source.path, source.site or _slug(source.path.resolve().name)
    for path in sorted(folder.document_files(root)):
        relative = path.relative_to(root)
        try:
            body = path.read_bytes()
        except OSError as error:
            raise ToolHostError(f"cannot read {path}: {error.strerror}; change its permissions or remove it") from None
        yield _file(source, site, relative, body, str(path))


def _tar(source: IndexSource) -> Iterator[Candidate]:
    site = source.site or _slug(source.path.name.partition(".")[0])
    try:
        with tarfile.open(source.path, "r|*") as archive:
            for member in archive:
                relative = Path(member.name)
                if member.isfile() and relative.suffix.lower() in folder.TYPES and not relative.name.startswith("."):
                    body = archive.extractfile(member).read()
                    yield _file(source, site, relative, body, f"{source.path}:{member.name}")
    except (tarfile.TarError, OSError, EOFError) as error:
        raise ToolHostError(f"cannot read the archive {source.path} to its end ({error}); download it again") from None


def _file(source: IndexSource, site: str, relative: Path, body: bytes, shown: str) -> Candidate:
    def read() -> dict[str, Any]:
        return folder.read_document_file(body, relative, site, source.authority, shown)

    return Candidate(f"{site}/{relative.as_posix()}", _digest(body, source, site), read)


def _dump(source: IndexSource) -> Iterator[Candidate]:
    for page in wikitext.dump_pages(source.path):

        def read(page=page) -> dict[str, Any]:
            return {
                "id": page.url,
                "url": page.url,
                "title": page.title,
                "text": "\n".join(folder.split_paragraphs(wikitext.plain_text(page.wikitext).splitlines())),
                "lang": page.lang,
                "authority": source.authority,
                "published_at": page.published_at,
            }

        yield Candidate(page.url, _digest(page.revision.encode(), source, ""), read)


def _jsonl(source: IndexSource) -> Iterator[Candidate]:
    with open(source.path, "rb") as lines:
        for number, line in enumerate(lines, 1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
                name, url, title, content = (row.get("id") or row["url"], row["url"], row["title"], row["text"])
                authority = row.get("authority", source.authority)
                if not all(isinstance(value, str) and value for value in (name, url, title, content)):
                    raise ValueError("an empty field, or one that is no text")
                if authority not in (0, 1, 2) or not url.startswith(("http://", "https://")):
                    raise ValueError("authority must be 0, 1 or 2, url an http address")
            except (ValueError, KeyError, TypeError, AttributeError) as error:
                raise ToolHostError(
                    f"{source.path} line {number}: expected an object with url, title and text ({error!r}); correct it"
                ) from None

            def read(row=row, name=name, authority=authority) -> dict[str, Any]:
                content = "\n".join(folder.split_paragraphs(row["text"].splitlines()))
                lang = row.get("lang") or folder.detect_language(row["text"])
                return {**row, "id": name, "text": content, "lang": lang, "authority": authority}

            yield Candidate(name, _digest(line, source, ""), read)


def _digest(body: bytes, source: IndexSource, site: str) -> str:
    return hashlib.sha256(b"%d %s " % (source.authority, site.encode()) + body).hexdigest()[:32]


def _slug(name: str) -> str:
    return (re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-") or "library") + ".test"
