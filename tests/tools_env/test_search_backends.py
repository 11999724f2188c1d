"""Facts about search beyond this machine, against small servers on loopback that check the documented wire formats."""

import asyncio
import contextlib
import json

import numpy as np
import pytest
from aiohttp import web

from tools_env import index as command
from tools_env.client import ToolInfraError, ToolsClient
from tools_env.errors import ToolError, ToolHostError, Unavailable
from tools_env.search import choose
from tools_env.search.backend import Filters
from tools_env.search.citations import Citations
from tools_env.search.index import EmbeddedBackend, PassageIndex
from tools_env.search.opensearch import OpenSearchBackend
from tools_env.search.providers import WebBackend
from tools_env.search.remote import Remote
from tools_env.service.host import start_host
from tools_env.service.settings import HostSettings


@contextlib.asynccontextmanager
async def served(app, port=0):
    runner = web.AppRunner(app, access_log=None)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", port, shutdown_timeout=0.1, reuse_address=True).start()
    try:
        yield runner.addresses[0][1]
    finally:
        await runner.cleanup()


class Cluster:
    """Just enough of OpenSearch's HTTP interface: documents by id, bulk, msearch with a crude score, delete by query."""

    def __init__(self):
        self.documents, self.mapping, self.requests, self.answer = {}, None, [], None

    def app(self):
        app = web.Application(client_max_size=1 << 26)
        app.router.add_route("*", "/passages{rest:.*}", self.handle)
        return app

    async def handle(self, request):
        rest, body = request.match_info["rest"], await request.text()
        self.requests.append((request.method, rest, body))
        if self.answer is not None:
            return await self.answer(request) if callable(self.answer) else self.answer
        if (request.method, rest) == ("GET", ""):
            return web.json_response(
                {"passages": self.mapping} if self.mapping else {}, status=200 if self.mapping else 404
            )
        if (request.method, rest) == ("PUT", ""):
            self.mapping = json.loads(body)
            return web.json_response({"acknowledged": True})
        if rest == "/_bulk":
            assert request.content_type == "application/x-ndjson" and body.endswith("\n")
            lines = [json.loads(line) for line in body.splitlines()]
            for action, document in zip(lines[::2], lines[1::2], strict=True):
                assert set(document) <= set(self.mapping["mappings"]["properties"]), "the mapping is strict"
                self.documents[action["index"]["_id"]] = document
            return web.json_response({"errors": False, "items": [{"index": {"status": 201}} for _ in lines[::2]]})
        if rest == "/_refresh":
            return web.json_response({"_shards": {}})
        if rest == "/_delete_by_query":
            (kept,) = json.loads(body)["query"]["bool"]["must_not"]
            old = [i for i, d in self.documents.items() if d["generation"] != kept["term"]["generation"]]
            for name in old:
                del self.documents[name]
            return web.json_response({"deleted": len(old)})
        assert rest == "/_msearch" and request.content_type == "application/x-ndjson" and body.endswith("\n")
        lines = [json.loads(line) for line in body.splitlines()]
        assert all(header == {} for header in lines[::2])
        return web.json_response({"responses": [self.search(one) for one in lines[1::2]]})

    def search(self, body):
        query, functions = body["query"], []
        if "knn" in query:
            near = query["knn"]["vector"]
            scores = {
                name: (1 + float(np.dot(near["vector"], document["vector"]))) / 2
                for name, document in self.documents.items()
            }
            conditions = near.get("filter", {"bool": {"filter": []}})["bool"]["filter"]
        else:
            if "function_score" in query:
                functions, query = query["function_score"]["functions"], query["function_score"]["query"]
            (must,), conditions = query["bool"]["must"], query["bool"]["filter"]
            asked = must["multi_match"]["query"].split()
            assert must["multi_match"]["fields"] == ["body_tokens", "title_tokens"]
            scores = {n: float(sum(t in d["body_tokens"].split() for t in asked)) for n, d in self.documents.items()}
        hits = []
        for name, score in scores.items():
            document = self.documents[name]
            weight = next(
                (f["weight"] for f in functions if f["filter"]["term"]["authority"] == document["authority"]), 1
            )
            if score > 0 and all(fits(document, condition) for condition in conditions):
                hits.append(
                    {"_id": name, "_score": score * weight, "_source": {k: document[k] for k in body["_source"]}}
                )
        hits.sort(key=lambda hit: -hit["_score"])
        return {"status": 200, "timed_out": False, "hits": {"hits": hits[: body["size"]]}}


