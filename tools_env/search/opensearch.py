"""OpenSearch backend, shared by several hosts: BM25, k-nearest-neighbor vectors or both, over HTTP.

Text is tokenized here (text.py) and split at white space by the cluster, so that English and Chinese match as in the
embedded index, and the cluster needs no plugin but its own k-NN. Authority is a function_score in the mode `bm25`, a
factor on scores in `dense`, and `ranking.promoted` after fusion in `hybrid`.
"""

import json
import uuid
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from tools_env.errors import ToolError, Unavailable
from tools_env.search import dense, ranking, text
from tools_env.search.backend import Filters, Passage, host_of
from tools_env.search.remote import Remote

BULK = 500  # passages of one bulk request
CANDIDATES = 64
_TOKENS = {"type": "text", "analyzer": "whitespace", "norms": True}
_FIELDS = ("id", "url", "title", "text", "authority", "published_at")
_HEADERS = {"Content-Type": "application/x-ndjson"}


def index_mapping(dimensions: int) -> dict[str, Any]:
    """Returns settings and mappings of the index; `dimensions` 0: no vectors."""
    keyword, shown = {"type": "keyword"}, {"type": "text", "index": False}
    fields: dict[str, Any] = {
        "id": keyword,
        "url": keyword,
        "title": shown,
        "text": shown,
        "authority": {"type": "integer"},
        "published_at": {"type": "date", "format": "yyyy-MM-dd||yyyy-MM||yyyy"},
        "site": keyword,  # the host and its parent domains
        "lang": keyword,
        "body_tokens": _TOKENS,
        "title_tokens": _TOKENS,
        "generation": keyword,
    }
    if dimensions:
        method = {"name": "hnsw", "engine": "lucene", "space_type": "cosinesimil"}
        fields["vector"] = {"type": "knn_vector", "dimension": dimensions, "method": method}
    return {"settings": {"index": {"knn": bool(dimensions)}}, "mappings": {"dynamic": "strict", "properties": fields}}


class OpenSearchBackend:
    """Searches one OpenSearch index."""

    def __init__(
        self,
        remote: Remote,
        index: str,
        mode: str = "bm25",
        authority: bool = True,
        embedder: dense.Embedder | None = None,
    ):
        self._remote, self._index, self._mode, self._embedder = remote, index, mode, embedder
        self._authority = authority
        name = embedder.name if embedder else ""
        self.fingerprint = f"opensearch {remote.url} {index} {mode} {authority} {name}"

    async def search(self, query: str, topk: int, filters: Filters, seconds: float) -> list[Passage]:
        asked = text.tokens(query)[:64]
        if not asked:
            return []
        conditions, bodies = _conditions(filters), []
        if self._mode != "dense":
            bodies.append(self._full_text(asked, conditions))
        if self._mode != "bm25":
            vector = (await self._embedder.embed([query], seconds))[0]
            near: dict[str, Any] = {"vector": [float(x) for x in vector], "k": CANDIDATES}
            if conditions:
                near["filter"] = {"bool": {"filter": conditions}}
            bodies.append({"query": {"knn": {"vector": near}}})
        lines = [line for body in bodies for line in ({}, {"size": CANDIDATES, "_source": list(_FIELDS), **body})]
        reply = await self._remote.post(
            f"/{self._index}/_msearch", seconds, data="".join(json.dumps(x) + "\n" for x in lines), headers=_HEADERS
        )
        return _merged(self._hits(reply, len(bodies)), self._mode, self._authority)[:topk]

    def _full_text(self, asked: Sequence[str], conditions: list[dict]) -> dict[str, Any]:
        match = {
            "multi_match": {
                "query": " ".join(asked),
                "fields": ["body_tokens", "title_tokens"],
                "type": "most_fields",
                "analyzer": "whitespace",
            }
        }
        found: dict[str, Any] = {"bool": {"must": [match], "filter": conditions}}
        if self._authority and self._mode == "bm25":
            weights = [
                {"filter": {"term": {"authority": level}}, "weight": ranking.boosted(1.0, level)} for level in (1, 2)
            ]
            found = {
                "function_score": {
                    "query": found,
                    "functions": weights,
                    "score_mode": "first",
                    "boost_mode": "multiply",
                }
            }
        return {"query": found}

    def _hits(self, reply: dict[str, Any], expected: int) -> list[dict[str, tuple[Passage, float]]]:
        try:
            responses = reply["responses"]
            failed = next((r for r in responses if "error" in r or r.get("timed_out")), None)
            if failed is not None:
                status = failed.get("status", 200)
                if status == 400:
                    raise ToolError("the search cluster refused this query (400)")
                raise Unavailable(f"the search cluster answered {status} within its reply")
            found = []
            for response in responses:
                # The engine's score for cosinesimil is (1 + cosine) / 2, on which authority would weigh double.
                vectors = self._mode == "dense" or len(found) == 1
                scores = [float(hit["_score"]) for hit in response["hits"]["hits"]]
                scores = [max(2 * score - 1, 0.0) for score in scores] if vectors else scores
                rows = list(zip((hit["_source"] for hit in response["hits"]["hits"]), scores, strict=True))
                found.append({row["id"]: (Passage(**{n: row.get(n) for n in _FIELDS}), score) for row, score in rows})
            if len(found) != expected:
                raise ValueError("number of responses")
        except (KeyError, TypeError, ValueError, AttributeError):
            raise Unavailable("the search cluster gave another reply than documented") from None
        return found

    async def close(self) -> None:
        await self._remote.close()
        if self._embedder:
            await self._embedder.close()


