"""Settings of a tool host. Each field is also a flag of `python -m tools_env.server`, with the same help."""

import dataclasses
from typing import Any

from tools_env.errors import ToolHostError

TOKEN_VARIABLE = "STEPDR_TOOLS_TOKEN"  # environment variable of the bearer token


def _field(default: Any, help: str) -> Any:
    return dataclasses.field(default=default, metadata={"help": help})


@dataclasses.dataclass(frozen=True)
class HostSettings:
    """Settings of one tool host. Durations are in seconds."""

    offline_web: str = _field(
        "",
        "directory of an offline web (the search index is built in its folder index), or one made by "
        "`python -m tools_env.index`; required by search=embedded",
    )
    host: str = _field("127.0.0.1", "address to listen on")
    port: int = _field(0, "port to listen on; 0 = any free one")
    token: str | None = dataclasses.field(
        default=None,
        repr=False,
        metadata={
            "help": "bearer token of every call but the health check, or several separated by commas; read from "
            f"${TOKEN_VARIABLE}"
        },
    )
    tls_cert: str | None = _field(None, "PEM file of the host's certificate; enables TLS")
    tls_key: str | None = _field(None, "PEM file of the certificate's key")
    tls_client_ca: str | None = _field(None, "PEM file of an authority; clients need a certificate that it signed")
    allow_anyone: bool = _field(False, "listen beyond loopback without a token or client certificates")
    advertise: str = _field("", "host:port that clients use for a session's calls, where replicas share one address")
    metrics_port: int | None = _field(None, "port of Prometheus metrics on the same address; 0 = any free one")
    otlp_endpoint: str | None = _field(
        None, "http://host:port of an OpenTelemetry collector, which gets a span of every call"
    )
    workers: int = _field(1, "processes behind the port; a session lives in one of them")
    worker: int = _field(0, "number of this process among the workers; set by their supervisor")
    socket_dir: str | None = _field(None, "folder of the workers' Unix sockets; set by their supervisor")
    state_dir: str | None = _field(
        None,
        "directory of the retrieval cache and the sessions, which a restarted host restores; without it the cache is "
        "in memory and the workspaces are in /tmp",
    )
    web_port: int | None = _field(None, "loopback port of a running offline web server; without it one is started")
    allow_internet: bool = _field(False, "allow public addresses outside the offline web")
    search: str = _field(
        "embedded",
        "search backend: embedded (the index of offline_web), opensearch (a cluster) or web (a live search provider)",
    )
    search_ranking: str = _field("bm25", "bm25, dense or hybrid (reciprocal rank fusion of both); not for search=web")
    search_without_authority: bool = _field(False, "do not rank comparable passages by authority")
    search_options: str = _field("", "JSON object of the search backend's options, see docs/tools.md")
    search_timeout: float = _field(5.0, "seconds for one request to a search cluster, provider or embedding endpoint")
    topk: int = _field(2, "passages per search query unless a call names a number")
    max_observation_chars: int = _field(700, "longer results are stored in the workspace and shortened")
    fetch_timeout: float = _field(2.0, "seconds for one page, including redirects")
    max_page_bytes: int = _field(4 << 20, "bytes of the largest page that is read")
    max_redirects: int = _field(5, "redirects followed per page")
    fetch_concurrency: int = _field(64, "pages fetched at once by the whole host")
    concurrency: int = _field(32, "concurrent calls of each tool")
    tool_concurrency: str = _field(
        "", "concurrent calls of single tools, such as file=64,shell=8; others have concurrency"
    )
    queue: int = _field(256, "waiting calls of each tool; further calls answer RESOURCE_EXHAUSTED")
    cache_mode: str = _field("read_through", "read_through; replay_only: never fetch, a miss fails; live: no cache")
    cache_failure_seconds: float = _field(0.2, "seconds for which a failed page or search is not tried again")
    redis_url: str | None = _field(None, "redis://host:port/0 of a retrieval cache that several hosts share")
    cache_entries: int = _field(20_000, "results cached in memory")
    lease: float = _field(900.0, "seconds after which a session without calls is removed")
    max_file_chars: int = _field(200_000, "maximum characters of one workspace file")
    max_files: int = _field(200, "maximum files of one workspace")
    tools: str = _field("", "comma-separated optional tools to serve: shell, browser, file_parser, asr, analyze_image")
    tool_options: str = _field("", "JSON object from optional tool to its options")
    drain: float = _field(5.0, "seconds for calls in flight when the host stops")

    def __post_init__(self):
        """Raises ToolHostError for a size or duration that is not positive."""
        may_be_zero = ("port", "queue", "drain", "max_redirects", "metrics_port", "worker", "cache_failure_seconds")
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if isinstance(value, int | float) and not isinstance(value, bool):
                if value < 0 or (value == 0 and field.name not in may_be_zero):
                    raise ToolHostError(f"expected {field.name} above 0 ({field.metadata['help']}), got {value}")
        if bool(self.tls_cert) != bool(self.tls_key) or (self.tls_client_ca and not self.tls_cert):
            raise ToolHostError("tls_cert and tls_key need each other, and tls_client_ca needs both; set all of them")
