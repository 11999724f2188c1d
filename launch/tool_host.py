"""Starts the tool host that a script owns, from the `tools` section of its config."""

import contextlib

from stepdr_jax.runtime.layout import RunLayout
from tools_env.process import ToolHost


def start_if_needed(config, name: str) -> contextlib.AbstractContextManager[ToolHost | None]:
    """A tool host of our own for a while, or None where config.tools.address names one that someone else runs."""
    return contextlib.nullcontext() if config.tools.address else start(config, name)


def start(config, name: str, **overrides) -> ToolHost:
    """A tool host over the run's offline web, as a context manager; its log is run_dir/logs/<name>_tool_host.log."""
    layout, tools = RunLayout.from_config(config), config.tools
    settings = dict(
        topk=tools.topk,
        max_observation_chars=tools.max_observation_chars,
        fetch_timeout=tools.fetch_timeout,
        concurrency=tools.concurrency,
    )
    return ToolHost(layout.offline_web, log_path=layout.tool_host_log(name), **settings | overrides)
