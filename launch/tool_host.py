"""Starts the tool host of a script, from the `tools` section of its config."""

import contextlib
from pathlib import Path

from tools_env.process import ToolHost


def open_tool_host(config, name: str) -> contextlib.AbstractContextManager[ToolHost | None]:
    """Returns a new tool host as a context manager, or one of None where config.tools.address names a running host."""
    return contextlib.nullcontext() if config.tools.address else new_tool_host(config, name)


def new_tool_host(config, name: str, **overrides) -> ToolHost:
    """Returns a tool host over the run's offline web, as a context manager.

    Its log is run_dir/logs/<name>_tool_host.log. `overrides`: settings that replace those of config.tools.
    """
    run_dir, tools = Path(config.run_dir), config.tools
    settings = dict(
        topk=tools.topk,
        max_observation_chars=tools.max_observation_chars,
        fetch_timeout=tools.fetch_timeout,
        concurrency=tools.concurrency,
    )
    return ToolHost(run_dir / "world", log_path=run_dir / "logs" / f"{name}_tool_host.log", **settings | overrides)
