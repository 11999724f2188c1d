"""Makes the search backend that a host's settings name."""

import asyncio
import json
import os
from collections.abc import Mapping

import aiohttp

from tools_env.errors import ToolHostError
from tools_env.search import dense
from tools_env.search.backend import SearchBackend
from tools_env.search.citations import Citations
from tools_env.search.index import MODES, EmbeddedBackend, PassageIndex
from tools_env.search.opensearch import OpenSearchBackend
from tools_env.search.providers import WebBackend
from tools_env.search.remote import Remote, read_secret
from tools_env.service.settings import HostSettings

_VECTORS = ("embeddings_url", "embeddings_model", "embeddings_dimensions", "embeddings_key_variable")
OPTIONS = {
    "embedded": _VECTORS,
    "opensearch": ("url", "index", "user", "password_variable", *_VECTORS),
    "web": ("kind", "url", "key_variable", "authority"),
}


async def make_search_backend(settings: HostSettings, authority: Mapping[str, int]) -> tuple[SearchBackend, Citations]:
    """Returns the search backend and its citation ids. Raises ToolHostError for wrong options."""
    options, timeout = read_search_options(settings.search, settings.search_options), settings.search_timeout
    mode, boost = settings.search_ranking, not settings.search_without_authority
    if mode not in MODES:
        raise ToolHostError(f"expected search_ranking as one of {', '.join(MODES)}, got {mode!r}")
    if settings.search == "web":
        return _web(options, timeout, authority)
    embedder = make_embedder(options, timeout) if mode != "bm25" else None
    if settings.search == "opensearch":
        if mode != "bm25" and embedder is None:
            raise ToolHostError(f"search_ranking {mode} over opensearch needs embeddings_url in search_options")
        remote = make_cluster_client(options, timeout)
        return OpenSearchBackend(remote, str(options["index"]), mode, boost, embedder), Citations()
    index = await asyncio.to_thread(PassageIndex, settings.offline_web, mode, authority=boost, embedder=embedder)
    return EmbeddedBackend(index), index.citations


def read_search_options(search: str, options_json: str) -> dict:
    """Returns the options of a kind of search. Raises ToolHostError for wrong ones."""
    if search not in OPTIONS:
        raise ToolHostError(f"expected search as one of {', '.join(OPTIONS)}, got {search!r}")
    try:
        options = json.loads(options_json or "{}")
        if not isinstance(options, dict):
            raise ValueError("no object")
    except ValueError as error:
        raise ToolHostError(f"search_options must be a JSON object, got {options_json[:80]!r} ({error})") from None
    for name in options:
        if name not in OPTIONS[search]:
            raise ToolHostError(f"search {search} has no option {name}; its options are {', '.join(OPTIONS[search])}")
    for name in {"opensearch": ("url", "index"), "web": ("kind", "url")}.get(search, ()):
        if name not in options:
            raise ToolHostError(f"search {search} needs {name}; put it into search_options")
    return options


def make_cluster_client(options: Mapping, timeout: float) -> Remote:
    """Returns the client of the search cluster that the options name. Raises ToolHostError."""
    headers = {}
    if user := options.get("user"):
        password = read_secret(options.get("password_variable", "STEPDR_SEARCH_PASSWORD"), "the search cluster")
        headers["Authorization"] = aiohttp.BasicAuth(user, password).encode()
    return Remote(str(options["url"]), "the search cluster", timeout, headers)


def make_embedder(options: Mapping, timeout: float) -> dense.EndpointEmbedder | None:
    """Returns the embedder of the endpoint that the options name, or None. Raises ToolHostError."""
    if not options.get("embeddings_url"):
        return None
    model, dimensions = options.get("embeddings_model"), options.get("embeddings_dimensions")
    if not model or not isinstance(dimensions, int) or dimensions <= 0:
        raise ToolHostError("embeddings_url needs embeddings_model and embeddings_dimensions (a number)")
    headers = {}
    if variable := options.get("embeddings_key_variable"):
        headers["Authorization"] = f"Bearer {read_secret(variable, 'the embedding endpoint')}"
    remote = Remote(str(options["embeddings_url"]), "the embedding endpoint", timeout, headers)
    return dense.EndpointEmbedder(remote, str(model), dimensions)


def _web(options: Mapping, timeout: float, authority: Mapping[str, int]) -> tuple[SearchBackend, Citations]:
    kind, citations = options["kind"], Citations()
    if kind not in ("searxng", "serper"):
        raise ToolHostError(f"expected the web search's kind as searxng or serper, got {kind!r}")
    levels = options.get("authority", {})
    if not isinstance(levels, dict) or any(level not in (0, 1, 2) for level in levels.values()):
        raise ToolHostError('expected authority as an object of host to 0, 1 or 2, as {"who.int": 2}')
    variable, headers = options.get("key_variable", ""), {}
    if kind == "serper":
        headers["X-API-KEY"] = read_secret(variable or "SERPER_API_KEY", "the search provider")
    elif variable and os.environ.get(variable):
        headers["Authorization"] = f"Bearer {os.environ[variable]}"
    remote = Remote(str(options["url"]), "the search provider", timeout, headers)
    return WebBackend(remote, kind, {**authority, **levels}, citations), citations
