"""The passage index over a world's documents: built once into world_dir/index, opened read-only by every host.

index.json   fingerprint of the inputs and of the indexing rules
passages.jsonl   one passage a line, in id order of their documents; the line number is its ordinal
tantivy/     full-text index of tokens (text.py) over passage and title; a fast field holds the ordinal
"""

import dataclasses
import functools
import hashlib
import json
import logging
import math
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import tantivy

from tools_env.errors import ToolHostError
from tools_env.search import ranking, text
from tools_env.search.citations import Citations

VERSION = "1"  # raise when tokens, passages or ids change, so that old indexes are rebuilt
CANDIDATES = 64  # passages that the full-text engine hands to the ranking
COMMON = 0.3  # tokens in a larger share of passages do not select candidates when rarer ones can


@dataclasses.dataclass(frozen=True)
class Passage:
    """One passage of one page. `authority`: 0 unknown or unreliable, 1 ordinary, 2 authoritative."""

    id: str  # citation id
    url: str
    title: str
    text: str
    authority: int
    published_at: str | None


def _fingerprint(documents: Path) -> str:
    digest = hashlib.sha256(f"{VERSION} {tantivy.__version__}".encode())
    with open(documents, "rb") as lines:
        while block := lines.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def _read_passages(documents: Path, citations: Citations) -> Iterator[Passage]:
    rows = []
    for number, line in enumerate(documents.read_text(encoding="utf-8").splitlines(), 1):
        try:
            row = json.loads(line)
            rows.append((row["id"], row["url"], row["title"], row["text"], row))
        except (ValueError, KeyError, TypeError) as error:
            raise ToolHostError(
                f"{documents} line {number} is not a document with id, url, title and text ({error!r}); build the world again"
            ) from None
    for _, url, title, body, row in sorted(rows, key=lambda row: row[:2]):
        for passage in text.passages(body):
            yield Passage(
                id=citations.id(url, passage),
                url=url,
                title=title,
                text=passage,
                authority=int(row.get("authority", 0)),
                published_at=row.get("published_at"),
            )


def _schema() -> tantivy.Schema:
    builder = tantivy.SchemaBuilder()
    for name in ("body", "title"):
        builder.add_text_field(name, tokenizer_name="whitespace", index_option="freq")
    builder.add_integer_field("ordinal", fast=True)
    return builder.build()


def build(world_dir: str | os.PathLike) -> Path:
    """Builds world_dir/index unless it is there and current; returns its path.

    The index appears whole or not at all. Raises ToolHostError when documents.jsonl is missing or damaged.
    """
    world_dir = Path(world_dir)
    documents, target = world_dir / "documents.jsonl", world_dir / "index"
    if not documents.is_file():
        raise ToolHostError(f"{documents} does not exist; build the world first, or name its directory with --world")
    fingerprint = _fingerprint(documents)
    if _current(target) == fingerprint:
        return target
    temporary = world_dir / f".index.{os.getpid()}.tmp"
    shutil.rmtree(temporary, ignore_errors=True)
    (temporary / "tantivy").mkdir(parents=True)
    try:
        index = tantivy.Index(_schema(), path=str(temporary / "tantivy"))
        writer = index.writer(heap_size=64 << 20, num_threads=1)  # one thread: equal inputs give equal order
        count = 0
        with open(temporary / "passages.jsonl", "w", encoding="utf-8") as out:
            for count, passage in enumerate(_read_passages(documents, Citations()), 1):
                out.write(json.dumps(vars(passage), ensure_ascii=False) + "\n")
                writer.add_document(
                    tantivy.Document(
                        body=" ".join(text.tokens(passage.text)),
                        title=" ".join(text.tokens(passage.title)),
                        ordinal=count - 1,
                    )
                )
        writer.commit()
        writer.wait_merging_threads()
        facts = {"fingerprint": fingerprint, "passages": count}
        (temporary / "index.json").write_text(json.dumps(facts) + "\n")
        retired = world_dir / f".index.{os.getpid()}.old"
        if target.exists():
            os.rename(target, retired)
        try:
            os.rename(temporary, target)
        except OSError:
            # Another host finished the same build first; equal inputs give an equal index.
            if _current(target) != fingerprint:
                raise
        shutil.rmtree(retired, ignore_errors=True)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    logging.getLogger(__name__).info("indexed %d passages into %s", count, target)
    return target


