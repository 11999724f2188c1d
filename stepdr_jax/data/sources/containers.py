"""How files are divided into records: lines, JSON lists, MediaWiki dumps, Parquet tables, whole files.

Each container has `parts(path, size)` -> [(start, end)], `scan(path, part)` -> (key, record) and `pick(path, part,
keys)`, which reads the records of ascending keys only. A key is a record's position: bytes for lines, a count for the
others. A record that cannot be read is `Broken`; what follows it is read all the same where the format allows it.
"""

import bz2
import dataclasses
import gzip
import json
import lzma
import xml.etree.ElementTree as xml
from collections.abc import Iterator
from pathlib import Path
from typing import Any

_COMPRESSED = {".gz": gzip.open, ".bz2": bz2.open, ".xz": lzma.open}
WHOLE = (0, -1)
TORN = "the last line is incomplete"  # its writer was killed; not an error of the data
Part = tuple[int, int]


@dataclasses.dataclass(frozen=True)
class Broken:
    """A record that cannot be read."""

    reason: str
    size: int = 0


def open_bytes(path: Path):
    """Opens a file for reading; .gz, .bz2, .xz and .zst are decompressed on the way."""
    if path.suffix == ".zst":
        import pyarrow

        return pyarrow.input_stream(str(path), compression="zstd")
    return _COMPRESSED.get(path.suffix, open)(path, "rb")


def size_of(record: Any) -> int:
    """About how many bytes a record takes, for cutting shards of equal size."""
    if isinstance(record, bytes | str):
        return len(record)
    return sum(len(str(value)) for value in record.values()) if isinstance(record, dict) else len(str(record))


class _Sequential:
    """Base of containers that can only be read from their start."""

    @staticmethod
    def parts(path: Path, size: int) -> list[Part]:
        del path, size
        return [WHOLE]

    @classmethod
    def pick(cls, path: Path, part: Part, keys: list[int]) -> Iterator[tuple[int, Any]]:
        wanted = set(keys)
        return ((key, record) for key, record in cls.scan(path, part) if key in wanted)

    @staticmethod
    def scan(path: Path, part: Part) -> Iterator[tuple[int, Any]]:
        raise NotImplementedError


class Lines(_Sequential):
    """One JSON object per line; records are the lines. A part has the lines that begin in it."""

    @staticmethod
    def parts(path: Path, size: int) -> list[Part]:
        total = path.stat().st_size
        if path.suffix in (*_COMPRESSED, ".zst") or total <= size:
            return [WHOLE]
        count = -(-total // size)
        return [(total * i // count, total * (i + 1) // count) for i in range(count)]

    @staticmethod
    def scan(path: Path, part: Part) -> Iterator[tuple[int, bytes | Broken]]:
        start, end = part
        with open_bytes(path) as file:
            if start:
                file.seek(start - 1)
                start += len(file.readline()) - 1  # a line that began earlier belongs to the previous part
            lines = iter(file.readline, b"")
            for line in lines:
                if 0 <= end <= start:
                    return
                if line.strip():
                    torn = not line.endswith(b"\n") and not _is_json(line)
                    yield start, Broken(TORN, len(line)) if torn else line
                start += len(line)

    @classmethod
    def pick(cls, path: Path, part: Part, keys: list[int]) -> Iterator[tuple[int, bytes]]:
        if path.suffix in (*_COMPRESSED, ".zst"):
            yield from super().pick(path, part, keys)
            return
        with open(path, "rb") as file:
            for key in keys:
                file.seek(key)
                yield key, file.readline()


class JsonArray(_Sequential):
    """One JSON list of objects, read whole: for files of up to a few hundred MB."""

    @staticmethod
    def scan(path: Path, part: Part) -> Iterator[tuple[int, bytes | Broken]]:
        with open_bytes(path) as file:
            try:
                rows = json.load(file)
            except ValueError as error:
                yield 0, Broken(f"not a JSON list ({error})")
                return
        if not isinstance(rows, list):
            yield 0, Broken("expected a JSON list")
            return
        yield from ((index, json.dumps(row).encode()) for index, row in enumerate(rows))


class WholeFile(_Sequential):
    """One document per file, as UTF-8 text."""

    @staticmethod
    def scan(path: Path, part: Part) -> Iterator[tuple[int, dict | Broken]]:
        with open_bytes(path) as file:
            data = file.read()
        try:
            yield 0, {"path": str(path), "text": data.decode()}
        except UnicodeDecodeError as error:
            yield 0, Broken(f"not UTF-8 text ({error.reason} at byte {error.start})", len(data))


class MediaWiki(_Sequential):
    """Streams the pages of a MediaWiki XML export: records of title, ns, id, redirect, text, base, lang."""

    @staticmethod
    def scan(path: Path, part: Part) -> Iterator[tuple[int, dict | Broken]]:
        site = {"base": "", "lang": ""}
        count = 0
        with open_bytes(path) as file:
            try:
                root = None
                for event, element in xml.iterparse(file, events=("start", "end")):
                    tag = element.tag.rpartition("}")[2]
                    if root is None:
                        root = element
                        site["lang"] = element.get("{http://www.w3.org/XML/1998/namespace}lang", "")
                    if event == "end" and tag == "base":
                        site["base"] = (element.text or "").rpartition("/")[0]
                    if event == "end" and tag == "page":
                        yield count, _page(element) | site
                        count += 1
                        root.clear()  # else the whole dump stays in memory
            except (xml.ParseError, EOFError, OSError) as error:
                yield count, Broken(f"the dump is damaged from page {count} on ({error})")


def _page(element: xml.Element) -> dict:
    fields = {child.tag.rpartition("}")[2]: child for child in element}
    text = next((node.text or "" for node in element.iter() if node.tag.rpartition("}")[2] == "text"), "")
    value = {name: (fields[name].text or "") if name in fields else "" for name in ("title", "ns", "id")}
    return value | {"redirect": "redirect" in fields, "text": text}


class Parquet(_Sequential):
    """Rows of a Parquet file as dicts; parts are runs of row groups, keys are row numbers."""

    @staticmethod
    def parts(path: Path, size: int) -> list[Part]:
        import pyarrow.parquet as parquet

        try:
            groups = parquet.ParquetFile(path).num_row_groups
        except Exception:  # scan reports it
            return [WHOLE]
        per = max(1, groups * size // max(path.stat().st_size, 1))
        return [(first, min(first + per, groups)) for first in range(0, groups, per)] or [WHOLE]

    @staticmethod
    def scan(path: Path, part: Part) -> Iterator[tuple[int, dict | Broken]]:
        import pyarrow.parquet as parquet

        first, last = part
        key = 0
        try:
            with parquet.ParquetFile(path) as table:
                groups = range(first, table.num_row_groups if last < 0 else last)
                key = sum(table.metadata.row_group(group).num_rows for group in range(first))
                for batch in table.iter_batches(batch_size=512, row_groups=list(groups)):
                    for row in batch.to_pylist():
                        yield key, row
                        key += 1
        except Exception as error:  # pyarrow raises ArrowInvalid, OSError and others by the kind of damage
            yield key, Broken(f"the table is damaged from row {key} on ({str(error).splitlines()[0][:120]})")


def _is_json(line: bytes) -> bool:
    try:
        json.loads(line)
    except ValueError:
        return False
    return True
