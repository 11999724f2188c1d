"""A running tool host: the world's web, the index, the cache and the gRPC service, started and stopped together.

python -m tools_env.server --world=DIR --port=0 --port_file=PATH
python -m tools_env.server --world=DIR --workers=4 --state_dir=DIR    several processes, sessions outlive them
python -m tools_env.server --world=DIR --mcp                          for a client of the Model Context Protocol
"""

import argparse
import asyncio
import contextlib
import dataclasses
import fcntl
import gc
import json
import logging
import os
import shutil
import signal
import sys
import tempfile
from pathlib import Path

import grpc
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection

from tools_env.cache.retrieval import Cache
from tools_env.cache.stores import RedisStore, SqliteStore, Store
from tools_env.errors import ToolHostError
from tools_env.protocol import tools_pb2, tools_pb2_grpc
from tools_env.search import choose
from tools_env.service import workers
from tools_env.service.auth import BearerToken, check_exposure, server_credentials
from tools_env.service.metrics import Metrics
from tools_env.service.metrics import serve as serve_metrics
from tools_env.service.routing import RoutedService, socket_of
from tools_env.service.service import ToolService
from tools_env.service.sessions import Sessions
from tools_env.service.settings import Settings
from tools_env.service.tracing import Spans
from tools_env.tools import file, optional, todo, web
from tools_env.web.egress import Reach
from tools_env.web.fetch import Fetcher

SERVICE = tools_pb2.DESCRIPTOR.services_by_name["ToolService"].full_name
TOKEN_VARIABLE = "STEPDR_TOOLS_TOKEN"
MAX_MESSAGE = 16 << 20  # bytes

logger = logging.getLogger(__name__)


class RunningHost:
    """What `serve` returns. `stop` ends it; it may be called twice."""

    def __init__(self, address: str, server, health_servicer, drain: float, resources: contextlib.AsyncExitStack):
        self.address = address
        self.metrics_address: str | None = None
        self._server = server
        self._health = health_servicer
        self._drain = drain
        self._resources = resources

    async def stop(self, drain: float | None = None) -> None:
        """Refuses new calls, lets those in flight finish for `drain` seconds, then releases everything."""
        for name in ("", SERVICE):
            await self._health.set(name, health_pb2.HealthCheckResponse.NOT_SERVING)
        await self._server.stop(self._drain if drain is None else drain)
        await self._resources.aclose()


async def serve(settings: Settings) -> RunningHost:
    """Starts one process of a tool host on the running event loop and returns it when it answers calls.

    Raises ToolHostError when the world is missing, the port is taken or strangers could call.
    """
    check_exposure(settings.host, settings.token, settings.tls_client_ca, settings.allow_anyone)
    async with contextlib.AsyncExitStack() as resources:
        metrics = Metrics()
        service = await make_service(settings, resources, metrics)
        routed = None
        if settings.socket_dir is not None:
            routed = RoutedService(service, settings.socket_dir, settings.worker, settings.workers)
            resources.push_async_callback(routed.close)
        interceptors = []
        if settings.otlp_endpoint:
            spans = Spans(settings.otlp_endpoint, settings.worker)
            resources.push_async_callback(spans.close)
            interceptors.append(spans)
        if settings.token:
            interceptors.append(BearerToken(settings.token))
        server = grpc.aio.server(
            interceptors=interceptors,
            options=[
                # Workers share a port; a second host on the same port must fail, not take a part of its calls.
                ("grpc.so_reuseport", 0 if routed is None else 1),
                ("grpc.max_receive_message_length", MAX_MESSAGE),
                ("grpc.max_send_message_length", MAX_MESSAGE),
                # Beyond 1,000 calls that Python has not seen yet, gRPC cancels some at random, and a client cannot tell
                # that from a fault. Ours is the queue that refuses, and it says when to come back.
                ("grpc.server.max_pending_requests", 20_000),
                ("grpc.server.max_pending_requests_hard_limit", 30_000),
                ("grpc.keepalive_permit_without_calls", 1),
                ("grpc.http2.min_ping_interval_without_data_ms", 5_000),
            ],
        )
        tools_pb2_grpc.add_ToolServiceServicer_to_server(routed or service, server)
        health_servicer = health.aio.HealthServicer()
        health_pb2_grpc.add_HealthServicer_to_server(health_servicer, server)
        reflection.enable_server_reflection((SERVICE, health.SERVICE_NAME, reflection.SERVICE_NAME), server)
        if routed is not None:
            server.add_insecure_port(socket_of(settings.socket_dir, settings.worker))
        port = _bind(server, settings)
        metrics_port = None
        if settings.metrics_port is not None:
            try:
                metrics_port, stop = serve_metrics(settings.host, settings.metrics_port, metrics.registry)
            except OSError:
                raise ToolHostError(f"metrics_port {settings.metrics_port} is in use; name another one, or 0") from None
            resources.callback(stop)
        await server.start()
        gc.collect()
        gc.freeze()  # what lives as long as the host is not looked through again while calls wait
        for name in ("", SERVICE):
            await health_servicer.set(name, health_pb2.HealthCheckResponse.SERVING)
        address = f"{settings.host}:{port}"
        running = RunningHost(address, server, health_servicer, settings.drain, resources.pop_all())
        if metrics_port is not None:
            running.metrics_address = f"{settings.host}:{metrics_port}"
            logger.info("metrics at http://%s/metrics", running.metrics_address)
    return running