def _current(target: Path) -> str | None:
    try:
        return json.loads((target / "index.json").read_text())["fingerprint"]
    except (OSError, ValueError, KeyError):
        return None


class PassageIndex:
    """Search over passages. Equal queries always give equal results, in the same order."""

    def __init__(self, world_dir: str | os.PathLike):
        """Builds the index if needed and opens it. Raises ToolHostError."""
        try:
            self._open(build(world_dir))
        except (ValueError, OSError, TypeError):
            # A damaged index is rebuilt from the documents; if those are the fault, the second try says so.
            shutil.rmtree(Path(world_dir) / "index", ignore_errors=True)
            self._open(build(world_dir))

    def _open(self, path: Path) -> None:
        self.fingerprint = _current(path)
        with open(path / "passages.jsonl", encoding="utf-8") as lines:
            self.passages = [Passage(**json.loads(line)) for line in lines]
        self.citations = Citations()
        for passage in self.passages:
            self.citations.id(passage.url, passage.text)  # same order as when built, so the same ids
        self._schema = _schema()
        self._searcher = tantivy.Index.open(str(path / "tantivy")).searcher()
        self._unseen = math.log(1.0 + len(self.passages))

    @functools.lru_cache(maxsize=1 << 16)  # noqa: B019  one index lives as long as its host
    def _idf(self, token: str, field: str) -> float:
        """Inverse document frequency; 0 for a token that no passage has."""
        frequency = self._searcher.doc_freq(field, token)
        return math.log(1.0 + len(self.passages) / frequency) if frequency else 0.0

    def _weight(self, token: str) -> float:
        return self._idf(token, "body") or self._idf(token, "title")

    def _title_idf(self, token: str) -> float:
        return self._idf(token, "title")

    @functools.lru_cache(maxsize=1 << 16)  # noqa: B019
    def _features(self, ordinal: int) -> ranking.Features:
        passage = self.passages[ordinal]
        return ranking.features(text.tokens(passage.text), text.tokens(passage.title), self._title_idf)

    def search(self, query: str, topk: int) -> list[int]:
        """Returns the ordinals of at most `topk` passages, best first; a text that several pages share is shown once."""
        asked = text.tokens(query)[:64]
        if not asked or not self.passages:
            return []
        weight = ranking.weights(asked, self._weight, self._unseen)
        common = math.log(1.0 + 1.0 / COMMON)
        selecting = [t for t in weight if self._weight(t) > common] or [t for t in weight if self._weight(t)]
        clauses = [
            (tantivy.Occur.Should, tantivy.Query.term_query(self._schema, field, token, index_option="freq"))
            for token in selecting
            for field in ("body", "title")
        ]
        if not clauses:
            return []
        hits = self._searcher.search(tantivy.Query.boolean_query(clauses), CANDIDATES, count=False).hits
        if not hits:
            return []
        ordinals = self._searcher.fast_field_values("ordinal", [address for _, address in hits])
        best = hits[0][0] or 1.0
        ranked = []
        for (score, _), ordinal in zip(hits, ordinals, strict=True):
            value = ranking.relevance(
                asked, weight, self._features(ordinal), self._title_idf, score / best, self._unseen
            )
            if value > 0.0:
                passage = self.passages[ordinal]
                # Rounding keeps the last bits of float sums from deciding; the id does.
                ranked.append((-round(ranking.boosted(value, passage.authority), 6), passage.id, ordinal))
        ranked.sort(key=lambda row: row[:2])
        unique = {}
        for _, _, ordinal in ranked:
            unique.setdefault(self.passages[ordinal].text, ordinal)
        return list(unique.values())[:topk]
