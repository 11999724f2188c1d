"""What a tool host can be told. Each field is also a flag of `python -m tools_env.server`, with the same explanation."""

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
        "a world (documents.jsonl and sites.json; the search index is built into its folder index) or a directory that "
        "`python -m tools_env.index` made; needed by search=embedded",
    )
    host: str = _field("127.0.0.1", "address to listen on")
    port: int = _field(0, "port to listen on; 0 = any free one")
    token: str | None = dataclasses.field(
        default=None,
        repr=False,
        metadata={
            "help": "bearer token that every call but the health check must carry, or several with commas between; read from "
            "$STEPDR_TOOLS_TOKEN"
        },
    )
    tls_cert: str | None = _field(None, "PEM file of the host's certificate; with it only TLS is spoken")
    tls_key: str | None = _field(None, "PEM file of the certificate's key")
    tls_client_ca: str | None = _field(None, "PEM file; only clients whose certificate it signed are served")
    allow_anyone: bool = _field(False, "listen beyond loopback without token or client certificates")
    advertise: str = _field("", "host:port told to clients for their session's calls, where replicas share one address")
    metrics_port: int | None = _field(None, "port of Prometheus' /metrics on the same host; 0 = any free one")
    otlp_endpoint: str | None = _field(
        None, "http://host:port of an OpenTelemetry collector that gets a span of every call"
    )
    workers: int = _field(1, "processes behind the port; a session lives in one of them")
    worker: int = _field(0, "number of this process among the workers; set by their supervisor")
    socket_dir: str | None = _field(None, "where workers reach each other; set by their supervisor")
    state_dir: str | None = _field(
        None,
        "keeps the retrieval cache and the sessions, which a restarted host takes up again; without it the cache is in "
        "memory and the workspaces are in /tmp",
    )
    web_port: int | None = _field(None, "loopback port of a running world web; without it the world's own is started")
    allow_internet: bool = _field(False, "open public addresses that the world does not serve")
    search: str = _field(
        "embedded",
        "where queries go: embedded (the index of offline_web), opensearch (a cluster), web (a provider of live results)",
    )
    search_ranking: str = _field("bm25", "bm25, dense or hybrid (both, by reciprocal ranks); not for search=web")
    search_without_authority: bool = _field(False, "authority does not decide between comparable passages")
    search_options: str = _field("", "JSON object of the search's options, as docs/tools.md lists them")
    search_timeout: float = _field(5.0, "seconds for one request to a search cluster, provider or embedding endpoint")
    topk: int = _field(2, "passages per search query when a call names no number")
    max_observation_chars: int = _field(700, "longer results are stored in the workspace and summarised")
    fetch_timeout: float = _field(2.0, "seconds for one page, redirects included")
    max_page_bytes: int = _field(4 << 20, "a larger page is a failure of that page")
    max_redirects: int = _field(5, "redirects followed for one page")
    fetch_concurrency: int = _field(64, "pages fetched at once by the whole host")
    concurrency: int = _field(32, "calls of one tool at a time")
    tool_concurrency: str = _field(
        "", "calls of single tools at a time, as file=64,shell=8; the others have concurrency"
    )
    queue: int = _field(256, "calls of one tool that may wait; more answer RESOURCE_EXHAUSTED")
    cache_mode: str = _field("read_through", "read_through; replay_only: never fetch, a miss fails; live: no cache")
    cache_failure_seconds: float = _field(0.2, "how long a failed page or search is told again without a new try")
    redis_url: str | None = _field(None, "redis://host:port/0 as the retrieval cache of many hosts")
    cache_entries: int = _field(20_000, "results held in memory")
    lease: float = _field(900.0, "seconds after which a session without calls is removed")
    max_file_chars: int = _field(200_000, "characters of one workspace file")
    max_files: int = _field(200, "files of one workspace")
    tools: str = _field(
        "", "optional tools to serve, with commas between: shell, browser, file_parser, asr, analyze_image"
    )
    tool_options: str = _field("", "JSON object of optional tool to its options")
    drain: float = _field(5.0, "seconds that calls in flight get when the host stops")

    def __post_init__(self):
        """Raises ToolHostError for a size or duration that is not positive."""
        may_be_zero = ("port", "queue", "drain", "max_redirects", "metrics_port", "worker", "cache_failure_seconds")
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if isinstance(value, int | float) and not isinstance(value, bool):
                if value < 0 or (value == 0 and field.name not in may_be_zero):
                    raise ToolHostError(f"expected {field.name} above 0 ({field.metadata['help']}), got {value}")
        if bool(self.tls_cert) != bool(self.tls_key) or (self.tls_client_ca and not self.tls_cert):
            raise ToolHostError("expected tls_cert and tls_key together, and both with tls_client_ca; name all of them")