async def make_service(settings: Settings, resources: contextlib.AsyncExitStack, metrics: Metrics) -> ToolService:
    """Returns the service without a transport; what it holds is released with `resources`. Raises ToolHostError."""
    if not settings.world_dir and settings.search == "embedded":
        raise ToolHostError("expected --world=DIR: a world, or a directory that `python -m tools_env.index` made")
    sites = _read_sites(Path(settings.world_dir)) if settings.world_dir else {}
    backend, citations = await choose.make(settings, sites)
    resources.push_async_callback(backend.close)
    web_port = settings.web_port
    if web_port is None and settings.world_dir:
        from tools_env.offline_web.server import WorldWeb

        world_web = WorldWeb(settings.world_dir)
        web_port = world_web.start()
        resources.callback(world_web.stop)
    if settings.state_dir is None:
        state = Path(tempfile.mkdtemp(prefix="stepdr_tools_"))
        resources.callback(shutil.rmtree, state, ignore_errors=True)
    else:
        state = Path(settings.state_dir)
        _lock(state, settings.worker, resources)
    cache = Cache(
        store=_store(settings, state, resources),
        entries=settings.cache_entries,
        mode=settings.cache_mode,
        failure_seconds=settings.cache_failure_seconds,
        count=lambda result: metrics.cache.labels(result).inc(),
    )
    resources.callback(cache.close)
    reach = Reach(sites, web_port or 0, settings.allow_internet)
    fetcher = Fetcher(
        reach,
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
            web.make(backend, citations, fetcher, cache, sites, settings.topk),
            file.make(settings.max_file_chars, settings.max_files),
            todo.TOOL,
            *optional.build(settings.tools, settings.tool_options, resources, reach),
        ],
        sessions,
        lease=settings.lease,
        max_chars=settings.max_observation_chars,
        concurrency=slots(settings),
        queue=settings.queue,
        metrics=metrics,
        endpoint=settings.advertise,
    )


def slots(settings: Settings) -> dict[str, int]:
    """Returns calls at a time by tool; "" stands for the tools not named. Raises ToolHostError."""
    found = {"": settings.concurrency}
    for entry in filter(None, settings.tool_concurrency.split(",")):
        name, _, number = entry.partition("=")
        if not number.isdecimal() or int(number) == 0:
            raise ToolHostError(f"expected tool_concurrency as tool=number,tool=number, got {entry!r}")
        found[name.strip()] = int(number)
    return found


def _store(settings: Settings, state: Path, resources: contextlib.AsyncExitStack) -> Store | None:
    if settings.redis_url:
        store = RedisStore(settings.redis_url)
        resources.push_async_callback(store.aclose)
        return store
    if settings.state_dir is None:
        return None
    return SqliteStore(state / "cache.sqlite", shared=settings.workers > 1)


def _lock(state: Path, worker: int, resources: contextlib.AsyncExitStack) -> None:
    """Keeps two hosts from taking up the same sessions; the lock ends with the process, however it ends."""
    state.mkdir(parents=True, exist_ok=True)
    file = resources.enter_context(open(state / f"worker_{worker}.lock", "w"))
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        raise ToolHostError(f"{state} is in use by another tool host; stop it or name another state_dir") from None


def _read_sites(world_dir: Path) -> dict[str, int]:
    """Returns host name -> authority."""
    path = world_dir / "sites.json"
    try:
        hosts = json.loads(path.read_text(encoding="utf-8"))["hosts"]
        return {name: int(site.get("authority", 0)) for name, site in hosts.items()}
    except FileNotFoundError:
        raise ToolHostError(
            f"{path} does not exist; build the world first, or name its directory with --world"
        ) from None
    except (ValueError, KeyError, AttributeError, TypeError) as error:
        raise ToolHostError(f"{path} has no table of hosts ({error!r}); build the world again") from None