def _conditions(filters: Filters) -> list[dict]:
    found: list[dict] = []
    if filters.site:
        found.append({"term": {"site": filters.host}})
    if filters.language:
        found.append({"term": {"lang": filters.language}})
    bounds = {name: day for name, day in (("gte", filters.since), ("lte", filters.until)) if day}
    if bounds:
        found.append({"range": {"published_at": bounds}})
    return found


def _merged(hits: list[dict[str, tuple[Passage, float]]], mode: str, authority: bool) -> list[Passage]:
    """Returns passages, best first; a text that several pages share appears once."""
    passages = {name: passage for found in hits for name, (passage, _) in found.items()}

    def level(name: str) -> int:
        return int(passages[name].authority or 0) if authority else 0

    def by(found: dict[str, tuple[Passage, float]], boost: bool) -> list[str]:
        value = {name: ranking.boosted(score, level(name) if boost else 0) for name, (_, score) in found.items()}
        return sorted(value, key=lambda name: (-round(value[name], 6), name))

    if mode == "hybrid":
        order = ranking.promoted(
            ranking.fused([by(found, boost=False) for found in hits]),
            lambda name: [found[name][1] if name in found else 0.0 for found in hits],
            level,
        )
    else:
        order = by(hits[0], boost=mode == "dense")
    unique: dict[str, Passage] = {}
    for name in order:
        unique.setdefault(passages[name].text, passages[name])
    return list(unique.values())


async def push_passages(
    remote: Remote,
    index: str,
    rows: Iterable[tuple[Passage, str]],
    embedder: dense.Embedder | None = None,
    progress: Callable[[int], Any] = lambda done: None,
) -> int:
    """Replaces the content of the OpenSearch index by these passages (with their languages); returns their number.

    Passages are keyed by citation id, so a repeated push overwrites them; passages of earlier pushes are deleted last.
    Raises Unavailable or ToolError when the cluster does not answer or refuses.
    """
    try:
        await remote.get(f"/{index}", 30.0)
    except ToolError:
        # The index does not exist yet.
        await remote.put(f"/{index}", 30.0, json=index_mapping(embedder.dimensions if embedder else 0))
    generation, done, batch = uuid.uuid4().hex, 0, []

    async def send() -> None:
        vectors = await embedder.embed([f"{p.title} {p.text}" for p, _ in batch], 120.0) if embedder else None
        lines = []
        for i, (passage, lang) in enumerate(batch):
            host = host_of(passage.url)
            document = vars(passage) | {
                "site": [host.split(".", n)[-1] for n in range(host.count(".") + 1)],
                "lang": lang,
                "body_tokens": " ".join(text.tokens(passage.text)),
                "title_tokens": " ".join(text.tokens(passage.title)),
                "generation": generation,
            }
            if vectors is not None:
                document["vector"] = [float(x) for x in vectors[i]]
            lines += [{"index": {"_id": passage.id}}, document]
        body = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
        reply = await remote.post(f"/{index}/_bulk", 120.0, data=body.encode(), headers=_HEADERS)
        if reply.get("errors") is not False:
            first = next((item for item in reply.get("items", ()) if item.get("index", {}).get("error")), {})
            reason = str(first.get("index", {}).get("error", {}).get("reason", "no reason given"))[:200]
            raise Unavailable(f"the search cluster did not take all passages: {reason}")

    for row in rows:
        batch.append(row)
        if len(batch) == BULK:
            await send()
            done += len(batch)
            progress(done)
            batch.clear()
    if batch:
        await send()
        done += len(batch)
        progress(done)
    old = {"query": {"bool": {"must_not": [{"term": {"generation": generation}}]}}}
    await remote.post(f"/{index}/_refresh", 60.0)
    await remote.post(f"/{index}/_delete_by_query?conflicts=proceed&refresh=true", 300.0, json=old)
    return done