def fits(document, condition):
    ((kind, what),) = condition.items()
    ((field, value),) = what.items()
    if kind == "term":
        return value in document[field] if isinstance(document[field], list) else value == document[field]
    date = document[field]
    return date is not None and value.get("gte", "") <= date <= value.get("lte", "9")


async def embeddings(request):
    """An OpenAI-compatible endpoint: letters counted, so that equal letters are near."""
    assert request.headers["Authorization"] == "Bearer secret"
    body = await request.json()
    assert body["model"] == "letters"
    rows = [[1 + text.lower().count(letter) for letter in "abcdefghijklmnopqrstuvwxyz"] for text in body["input"]]
    data = [{"object": "embedding", "index": i, "embedding": row} for i, row in enumerate(rows)]
    return web.json_response({"object": "list", "data": data[::-1], "model": "letters"})


def embedding_app():
    app = web.Application()
    app.router.add_post("/v1/embeddings", embeddings)
    return app


def vector_options(port):
    return {
        "embeddings_url": f"http://127.0.0.1:{port}/v1",
        "embeddings_model": "letters",
        "embeddings_dimensions": 26,
        "embeddings_key_variable": "EMBEDDINGS_KEY",
    }


@pytest.fixture
def rows(tmp_path):
    documents = [
        ("http://a.example/1", "The harbour of Alpha opened in 1871.", "2024-01-02", 0, "en"),
        ("http://b.example/2", "The harbour of Alpha opened in 1871, they say.", "2025-01-02", 2, "en"),
        ("http://www.b.example/3", "Alpha has a park.", None, 2, "en"),
        ("http://c.example/4", "阿尔法的港口于1871年开放。", "2025-02-03", 1, "zh"),
    ]
    path = tmp_path / "rows.jsonl"
    keys = ("url", "text", "published_at", "authority", "lang")
    lines = [json.dumps({"title": "Page", **dict(zip(keys, row, strict=True))}) + "\n" for row in documents]
    path.write_text("".join(lines))
    return path


async def pushed(rows, out, port, **more):
    options = json.dumps({"url": f"http://127.0.0.1:{port}", "index": "passages", **more})
    arguments = [f"--out={out}", str(rows), f"--opensearch={options}"]
    return await asyncio.to_thread(command.main, arguments)


def test_opensearch_holds_what_was_indexed_and_answers_filtered_queries(rows, tmp_path, monkeypatch):
    monkeypatch.setenv("EMBEDDINGS_KEY", "secret")

    async def main():
        cluster = Cluster()
        async with served(cluster.app()) as port, served(embedding_app()) as vectors:
            assert await pushed(rows, tmp_path / "out", port, **vector_options(vectors)) == 0
            assert cluster.mapping["settings"]["index"]["knn"] is True
            assert cluster.mapping["mappings"]["properties"]["vector"]["dimension"] == 26
            assert len(cluster.documents) == 4
            index = PassageIndex(tmp_path / "out")
            assert {p.id for p in index.passages} == set(cluster.documents), "citation ids are those of the local index"
            # A repeat after a change leaves exactly the new state.
            rows.write_text("".join(rows.read_text().splitlines(keepends=True)[:3]))
            assert await pushed(rows, tmp_path / "out", port, **vector_options(vectors)) == 0
            assert len(cluster.documents) == 3

            for mode in ("bm25", "dense", "hybrid"):
                embedder = choose.make_embedder(vector_options(vectors), 5.0)
                backend = OpenSearchBackend(
                    Remote(f"http://127.0.0.1:{port}", "the search cluster", 5.0), "passages", mode, True, embedder
                )

                async def urls(query, topk=5, backend=backend, **filters):
                    return [p.url for p in await backend.search(query, topk, Filters(**filters), 5.0)]

                first = await urls("harbour of Alpha opened in 1871")
                # Comparable: authority decides. Clearly less relevant: it does not.
                assert first[:2] == ["http://b.example/2", "http://a.example/1"], mode
                assert first.index("http://www.b.example/3") == 2
                assert set(await urls("Alpha", site="b.example")) == {"http://b.example/2", "http://www.b.example/3"}
                assert await urls("Alpha", since="2024-01-01", until="2024-12-31") == ["http://a.example/1"]
                assert await urls("Alpha", language="zh") == []
                assert len(await urls("Alpha", topk=1)) == 1
                await backend.close()

    asyncio.run(main())


