"""The tool environment: a gRPC service of research tools with an offline web. Never imports jax or stepdr_jax.

client       asynchronous client of the service, for agents
server       command line of the tool host
index        command line that indexes documents for the tool host
process      a tool host as a child process, for trainers and tests
errors       exceptions, grouped by who can act on them
protocol     tools.proto and the stubs generated from it
service      the gRPC service: settings, sessions, limits, authentication, worker processes, metrics, tracing
tools        the tools, one module each
search       search backends: the embedded index, OpenSearch and web search providers
web          egress policy, page fetching, forward proxy and page parsing
browser      Chromium in a sandbox, page snapshots and screenshots
sandbox      isolation and resource limits of shell commands
cache        the retrieval cache and its stores
offline_web  a built-in web of real facts: generator and HTTP server
adapters     other protocols on the same service: MCP
check        compliance checks, load generator and benchmarks
"""
