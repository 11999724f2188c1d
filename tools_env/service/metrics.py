"""Prometheus metrics of a tool host. Worker processes share them through $PROMETHEUS_MULTIPROC_DIR."""

import os

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, multiprocess, start_http_server

from tools_env.errors import ToolHostError

_BUCKETS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0)
SHARED_VARIABLE = "PROMETHEUS_MULTIPROC_DIR"


class Metrics:
    """The metrics of one host. Labels are tool names and fixed words, so the number of series is bounded."""

    def __init__(self):
        self.registry = CollectorRegistry()
        kept = {"registry": self.registry}
        live = {"registry": self.registry, "multiprocess_mode": "livesum"}
        self.calls = Counter(
            "stepdr_tool_calls", "Calls answered, by outcome or gRPC status", ["tool", "outcome"], **kept
        )
        self.seconds = Histogram(
            "stepdr_tool_call_seconds", "Seconds from arrival to reply", ["tool"], buckets=_BUCKETS, **kept
        )
        self.running = Gauge("stepdr_tool_calls_running", "Calls that run", ["tool"], **live)
        self.waiting = Gauge("stepdr_tool_calls_waiting", "Calls that wait for a slot", ["tool"], **live)
        self.replayed = Counter("stepdr_tool_replies_replayed", "Repeated calls answered with the stored reply", **kept)
        self.tokens = Counter("stepdr_tool_output_tokens", "Estimated tokens of tool output", ["tool"], **kept)
        self.faults = Counter("stepdr_tool_faults_injected", "Faults injected on request", ["kind"], **kept)
        self.sessions = Gauge("stepdr_tool_sessions", "Open sessions", **live)
        self.cache = Counter("stepdr_tool_cache_lookups", "Lookups in the retrieval cache", ["result"], **kept)


def serve_metrics(host: str, port: int, registry: CollectorRegistry | None):
    """Serves /metrics from a thread; returns (port, function that stops it).

    `registry`: None collects from all processes that share $PROMETHEUS_MULTIPROC_DIR.

    Raises ToolHostError when the port is taken.
    """
    if registry is None:
        registry = CollectorRegistry()
        multiprocess.MultiProcessCollector(registry, os.environ[SHARED_VARIABLE])
    try:
        server, thread = start_http_server(port, addr=host, registry=registry)
    except OSError:
        raise ToolHostError(f"metrics_port {port} is in use; name another one, or 0") from None

    def stop() -> None:
        server.shutdown()
        server.server_close()
        thread.join()

    return server.server_port, stop