@pytest.mark.parametrize(
    "answer, error, words",
    [
        (web.Response(status=503), Unavailable, "answered 503"),
        (web.Response(status=401), Unavailable, "answered 401"),
        (web.Response(status=400), ToolError, "refused this query"),
        (web.Response(text="<html>"), Unavailable, "gave no JSON"),
        (web.json_response({"responses": [{"hits": {}}]}), Unavailable, "another reply than documented"),
        (web.json_response({"responses": [{"error": {}, "status": 503}]}), Unavailable, "503 within its reply"),
        (lambda request: asyncio.sleep(30), Unavailable, "took too long"),
    ],
)
def test_failures_of_the_cluster_are_typed_and_bounded(answer, error, words):
    async def main():
        cluster = Cluster()
        cluster.answer = (lambda request: answer(request)) if callable(answer) else _copy(answer)
        async with served(cluster.app()) as port:
            backend = OpenSearchBackend(Remote(f"http://127.0.0.1:{port}", "the search cluster", 0.3), "passages")
            with pytest.raises(error, match=words):
                await backend.search("harbour", 2, Filters(), 5.0)
            await backend.close()

    asyncio.run(asyncio.wait_for(main(), 10))


def _copy(response):
    async def answer(request):
        return web.Response(status=response.status, body=response.body, content_type=response.content_type)

    return answer


def test_cluster_that_dies_in_use_gives_typed_errors_and_is_used_again_when_back(rows, tmp_path):
    async def main():
        cluster = Cluster()
        async with served(cluster.app()) as port:
            assert await pushed(rows, tmp_path / "out", port) == 0
            options = json.dumps({"url": f"http://127.0.0.1:{port}", "index": "passages"})
            host = await start_host(
                HostSettings(search="opensearch", search_options=options, cache_failure_seconds=0.0)
            )
            client = ToolsClient(host.address)
            session = await client.open_session("e")
            found = await session.call("batch_web_surfer", {"queries": ["harbour of Alpha"]}, call_id="0")
            assert found.outcome == "ok" and found.sources[0].url == "http://b.example/2"
        try:
            with pytest.raises(ToolInfraError) as caught:
                await session.call("batch_web_surfer", {"queries": ["park"]}, call_id="1", timeout=20)
            assert "UNAVAILABLE" in str(caught.value.status)
            known = await session.call("batch_web_surfer", {"queries": ["harbour of Alpha"]}, call_id="2")
            assert known.outcome == "ok" and known.cache_hit, "what is in the cache is still served"
            async with served(cluster.app(), port):
                again = await session.call("batch_web_surfer", {"queries": ["park"]}, call_id="3")
                assert [source.text for source in again.sources] == ["Alpha has a park."]
        finally:
            await client.close()
            await host.stop()

    asyncio.run(main())


