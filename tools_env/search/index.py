"""The embedded search index: full text, dense vectors or both over the passages of a directory.

An offline web has documents.jsonl; the index is built from it at the first start and rebuilt when the file changes. A
directory made by `python -m tools_env.index` has only an index. store.py and dense.py describe the files.
"""

import asyncio
import functools
import hashlib
import json
import logging
import math
import os
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import tantivy

from tools_env.errors import ToolError, ToolHostError
from tools_env.search import dense, ranking, store, text
from tools_env.search.backend import Filters, Passage
from tools_env.search.citations import Citations

CANDIDATES = 64  # passages that each retrieval passes to the ranking
COMMON = 0.3  # tokens in a larger share of passages select candidates only when no rarer token does
MODES = ("bm25", "dense", "hybrid")
NEAR = 0.25  # smallest cosine of a passage found by its vector alone
FILTERED = 1024  # neighbors that are filtered when a query has filters
LARGE = 50_000  # passages; larger indexes are searched in a thread


def _fingerprint(documents: Path) -> str:
    digest = hashlib.sha256(f"{store.VERSION} {tantivy.__version__}".encode())
    with open(documents, "rb") as lines:
        while block := lines.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def _read_rows(documents: Path) -> Iterator[dict]:
    """Returns documents in order of their ids. Raises ToolHostError for an invalid line."""
    rows = []
    for number, line in enumerate(documents.read_text(encoding="utf-8").splitlines(), 1):
        try:
            row = json.loads(line)
            rows.append((row["id"], row["url"], row["title"], row["text"], row))
        except (ValueError, KeyError, TypeError) as error:
            raise ToolHostError(
                f"{documents} line {number} is not a document with id, url, title and text "
                f"({error!r}); build the offline web again"
            ) from None
    return (row[-1] for row in sorted(rows, key=lambda row: row[:2]))


