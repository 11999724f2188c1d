"""Builds the tool service of one process from its settings: search, offline web, cache, sessions and tools."""

import asyncio
import contextlib
import fcntl
import logging
import shutil
import tempfile
from pathlib import Path

from tools_env.cache.retrieval import RetrievalCache
from tools_env.cache.stores import CacheStore, RedisStore, SqliteStore
from tools_env.errors import ToolHostError
from tools_env.offline_web.server import OfflineWebServer, read_hosts
from tools_env.search import choose
from tools_env.service.metrics import Metrics
from tools_env.service.service import ToolService
from tools_env.service.sessions import Sessions
from tools_env.service.settings import HostSettings
from tools_env.tools import file, optional, todo, web
from tools_env.web.egress import EgressPolicy
from tools_env.web.fetch import Fetcher

logger = logging.getLogger(__name__)


async def make_service(settings: HostSettings, resources: contextlib.AsyncExitStack, metrics: Metrics) -> ToolService:
    """Returns the service without a transport; closing `resources` releases what it holds. Raises ToolHostError."""
    if not settings.offline_web and settings.search == "embedded":
        raise ToolHostError(
            "expected --offline_web=DIR: an offline web, or a directory made by `python -m tools_env.index`"
        )
    hosts = read_hosts(settings.offline_web) if settings.offline_web else {}
    sites = {name: int(host.get("authority", 0)) for name, host in hosts.items()}
    backend, citations = await choose.make_search_backend(settings, sites)
    resources.push_async_callback(backend.close)
    web_port = settings.web_port
    if web_port is None and settings.offline_web:
        web_server = OfflineWebServer(settings.offline_web)
        web_port = web_server.start()
        resources.callback(web_server.stop)
    if settings.state_dir is None:
        state = Path(tempfile.mkdtemp(prefix="stepdr_tools_"))
        resources.callback(shutil.rmtree, state, ignore_errors=True)
    else:
        state = Path(settings.state_dir)
        _lock(state, settings.worker, resources)
    cache = RetrievalCache(
        store=_store(settings, state, resources),
        entries=settings.cache_entries,
        mode=settings.cache_mode,
        failure_seconds=settings.cache_failure_seconds,
        count=lambda result: metrics.cache.labels(result).inc(),
    )
    resources.callback(cache.close)
    egress = EgressPolicy(sites, web_port or 0, settings.allow_internet)
    fetcher = Fetcher(
        egress,
        timeout=settings.fetch_timeout,
        max_bytes=settings.max_page_bytes,
        max_redirects=settings.max_redirects,
        concurrency=settings.fetch_concurrency,
    )
    resources.push_async_callback(fetcher.close)
    sessions = Sessions(
        state / "sessions",
        settings.lease,
        durable=settings.state_dir is not None,
        worker=settings.worker,
        workers=settings.workers,
    )
    metrics.sessions.set(len(sessions))
    reaper = asyncio.create_task(_reap(sessions, settings.lease / 10, metrics))
    resources.callback(reaper.cancel)
    return ToolService(
        [
            web.WebSurfer(backend, citations, fetcher, cache, sites, settings.topk).tool(),
            file.make_file_tool(settings.max_file_chars, settings.max_files),
            todo.TOOL,
            *optional.build_optional_tools(settings.tools, settings.tool_options, resources, egress),
        ],
        sessions,
        lease=settings.lease,
        max_chars=settings.max_observation_chars,
        concurrency=tool_concurrency(settings),
        queue=settings.queue,
        metrics=metrics,
        endpoint=settings.advertise,
    )


def tool_concurrency(settings: HostSettings) -> dict[str, int]:
    """Returns the number of concurrent calls by tool; "" stands for all other tools. Raises ToolHostError."""
    found = {"": settings.concurrency}
    for entry in filter(None, settings.tool_concurrency.split(",")):
        name, _, number = entry.partition("=")
        if not number.isdecimal() or int(number) == 0:
            raise ToolHostError(f"expected tool_concurrency as tool=number,tool=number, got {entry!r}")
        found[name.strip()] = int(number)
    return found


def _store(settings: HostSettings, state: Path, resources: contextlib.AsyncExitStack) -> CacheStore | None:
    if settings.redis_url:
        store = RedisStore(settings.redis_url)
        resources.push_async_callback(store.aclose)
        return store
    if settings.state_dir is None:
        return None
    return SqliteStore(state / "cache.sqlite", shared=settings.workers > 1)


def _lock(state: Path, worker: int, resources: contextlib.AsyncExitStack) -> None:
    """Locks the state directory, so that two hosts do not restore the same sessions. The lock ends with the process."""
    state.mkdir(parents=True, exist_ok=True)
    file = resources.enter_context(open(state / f"worker_{worker}.lock", "w"))
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        raise ToolHostError(f"{state} is in use by another tool host; stop it or name another state_dir") from None


async def _reap(sessions: Sessions, interval: float, metrics: Metrics) -> None:
    while True:
        await asyncio.sleep(interval)
        if ended := sessions.reap():
            metrics.sessions.set(len(sessions))
            logger.info("sessions removed at the end of their lease: %s", ", ".join(ended))
