"""One process of a tool host: the service on gRPC with health checks, reflection, TLS, tokens, metrics and spans."""

import contextlib
import gc
import logging

import grpc
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection

from tools_env.errors import ToolHostError
from tools_env.protocol import tools_pb2, tools_pb2_grpc
from tools_env.service.assembly import make_service
from tools_env.service.auth import BearerTokenInterceptor, check_exposure, server_credentials
from tools_env.service.metrics import Metrics
from tools_env.service.metrics import serve_metrics as serve_metrics
from tools_env.service.routing import RoutedService, worker_socket
from tools_env.service.settings import HostSettings
from tools_env.service.tracing import SpanInterceptor

SERVICE = tools_pb2.DESCRIPTOR.services_by_name["ToolService"].full_name
MAX_MESSAGE = 16 << 20  # bytes

logger = logging.getLogger(__name__)


class RunningHost:
    """A running host, returned by `start_host`. `stop` may be called twice."""

    def __init__(self, address: str, server, health_servicer, drain: float, resources: contextlib.AsyncExitStack):
        self.address = address
        self.metrics_address: str | None = None
        self._server = server
        self._health = health_servicer
        self._drain = drain
        self._resources = resources

    async def stop(self, drain: float | None = None) -> None:
        """Refuses new calls, waits up to `drain` seconds for calls in flight, then releases everything."""
        for name in ("", SERVICE):
            await self._health.set(name, health_pb2.HealthCheckResponse.NOT_SERVING)
        await self._server.stop(self._drain if drain is None else drain)
        await self._resources.aclose()


async def start_host(settings: HostSettings) -> RunningHost:
    """Starts one process of a tool host on the running event loop and returns it when it answers calls.

    Raises ToolHostError when the offline web is missing, the port is taken or callers would not be authenticated.
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
            spans = SpanInterceptor(settings.otlp_endpoint, settings.worker)
            resources.push_async_callback(spans.close)
            interceptors.append(spans)
        if settings.token:
            interceptors.append(BearerTokenInterceptor(settings.token))
        server = grpc.aio.server(
            interceptors=interceptors,
            options=[
                # Workers share a port; a second host on that port must fail instead of taking some calls.
                ("grpc.so_reuseport", 0 if routed is None else 1),
                ("grpc.max_receive_message_length", MAX_MESSAGE),
                ("grpc.max_send_message_length", MAX_MESSAGE),
                # Above 1,000 pending calls gRPC cancels some at random, which a client cannot tell from a fault. The
                # queue of the service refuses calls instead, and says when to retry.
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
            server.add_insecure_port(worker_socket(settings.socket_dir, settings.worker))
        port = _bind(server, settings)
        metrics_port = None
        if settings.metrics_port is not None:
            metrics_port, stop = serve_metrics(settings.host, settings.metrics_port, metrics.registry)
            resources.callback(stop)
        await server.start()
        gc.collect()
        gc.freeze()  # objects that live as long as the host are not scanned again while calls wait
        for name in ("", SERVICE):
            await health_servicer.set(name, health_pb2.HealthCheckResponse.SERVING)
        address = f"{settings.host}:{port}"
        running = RunningHost(address, server, health_servicer, settings.drain, resources.pop_all())
        if metrics_port is not None:
            running.metrics_address = f"{settings.host}:{metrics_port}"
            logger.info("metrics at http://%s/metrics", running.metrics_address)
    return running


def _bind(server, settings: HostSettings) -> int:
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
            f"cannot listen on {host}:{port}: the port is in use or not permitted; stop the other program, name "
            "another port, or use port 0 for any free one"
        )
    return bound
