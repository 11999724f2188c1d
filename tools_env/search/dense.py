"""Dense vectors of passages: an embedder, the vectors on disk, and their nearest-neighbour index.

The offline embedder is latent semantic analysis of words and their character n-grams, fitted on the index's own
passages. Alternatively, an OpenAI-compatible endpoint embeds with any model.

model.json       the embedder of the vectors
lsa.npz          the fitted projection (offline embedder)
vectors.f32      one unit-length row of float32 per ordinal; rows of removed passages are kept and not searched
faiss.index      rebuilt when the passages change: exact up to EXACT passages, inverted lists above
"""

import asyncio
import hashlib
import json
import math
import os
import zlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from tools_env.errors import ToolError, ToolHostError, Unavailable
from tools_env.search import store, text
from tools_env.search.remote import Remote

DIMENSIONS = 192
FEATURES = 1 << 16  # hashed words and n-grams
FIT_PASSAGES = 20_000  # largest sample that the projection is fitted on
EXACT = 50_000  # above this many passages inverted lists are searched instead of all vectors
PROBES = 16
BATCH = 4096


class Embedder(Protocol):
    dimensions: int
    name: str  # two embedders of the same name give the same vectors

    async def embed(self, texts: Sequence[str], seconds: float) -> np.ndarray:
        """Returns float32 [len(texts), dimensions], rows of unit or zero length. Raises Unavailable."""
        ...

    async def close(self) -> None: ...