def build_index(offline_web_dir: str | os.PathLike) -> Path:
    """Builds offline_web_dir/index unless it is current; returns its path.

    The index is replaced atomically. Raises ToolHostError when documents.jsonl is missing or damaged.
    """
    offline_web_dir = Path(offline_web_dir)
    documents, target = offline_web_dir / "documents.jsonl", offline_web_dir / "index"
    if not documents.is_file():
        if (target / "documents.sqlite").is_file():
            return target  # made by the index command, which updates it
        raise ToolHostError(
            f"{documents} does not exist; build the offline web first, or name its directory with --offline_web"
        )
    fingerprint = _fingerprint(documents)
    if _current(target) == fingerprint:
        return target
    temporary = offline_web_dir / f".index.{os.getpid()}.tmp"
    shutil.rmtree(temporary, ignore_errors=True)
    try:
        writer = store.Writer(temporary)
        try:
            for row in _read_rows(documents):
                writer.add(row)
            writer.commit(fingerprint)
        finally:
            writer.close()
        count = writer.passages
        retired = offline_web_dir / f".index.{os.getpid()}.old"
        if target.exists():
            os.rename(target, retired)
        try:
            os.rename(temporary, target)
        except OSError:
            # Another host finished the same build first; equal inputs give equal indexes.
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

    def __init__(
        self,
        offline_web_dir: str | os.PathLike,
        mode: str = "bm25",
        *,
        authority: bool = True,
        embedder: dense.Embedder | None = None,
    ):
        """Opens the index; builds what is missing.

        Args:
          offline_web_dir: an offline web, or a directory made by the index command.
          mode: one of MODES; the retrieval that finds and orders candidates.
          authority: whether authority decides between passages of comparable relevance.
          embedder: of the modes dense and hybrid; default: latent semantic analysis.

        Raises ToolHostError.
        """
        if mode not in MODES:
            raise ToolHostError(f"expected search_ranking as one of {', '.join(MODES)}, got {mode!r}")
        self.mode, self._authority, self._vectors = mode, authority, None
        try:
            self._open(build_index(offline_web_dir))
        except (ValueError, OSError, TypeError, KeyError) as error:
            if not (Path(offline_web_dir) / "documents.jsonl").is_file():
                raise ToolHostError(
                    f"the index in {offline_web_dir} is damaged ({error}); remove it and run the index command again"
                ) from None
            # A damaged index is rebuilt from the documents; if they are damaged, the second attempt raises.
            shutil.rmtree(Path(offline_web_dir) / "index", ignore_errors=True)
            self._open(build_index(offline_web_dir))
        if mode != "bm25":
            self._open_vectors(embedder)
        self.fingerprint = f"{self._content} {mode} {authority} {self._vectors.embedder.name if self._vectors else ''}"
        if (mode, authority) == ("bm25", True):
            self.fingerprint = self._content

    def _open(self, path: Path) -> None:
        self._path = path
        self._content = _current(path)
        self.passages = store.Passages(path)
        self.citations = Citations(self.passages.given)
        self._schema = store.schema()
        self._searcher = tantivy.Index.open(str(path / "tantivy")).searcher()
        self._size = self._searcher.num_docs
        self._unseen = math.log(1.0 + self._size)

    def _open_vectors(self, embedder: dense.Embedder | None) -> None:
        folder = self._path / "dense"
        chosen = embedder or dense.load_embedder(folder)
        try:
            if chosen is None:
                raise ValueError("no embedder yet")
            self._vectors = dense.Vectors(folder, chosen)
            if self._vectors.fingerprint != self._content:
                raise ValueError("older passages")
        except (ValueError, OSError, KeyError):
            self._vectors = dense.Vectors(folder, build_vectors(self._path, embedder))

    @functools.lru_cache(maxsize=1 << 16)  # noqa: B019  the index lives as long as its host
    def _idf(self, token: str, field: str) -> float:
        """Inverse document frequency; 0 for a token that no passage has."""
        frequency = self._searcher.doc_freq(field, token)
        return math.log(1.0 + self._size / frequency) if frequency else 0.0

    def _weight(self, token: str) -> float:
        return self._idf(token, "body") or self._idf(token, "title")

    def _title_idf(self, token: str) -> float:
        return self._idf(token, "title")

    @functools.lru_cache(maxsize=1 << 15)  # noqa: B019
    def _features(self, ordinal: int) -> ranking.Features:
        passage = self.passages[ordinal]
        return ranking.features(text.tokens(passage.text), text.tokens(passage.title), self._title_idf)

    def search(
        self, query: str, topk: int, filters: Filters | None = None, vector: np.ndarray | None = None
    ) -> list[int]:
        """Returns the ordinals of at most `topk` passages, best first; a text that several pages share is shown once.

        Args:
          vector: the query's vector in the modes dense and hybrid; default: computed by the offline embedder.
        """
        asked = text.tokens(query)[:64]
        if not asked or not self._size:
            return []
        filters = filters or Filters()
        found = {} if self.mode == "dense" else self._full_text(asked, filters)
        cosine: dict[int, float] = {}
        if self._vectors is not None:
            vector = self._vectors.embedder.vectors([query])[0] if vector is None else vector
            cosine = self._near(vector, filters, found)
        relevance = self._relevance(asked, found, cosine) if self.mode != "dense" else {}
        unique = {}
        for ordinal in self._ordered(relevance, cosine):
            unique.setdefault(self.passages[ordinal].text, ordinal)
        return list(unique.values())[:topk]

    def full_text(self, query: str, topk: int) -> list[int]:
        """Returns the full-text engine's own results and order, as a baseline for the other rankings."""
        unique = {}
        for ordinal in self._full_text(text.tokens(query)[:64], Filters()):
            unique.setdefault(self.passages[ordinal].text, ordinal)
        return list(unique.values())[:topk]

    def _full_text(self, asked: Sequence[str], filters: Filters) -> dict[int, float]:
        """Returns candidates with the engine's score divided by the best one's, best first."""
        common = math.log(1.0 + 1.0 / COMMON)
        tokens = dict.fromkeys(asked)
        selecting = [t for t in tokens if self._weight(t) > common] or [t for t in tokens if self._weight(t)]
        clauses = [
            (tantivy.Occur.Should, tantivy.Query.term_query(self._schema, field, token, index_option="freq"))
            for token in selecting
            for field in ("body", "title")
        ]
        if not clauses:
            return {}
        query = tantivy.Query.boolean_query(clauses)
        if conditions := self._conditions(filters):
            query = tantivy.Query.boolean_query([(tantivy.Occur.Must, part) for part in (query, *conditions)])
        hits = self._searcher.search(query, CANDIDATES, count=False).hits
        if not hits:
            return {}
        ordinals = self._searcher.fast_field_values("ordinal", [address for _, address in hits])
        best = hits[0][0] or 1.0
        # After a killed write the engine has uncommitted passages, which the next run removes.
        return {
            ordinal: score / best
            for (score, _), ordinal in zip(hits, ordinals, strict=True)
            if ordinal < len(self.passages)
        }

    def _conditions(self, filters: Filters) -> list[tantivy.Query]:
        from tools_env.search.backend import day_number

        found = []
        if filters.site:
            found.append(tantivy.Query.term_query(self._schema, "site", filters.host))
        if filters.language:
            found.append(tantivy.Query.term_query(self._schema, "lang", filters.language))
        if filters.since or filters.until:
            bounds = (day_number(filters.since) or 1, day_number(filters.until) or 99_999_999)
            found.append(tantivy.Query.range_query(self._schema, "day", tantivy.FieldType.Integer, *bounds))
        return [tantivy.Query.const_score_query(condition, 0.0) for condition in found]

    def _near(self, vector: np.ndarray, filters: Filters, found: dict[int, float]) -> dict[int, float]:
        """Returns the cosines of the nearest passages that match the filters and of those already found."""
        any_passage = filters == Filters()
        nearest = self._vectors.nearest(vector, CANDIDATES if any_passage else FILTERED)
        if not any_passage:
            nearest = [ordinal for ordinal in nearest if self._fits(ordinal, filters)][:CANDIDATES]
        near = dict(zip(nearest, self._vectors.cosines(vector, nearest), strict=True))
        near = {ordinal: value for ordinal, value in near.items() if value >= NEAR}
        more = [ordinal for ordinal in found if ordinal not in near]
        return near | dict(zip(more, self._vectors.cosines(vector, more), strict=True))

    def _fits(self, ordinal: int, filters: Filters) -> bool:
        passage = self.passages[ordinal]
        return filters.accept(passage.url, passage.published_at, self.passages.language(ordinal))

    def _relevance(self, asked: Sequence[str], found: dict[int, float], cosine: dict[int, float]) -> dict[int, float]:
        """Returns the full-text relevance of each candidate, 0 when it covers too little of the query."""
        weight = ranking.weights(asked, self._weight, self._unseen)
        return {
            ordinal: ranking.relevance(
                asked, weight, self._features(ordinal), self._title_idf, found.get(ordinal, 0.0), self._unseen
            )
            for ordinal in [*found, *(ordinal for ordinal in cosine if ordinal not in found)]
        }

    def _ordered(self, relevance: dict[int, float], cosine: dict[int, float]) -> list[int]:
        """Returns ordinals, best first.

        Scores are rounded, so that the last bits of float sums do not decide; ties go by id.
        """
        ids = {ordinal: self.passages[ordinal].id for ordinal in {**relevance, **cosine}}
        authority = {o: self.passages[o].authority if self._authority else 0 for o in ids}

        def by(measure: dict[int, float], boost: bool) -> list[int]:
            value = {o: ranking.boosted(v, authority[o]) if boost else v for o, v in measure.items() if v > 0.0}
            return sorted(value, key=lambda o: (-round(value[o], 6), ids[o]))

        if self.mode == "bm25":
            return by(relevance, boost=True)
        if self.mode == "dense":
            return by(cosine, boost=True)
        order = ranking.fused([[ids[o] for o in by(measure, boost=False)] for measure in (relevance, cosine)])
        ordinal = {name: o for o, name in ids.items() if relevance.get(o, 0.0) > 0.0 or cosine.get(o, 0.0) >= NEAR}
        moved = ranking.promoted(
            [name for name in order if name in ordinal],
            lambda name: (relevance.get(ordinal[name], 0.0), max(cosine.get(ordinal[name], 0.0), 0.0)),
            lambda name: authority[ordinal[name]],
        )
        return [ordinal[name] for name in moved]


