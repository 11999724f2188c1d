"""Files of a search index: written in crash-safe commits, read without loading passages into memory.

passages.jsonl    one passage per line; the line number is its ordinal; append-only
rows.bin          for each passage the end of its line, the number of its citation id and its owner's digest
tantivy/          full-text index of tokens (text.py) over passage and title, with filters; gives ordinals
documents.sqlite  every document with its fingerprint and ordinals, and the committed size of the files above
index.json        fingerprint and number of passages, for readers

A commit syncs the passages, then tantivy, then SQLite, whose commit is decisive. What the other files have beyond it is
rolled back when the index is next opened for writing.
"""

import contextlib
import fcntl
import hashlib
import json
import mmap
import os
import sqlite3
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

import numpy as np
import tantivy

from tools_env.errors import ToolHostError
from tools_env.search import citations, text
from tools_env.search.backend import Passage, day_number

VERSION = "2"  # raise when tokens, passages or ids change, so that old indexes are rebuilt
_ROW = np.dtype([("end", "<i8"), ("name", "<u4"), ("owner", "<u8")])
_TABLES = """
CREATE TABLE IF NOT EXISTS documents (id TEXT PRIMARY KEY, fingerprint TEXT NOT NULL, run INTEGER NOT NULL,
    page TEXT NOT NULL, lang TEXT NOT NULL, first INTEGER NOT NULL, count INTEGER NOT NULL);
CREATE INDEX IF NOT EXISTS by_page ON documents (page);
CREATE TABLE IF NOT EXISTS state (name TEXT PRIMARY KEY, value);
"""


def schema() -> tantivy.Schema:
    builder = tantivy.SchemaBuilder()
    for name in ("body", "title"):
        builder.add_text_field(name, tokenizer_name="whitespace", index_option="freq")
    builder.add_text_field("site", tokenizer_name="whitespace", index_option="basic")  # the host and its parent domains
    for name in ("lang", "doc"):
        builder.add_text_field(name, tokenizer_name="raw", index_option="basic")
    builder.add_integer_field("ordinal", fast=True)
    builder.add_integer_field("day", fast=True)
    return builder.build()


def page_of(url: str) -> str:
    """Returns host and path of an address, as one key."""
    parts = urlsplit(url)
    return f"{parts.hostname or ''}{unquote(parts.path)}"