class Lsa:
    """Latent semantic analysis (Deerwester et al. 1990) of hashed words and their n-grams of 3 and 4 characters."""

    def __init__(self, idf: np.ndarray, components_FxD: np.ndarray):
        self._idf, self._components_FxD = idf, components_FxD
        self.dimensions = components_FxD.shape[1]
        self.name = "lsa-" + hashlib.sha256(components_FxD.tobytes()).hexdigest()[:16]
        self._features: dict[str, list[int]] = {}

    @classmethod
    def fit(cls, passages: Sequence[str]) -> "Lsa":
        """Returns the projection fitted on passages, or on an even sample of them. Takes about 1 ms a passage."""
        from sklearn.decomposition import TruncatedSVD

        sample = passages[:: -(-len(passages) // FIT_PASSAGES) or 1]
        empty = cls(np.ones(FEATURES, np.float32), np.zeros((FEATURES, 0), np.float32))
        counts = empty._counts(sample)
        idf = np.log((1 + len(sample)) / (1 + np.bincount(counts.indices, minlength=FEATURES))).astype(np.float32) + 1
        dimensions = min(DIMENSIONS, max(1, len(sample) - 1))
        svd = TruncatedSVD(dimensions, n_iter=3, random_state=0)
        used = np.unique(counts.indices)
        components_FxD = np.zeros((FEATURES, dimensions), np.float32)
        if len(used) > dimensions:
            components_FxD[used] = svd.fit(cls(idf, empty._components_FxD)._weighted(counts)[:, used]).components_.T
        return cls(idf, components_FxD)

    async def embed(self, texts: Sequence[str], seconds: float = math.inf) -> np.ndarray:
        return self.vectors(texts)

    async def close(self) -> None:
        pass

    def vectors(self, texts: Sequence[str]) -> np.ndarray:
        """Returns float32 [len(texts), dimensions]."""
        return normalized(np.asarray(self._weighted(self._counts(texts)) @ self._components_FxD, dtype=np.float32))

    def save(self, path: Path) -> None:
        with open(path, "wb") as out:
            np.savez(out, idf=self._idf, components=self._components_FxD)

    @classmethod
    def load(cls, path: Path) -> "Lsa":
        with np.load(path) as saved:
            return cls(saved["idf"], saved["components"])

    def _counts(self, texts: Sequence[str]):
        import scipy.sparse

        columns: list[int] = []
        starts = [0]
        for one in texts:
            for token in text.tokens(one):
                columns += self._of_token(token)
            starts.append(len(columns))
        ones = np.ones(len(columns), np.float32)
        counts = scipy.sparse.csr_matrix((ones, columns, starts), shape=(len(texts), FEATURES))
        counts.sum_duplicates()
        return counts

    def _of_token(self, token: str) -> list[int]:
        found = self._features.get(token)
        if found is None:
            padded = f"<{token}>"
            grams = {padded[i : i + n] for n in (3, 4) for i in range(len(padded) - n + 1)}
            found = [zlib.crc32(gram.encode()) % FEATURES for gram in sorted(grams | {f"={token}"})]
            if len(self._features) < 1 << 18:
                self._features[token] = found
        return found

    def _weighted(self, counts):
        weighted = counts.copy()
        weighted.data = (1.0 + np.log(counts.data)) * self._idf[counts.indices]
        norms = np.sqrt(np.asarray(weighted.multiply(weighted).sum(axis=1)).ravel())
        weighted.data /= np.repeat(np.maximum(norms, 1e-9), np.diff(weighted.indptr)).astype(np.float32)
        return weighted


class EndpointEmbedder:
    """An OpenAI-compatible `/v1/embeddings` endpoint. Vectors are normalized."""

    def __init__(self, remote: Remote, model: str, dimensions: int):
        self._remote, self._model = remote, model
        self.dimensions = dimensions
        self.name = f"{remote.url} {model} {dimensions}"

    async def embed(self, texts: Sequence[str], seconds: float) -> np.ndarray:
        reply = await self._remote.post("/embeddings", seconds, json={"model": self._model, "input": list(texts)})
        try:
            rows = sorted(reply["data"], key=lambda row: row["index"])
            vectors = np.array([row["embedding"] for row in rows], np.float32)
        except (KeyError, TypeError, ValueError):
            raise Unavailable("the embedding endpoint gave another reply than documented") from None
        if vectors.shape != (len(texts), self.dimensions) or not np.isfinite(vectors).all():
            raise Unavailable(
                f"expected {len(texts)} embeddings of {self.dimensions} numbers, got an array of "
                f"shape {vectors.shape}; "
                "correct embeddings_dimensions"
            )
        return normalized(vectors)

    async def close(self) -> None:
        await self._remote.close()


def normalized(vectors: np.ndarray) -> np.ndarray:
    """Returns the rows scaled to unit length; a zero row stays."""
    return vectors / np.maximum(np.linalg.norm(vectors, axis=-1, keepdims=True), 1e-12)


class Vectors:
    """Vectors of an index with nearest-neighbor search, memory-mapped."""

    def __init__(self, folder: Path, embedder: Embedder):
        """Opens what `build_dense_index` made.

        Raises OSError or ValueError when it is missing or of another embedder.
        """
        import faiss

        made = json.loads((folder / "model.json").read_text())
        if made["embedder"] != embedder.name:
            raise ValueError("other embedder")
        self.embedder = embedder
        self.fingerprint = made["fingerprint"]
        self._rows = np.memmap(folder / "vectors.f32", np.float32, "r").reshape(-1, embedder.dimensions)
        self._index = faiss.read_index(str(folder / "faiss.index"), faiss.IO_FLAG_MMAP)
        if self._index.ntotal > EXACT:
            faiss.extract_index_ivf(self._index).nprobe = PROBES

    def nearest(self, vector: np.ndarray, count: int) -> list[int]:
        """Returns ordinals, nearest first."""
        count = min(count, self._index.ntotal)
        _, found = self._index.search(vector[None], count) if count else (None, np.empty((1, 0), int))
        return [int(ordinal) for ordinal in found[0] if ordinal >= 0]

    def cosines(self, vector: np.ndarray, ordinals: Sequence[int]) -> list[float]:
        return [round(float(value), 6) for value in self._rows[list(ordinals)] @ vector] if ordinals else []


def load_embedder(folder: Path) -> Lsa | None:
    """Returns the fitted offline embedder of an index, or None."""
    try:
        return Lsa.load(folder / "lsa.npz")
    except (OSError, ValueError, KeyError):
        return None


def build_dense_index(
    folder: Path,
    embedder: Embedder,
    fingerprint: str,
    alive: np.ndarray,
    texts: Callable[[int, int], list[str]],
    count: int,
    progress: Callable[[int], Any] = lambda done: None,
) -> None:
    """Updates the vectors: existing rows stay, missing ones are embedded, and the index is rebuilt.

    A killed build continues after the last whole row.

    Args:
      folder: where the files go.
      fingerprint: of the passages.
      alive: sorted ordinals of the searchable passages.
      texts: returns the texts to embed for a range of ordinals.
      count: number of ordinals.
      progress: called with the number of finished rows.

    Raises ToolHostError when the endpoint does not answer.
    """
    folder.mkdir(parents=True, exist_ok=True)
    begun, rows_path = folder / "embedder.txt", folder / "vectors.f32"
    if not begun.exists() or begun.read_text() != embedder.name:
        rows_path.unlink(missing_ok=True)
        begun.write_text(embedder.name)
    width = 4 * embedder.dimensions

    async def embed_rest(out) -> None:
        done, step = out.tell() // width, BATCH if isinstance(embedder, Lsa) else 64
        try:
            for start in range(done, count, step):
                vectors = await embedder.embed(texts(start, min(start + step, count)), 120.0)
                out.write(vectors.astype(np.float32).tobytes())
                progress(start + len(vectors))
        except (Unavailable, ToolError) as error:
            raise ToolHostError(
                f"{error}; fix the endpoint and repeat the command, which continues from here"
            ) from None
        finally:
            await embedder.close()

    with open(rows_path, "ab") as out:
        out.truncate(min(out.tell() // width, count) * width)
        out.seek(0, os.SEEK_END)
        asyncio.run(embed_rest(out))
        out.flush()
        os.fsync(out.fileno())
    _index(folder, embedder.dimensions, alive)
    store.write_atomically(
        folder / "model.json", json.dumps({"embedder": embedder.name, "fingerprint": fingerprint}).encode()
    )


def _index(folder: Path, dimensions: int, alive: np.ndarray) -> None:
    import faiss

    rows = np.memmap(folder / "vectors.f32", np.float32, "r") if len(alive) else np.empty(0, np.float32)
    rows = rows.reshape(-1, dimensions)
    lists = int(4 * math.sqrt(len(alive)))
    kind = "IDMap,Flat" if len(alive) <= EXACT else f"IVF{lists},Flat"
    index = faiss.index_factory(dimensions, kind, faiss.METRIC_INNER_PRODUCT)
    if len(alive) > EXACT:
        index.train(np.asarray(rows[alive[:: max(1, len(alive) // (40 * lists))]]))
    for start in range(0, len(alive), BATCH):
        chosen = alive[start : start + BATCH]
        index.add_with_ids(np.asarray(rows[chosen]), chosen.astype(np.int64))
    temporary = folder / f".faiss.{os.getpid()}.tmp"
    faiss.write_index(index, str(temporary))
    os.replace(temporary, folder / "faiss.index")