class EmbeddedBackend:
    """A PassageIndex as the SearchBackend of a host."""

    def __init__(self, index: PassageIndex):
        self.index, self.fingerprint = index, index.fingerprint

    async def search(self, query: str, topk: int, filters: Filters, seconds: float) -> list[Passage]:
        index, vector = self.index, None
        if index._vectors is not None and not isinstance(index._vectors.embedder, dense.Lsa):
            try:
                vector = (await index._vectors.embedder.embed([query], seconds))[0]
            except ToolError:
                raise ToolError("the embedding endpoint refused this query") from None
        if index._size > LARGE:
            found = await asyncio.to_thread(index.search, query, topk, filters, vector)
        else:
            found = index.search(query, topk, filters, vector)
        return [index.passages[ordinal] for ordinal in found]

    async def close(self) -> None:
        if self.index._vectors is not None:
            await self.index._vectors.embedder.close()


def build_vectors(path: Path, embedder: dense.Embedder | None, progress=lambda done: None) -> dense.Embedder:
    """Computes the missing vectors of an index; returns the embedder.

    The offline embedder is fitted when there is none, and again when the number of passages has doubled.
    """
    passages, folder = store.Passages(path), path / "dense"

    def texts(start: int, stop: int) -> list[str]:
        return [f"{passages[i].title} {passages[i].text}" for i in range(start, stop)]

    folder.mkdir(exist_ok=True)
    alive = store.alive(path)
    if embedder is None:
        embedder, fitted = dense.load_embedder(folder), folder / "fitted.txt"
        if embedder is None or len(alive) > 2 * int(fitted.read_text() or 0):
            step = max(1, -(-len(alive) // dense.FIT_PASSAGES))
            embedder = dense.Lsa.fit([texts(int(i), int(i) + 1)[0] for i in alive[::step]])
            fitted.write_text(str(len(alive)))
            embedder.save(folder / "lsa.npz")
    dense.build_dense_index(folder, embedder, _current(path), alive, texts, len(passages), progress)
    return embedder