def write_atomically(path: Path, content: bytes) -> None:
    """Replaces a file as a whole, synced to disk."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    with open(temporary, "wb") as out:
        out.write(content)
        out.flush()
        os.fsync(out.fileno())
    os.replace(temporary, path)


class Passages(Sequence):
    """The passages by ordinal, read on demand. Passages removed from the index are still included."""

    def __init__(self, folder: Path):
        """Raises ValueError or OSError when the files are damaged."""
        count = json.loads((folder / "index.json").read_text())["passages"]
        self._rows = _open_rows(folder / "rows.bin")[:count]
        with open(folder / "passages.jsonl", "rb") as file:
            size = os.fstat(file.fileno()).st_size
            self._lines = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) if size else b""
        if len(self._rows) != count or (count and self._rows["end"][-1] > size):
            raise ValueError("damaged index")
        order = np.argsort(self._rows["name"], kind="stable")
        self._names, self._owners = self._rows["name"][order], self._rows["owner"][order]

    def __len__(self) -> int:
        return len(self._rows)

    @lru_cache(maxsize=1 << 16)  # noqa: B019  one index lives as long as its host
    def _at(self, ordinal: int) -> tuple[Passage, str]:
        start = int(self._rows["end"][ordinal - 1]) if ordinal else 0
        row = json.loads(self._lines[start : int(self._rows["end"][ordinal])])
        lang = row.pop("lang")
        return Passage(**row), lang

    def __getitem__(self, ordinal):
        if not 0 <= ordinal < len(self):
            raise IndexError(ordinal)
        return self._at(int(ordinal))[0]

    def language(self, ordinal: int) -> str:
        return self._at(ordinal)[1]

    def given(self, name: str) -> bytes | None:
        """Returns the digest of the passage that has this citation id, None when no passage has it."""
        number = citations.number(name)
        at = int(np.searchsorted(self._names, number))
        if at < len(self._names) and self._names[at] == number:
            return int(self._owners[at]).to_bytes(8, "little")
        return None


def _open_rows(path: Path) -> np.ndarray:
    size = path.stat().st_size // _ROW.itemsize
    return np.memmap(path, _ROW, "r", shape=(size,)) if size else np.empty(0, _ROW)


class Writer:
    """Adds, replaces and removes documents. Changes take effect with `commit`. A lock allows one writer at a time."""

    def __init__(self, folder: Path):
        """Opens or creates the index in `folder`.

        Raises ToolHostError when another process writes it, or it is damaged.
        """
        folder.mkdir(parents=True, exist_ok=True)
        self._folder = folder
        self._lock = open(folder / "writer.lock", "w")
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise ToolHostError(f"another process writes the index in {folder}; wait for it or stop it") from None
        try:
            self._db = sqlite3.connect(folder / "documents.sqlite")
            for statement in filter(str.strip, _TABLES.split(";")):
                self._db.execute(statement)
            state = dict(self._db.execute("SELECT name, value FROM state"))
            self._db.commit()
        except sqlite3.DatabaseError as error:
            raise ToolHostError(f"the index in {folder} is damaged ({error}); remove the folder") from None
        if state and state["version"] != VERSION:
            raise ToolHostError(f"the index in {folder} is of another version; remove the folder and index again")
        self._count, self._bytes = state.get("passages", 0), state.get("bytes", 0)
        self._fingerprint = state.get("fingerprint", "")
        self.run = state.get("run", 0) + 1
        self._restore()
        self._schema = schema()
        (folder / "tantivy").mkdir(exist_ok=True)
        self._index = tantivy.Index(self._schema, path=str(folder / "tantivy"))
        # One thread: equal inputs give equal order.
        self._tantivy = self._index.writer(heap_size=64 << 20, num_threads=1)
        beyond = tantivy.Query.range_query(
            self._schema, "ordinal", tantivy.FieldType.Integer, lower_bound=self._count, use_inverted_index=False
        )
        self._tantivy.delete_documents_by_query(beyond)
        self._tantivy.commit()
        ids = Passages(folder).given if state else (lambda name: None)
        self._citations = citations.Citations(ids)

    def _restore(self) -> None:
        for name, size in (("passages.jsonl", self._bytes), ("rows.bin", self._count * _ROW.itemsize)):
            path = self._folder / name
            path.touch()
            if path.stat().st_size < size:
                raise ToolHostError(f"{path} is damaged; remove the folder {self._folder} and index again")
            os.truncate(path, size)
        self._lines = open(self._folder / "passages.jsonl", "ab")
        self._rows = open(self._folder / "rows.bin", "ab")
        if self._count:
            self._write_facts()

    @property
    def passages(self) -> int:
        return self._count

    def known(self, document: str, fingerprint: str) -> bool:
        """Returns whether the document is indexed with this fingerprint, and records that this run has seen it."""
        statement = "UPDATE documents SET run = ? WHERE id = ? AND fingerprint = ?"
        return self._db.execute(statement, (self.run, document, fingerprint)).rowcount > 0

    def has(self, document: str) -> bool:
        return self._db.execute("SELECT 1 FROM documents WHERE id = ?", (document,)).fetchone() is not None

    def add(self, row: dict[str, Any], fingerprint: str = "") -> int:
        """Indexes a document (id, url, title, text; authority, published_at, lang), or replaces it.

        Returns its number of passages.
        """
        self.remove(row["id"])
        url, title, day = row["url"], row["title"], day_number(row.get("published_at"))
        host = urlsplit(url).hostname or ""
        sites = " ".join(host.split(".", n)[-1] for n in range(host.count(".") + 1))
        lang = row.get("lang") or "en"
        title_tokens = " ".join(text.tokens(title))
        first = self._count
        for passage in text.passages(row["text"]):
            name = self._citations.id(url, passage)
            line = {
                "id": name,
                "url": url,
                "title": title,
                "text": passage,
                "authority": int(row.get("authority", 0)),
                "published_at": row.get("published_at"),
                "lang": lang,
            }
            self._bytes += self._lines.write(json.dumps(line, ensure_ascii=False).encode() + b"\n")
            owner = int.from_bytes(citations.owner_digest(url, passage), "little")
            self._rows.write(np.array((self._bytes, citations.number(name), owner), _ROW).tobytes())
            self._tantivy.add_document(
                tantivy.Document(
                    body=" ".join(text.tokens(passage)),
                    title=title_tokens,
                    site=sites,
                    lang=lang,
                    doc=row["id"],
                    ordinal=self._count,
                    day=day,
                )
            )
            self._count += 1
        added = self._count - first
        self._db.execute(
            "INSERT INTO documents VALUES (?, ?, ?, ?, ?, ?, ?)",
            (row["id"], fingerprint, self.run, page_of(url), lang, first, added),
        )
        self._note("+", row["id"], fingerprint)
        return added

    def remove(self, document: str) -> bool:
        """Removes a document; returns whether it was there."""
        if not self._db.execute("DELETE FROM documents WHERE id = ?", (document,)).rowcount:
            return False
        self._tantivy.delete_documents_by_term("doc", document)
        self._note("-", document, "")
        return True

    def remove_unseen(self) -> int:
        """Removes the documents that neither `known` nor `add` has seen in this run; returns their number."""
        gone = [row[0] for row in self._db.execute("SELECT id FROM documents WHERE run != ?", (self.run,))]
        return sum(map(self.remove, gone))

    def _note(self, *change: str) -> None:
        self._fingerprint = hashlib.sha256("\n".join((self._fingerprint, *change)).encode()).hexdigest()

    def documents(self) -> int:
        return self._db.execute("SELECT count(*) FROM documents").fetchone()[0]

    def commit(self, fingerprint: str | None = None) -> None:
        """Commits all changes. `fingerprint` replaces the one derived from the changes."""
        self._fingerprint = fingerprint or self._fingerprint or hashlib.sha256(b"").hexdigest()
        for file in (self._lines, self._rows):
            file.flush()
            os.fsync(file.fileno())
        self._tantivy.commit()
        state = {
            "version": VERSION,
            "passages": self._count,
            "bytes": self._bytes,
            "fingerprint": self._fingerprint,
            "run": self.run,
        }
        self._db.executemany("INSERT OR REPLACE INTO state VALUES (?, ?)", state.items())
        self._db.commit()
        self._write_facts()

    def _write_facts(self) -> None:
        facts = json.dumps({"fingerprint": self._fingerprint, "passages": self._count}) + "\n"
        write_atomically(self._folder / "index.json", facts.encode())

    def close(self) -> None:
        """Closes without a commit; waits for the full-text index to finish its merges."""
        self._tantivy.wait_merging_threads()
        self._lines.close()
        self._rows.close()
        self._db.close()
        self._lock.close()


class Pages:
    """The documents of an index as rows that can be rendered as pages."""

    def __init__(self, folder: Path):
        self._passages = Passages(folder)
        self._path = f"file:{folder / 'documents.sqlite'}?mode=ro"

    def get(self, page: tuple[str, str]) -> dict[str, Any] | None:
        """Returns the row of the page at (host, path), or None. Raises sqlite3.Error while it is being written."""
        with contextlib.closing(sqlite3.connect(self._path, uri=True, timeout=1.0)) as db:
            found = db.execute("SELECT first, count, lang FROM documents WHERE page = ?", ("".join(page),)).fetchone()
        if found is None or not found[1] or found[0] + found[1] > len(self._passages):
            return None
        shown = [self._passages[found[0] + i] for i in range(found[1])]
        return {
            "url": shown[0].url,
            "title": shown[0].title,
            "text": "\n".join(passage.text for passage in shown),
            "lang": found[2],
            "published_at": shown[0].published_at,
            "links": [],
        }


def alive(folder: Path) -> np.ndarray:
    """Returns the sorted ordinals of all passages of an index."""
    with contextlib.closing(sqlite3.connect(f"file:{folder / 'documents.sqlite'}?mode=ro", uri=True)) as db:
        ranges = db.execute("SELECT first, count FROM documents ORDER BY first").fetchall()
    parts = [np.arange(first, first + count) for first, count in ranges]
    return np.concatenate(parts) if parts else np.empty(0, np.int64)
