"""Starts the tool host that a script owns, from the `tools` section of its config."""

import contextlib
from pathlib import Path

from tools_env.process import ToolHost


def of(config, name: str) -> contextlib.AbstractContextManager[ToolHost | None]:
    """A tool host of our own for a while, or None where config.tools.address names one that someone else runs."""
    return contextlib.nullcontext() if config.tools.address else own(config, name)


def own(config, name: str, **overrides) -> ToolHost:
    """A tool host over the run's world, as a context manager; its log is run_dir/logs/<name>_tool_host.log."""
    run_dir, tools = Path(config.run_dir), config.tools
    settings = dict(
        topk=tools.topk,
        max_observation_chars=tools.max_observation_chars,
        fetch_timeout=tools.fetch_timeout,
        concurrency=tools.concurrency,
    )
    return ToolHost(run_dir / "world", log_path=run_dir / "logs" / f"{name}_tool_host.log", **settings | overrides)