def test_searxng_is_asked_and_read_as_documented():
    async def search(request):
        assert request.method == "GET" and request.path == "/search"
        asked = dict(request.query)
        assert asked["format"] == "json" and asked["language"] == "en" and asked["q"] == "harbour site:b.example"
        row = {"engine": "x", "score": 1.0, "title": "Harbour", "content": "It opened\n in 1871."}
        results = [
            {**row, "url": "http://b.example/1", "publishedDate": "2025-03-01T00:00:00"},
            {**row, "url": "http://b.example/old", "publishedDate": "2020-03-01T00:00:00"},
            {**row, "url": "http://b.example/none", "publishedDate": None},
            {**row, "url": "ftp://b.example/x"},
            {**row, "url": "http://other.example/", "publishedDate": "2025-03-01T00:00:00"},
        ]
        return web.json_response({"query": asked["q"], "results": results, "answers": []})

    async def main():
        app = web.Application()
        app.router.add_get("/search", search)
        async with served(app) as port:
            remote = Remote(f"http://127.0.0.1:{port}", "the search provider", 5.0)
            backend = WebBackend(remote, "searxng", {"b.example": 2}, Citations())
            asked = Filters(site="b.example", since="2024-01-01", language="en")
            (found,) = await backend.search("harbour", 3, asked, 5.0)
            assert (found.url, found.text, found.authority) == ("http://b.example/1", "It opened in 1871.", 2)
            assert found.published_at == "2025-03-01"
            assert found.id == Citations().id(found.url, found.text)
            await backend.close()

    asyncio.run(main())


def test_serper_is_asked_and_read_as_documented_and_needs_its_key(monkeypatch):
    async def search(request):
        assert request.headers["X-API-KEY"] == "key" and request.content_type == "application/json"
        assert await request.json() == {"q": "港口", "num": 10, "hl": "zh-cn", "tbs": "cdr:1,cd_min:1/2/2024"}
        row = {"title": "港口", "link": "https://b.example/1", "snippet": "港口于1871年开放。", "position": 1}
        return web.json_response({"organic": [{**row, "date": "Mar 1, 2025"}], "credits": 1})

    async def main():
        app = web.Application()
        app.router.add_post("/search", search)
        async with served(app) as port:
            options = json.dumps({"kind": "serper", "url": f"http://127.0.0.1:{port}", "authority": {"b.example": 1}})
            settings = HostSettings(search="web", search_options=options)
            monkeypatch.delenv("SERPER_API_KEY", raising=False)
            with pytest.raises(ToolHostError, match="SERPER_API_KEY is not set"):
                await choose.make_search_backend(settings, {})
            monkeypatch.setenv("SERPER_API_KEY", "key")
            backend, _ = await choose.make_search_backend(settings, {})
            (found,) = await backend.search("港口", 3, Filters(since="2024-01-02", language="zh"), 5.0)
            assert (found.text, found.authority, found.published_at) == ("港口于1871年开放。", 1, "2025-03-01")
            await backend.close()

    asyncio.run(main())


def test_embedding_endpoint_makes_and_asks_the_vectors(rows, tmp_path, monkeypatch):
    monkeypatch.setenv("EMBEDDINGS_KEY", "secret")

    async def main():
        async with served(embedding_app()) as port:
            options = json.dumps(vector_options(port))
            out = tmp_path / "out"
            arguments = [f"--out={out}", str(rows), "--vectors=endpoint", f"--search_options={options}"]
            assert await asyncio.to_thread(command.main, arguments) == 0
            settings = HostSettings(offline_web=str(out), search_ranking="dense", search_options=options)
            backend, _ = await choose.make_search_backend(settings, {})
            assert isinstance(backend, EmbeddedBackend)
            found = await backend.search("Park: a Page Alpha has", 1, Filters(), 5.0)
            assert found[0].text == "Alpha has a park."
        with pytest.raises(Unavailable, match="the embedding endpoint cannot be reached"):
            await backend.search("another query", 1, Filters(), 5.0)
        await backend.close()

    asyncio.run(main())


@pytest.mark.parametrize(
    "search, options, message",
    [
        ("elsewhere", "", "expected search as one of embedded, opensearch, web"),
        ("web", "[]", "must be a JSON object"),
        ("web", '{"kind": "bing", "url": "http://x"}', "searxng or serper"),
        ("web", '{"kind": "searxng"}', "needs url"),
        ("opensearch", '{"url": "http://x", "index": "i", "colour": 1}', "has no option colour"),
        ("opensearch", '{"url": "x:9200", "index": "i"}', "expected the search cluster as http://host:port"),
        ("embedded", "", "expected --offline_web=DIR"),
    ],
)
def test_wrong_search_options_are_named_at_the_start(search, options, message):
    with pytest.raises(ToolHostError, match=message):
        asyncio.run(start_host(HostSettings(search=search, search_options=options)))