def _bind(server, settings: Settings) -> int:
    host, port = settings.host, settings.port
    try:
        if settings.tls_cert:
            credentials = server_credentials(settings.tls_cert, settings.tls_key, settings.tls_client_ca)
            bound = server.add_secure_port(f"{host}:{port}", credentials)
        else:
            bound = server.add_insecure_port(f"{host}:{port}")
    except RuntimeError:
        bound = 0
    if not bound:
        raise ToolHostError(
            f"cannot listen on {host}:{port}: the port is in use or not ours to use; stop the other program, name "
            "another port, or use port 0 for any free one"
        )
    return bound


async def _reap(sessions: Sessions, interval: float, metrics: Metrics) -> None:
    while True:
        await asyncio.sleep(interval)
        if ended := sessions.reap():
            metrics.sessions.set(len(sessions))
            logger.info("leases ended: %s", ", ".join(ended))


def run(settings: Settings, *, port_file: str | None = None, stop_with_stdin: bool = False) -> None:
    """Serves until SIGTERM or SIGINT (or the end of standard input), then drains. Raises ToolHostError."""
    asyncio.run(_run_until_stopped(settings, port_file, stop_with_stdin))


async def _run_until_stopped(settings: Settings, port_file: str | None, stop_with_stdin: bool) -> None:
    stopped = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stopped.set)
    watcher = asyncio.create_task(_watch_stdin(stopped)) if stop_with_stdin else None
    if settings.workers > 1 and settings.socket_dir is None:
        check_exposure(settings.host, settings.token, settings.tls_client_ca, settings.allow_anyone)
        await workers.run(settings, lambda address: _announce(address, port_file), stopped.wait())
    else:
        host = await serve(settings)
        _announce(host.address, port_file)
        await stopped.wait()
        logger.info("draining")
        await host.stop()
    if watcher is not None:
        watcher.cancel()


def _announce(address: str, port_file: str | None) -> None:
    if port_file:
        path = Path(port_file)
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
        temporary.write_text(address + "\n")
        os.replace(temporary, path)
    print(address, flush=True)


async def _watch_stdin(stopped: asyncio.Event) -> None:
    reader = asyncio.StreamReader()
    await asyncio.get_running_loop().connect_read_pipe(lambda: asyncio.StreamReaderProtocol(reader), sys.stdin)
    await reader.read()
    stopped.set()


def parse_flags(argv: list[str] | None = None) -> tuple[Settings, str | None, bool]:
    """Returns (settings, port file, stop with stdin) from command-line flags and the token's variable."""
    parser = argparse.ArgumentParser(
        prog="serve_tools",
        description="Serves the research tools over gRPC.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    fields = [field for field in dataclasses.fields(Settings) if field.name != "token"]
    for field in fields:
        names = ["--world", "--world_dir"] if field.name == "world_dir" else [f"--{field.name}"]
        if field.type is bool:
            parser.add_argument(*names, action="store_true", dest=field.name, help=field.metadata["help"])
            continue
        required = field.default is dataclasses.MISSING
        kind = int if field.type in (int, int | None) else float if field.type is float else str
        default = None if required else field.default
        parser.add_argument(
            *names, dest=field.name, type=kind, default=default, required=required, help=field.metadata["help"]
        )
    parser.add_argument("--port_file", help="written with host:port when the host answers calls")
    parser.add_argument(
        "--mcp",
        action="store_true",
        help="speak the Model Context Protocol on standard input and output instead of gRPC",
    )
    parser.add_argument("--stop_with_stdin", action="store_true", help="stop when standard input ends")
    flags = vars(parser.parse_args(argv))
    port_file, stop_with_stdin = flags.pop("port_file"), flags.pop("stop_with_stdin")
    flags.pop("mcp")
    return Settings(**flags, token=os.environ.get(TOKEN_VARIABLE) or None), port_file, stop_with_stdin


def main(argv: list[str] | None = None) -> int:
    """Command line. Exit status 2 means that the message on stderr names what to change."""
    argv = sys.argv[1:] if argv is None else argv
    if "--mcp" in argv:
        from tools_env.adapters import mcp

        return mcp.main([flag for flag in argv if flag != "--mcp"])
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    try:
        settings, port_file, stop_with_stdin = parse_flags(argv)
        run(settings, port_file=port_file, stop_with_stdin=stop_with_stdin)
    except ToolHostError as error:
        print(f"tool host: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
