"""Optional tools of a host: `--tools=shell,file_parser --tool_options='{"shell": {"memory_mb": 256}}'`.

Each is a module of this package with a function `build_tool(options, resources) -> Tool`. It pushes what must be
released on `resources`. A tool that opens connections takes a third argument `egress: EgressPolicy`. It raises
ToolHostError, naming the fix, where it cannot work.
"""

import contextlib
import importlib.util
import inspect
import json
import pkgutil

from tools_env import tools
from tools_env.errors import ToolHostError
from tools_env.tools.base import Tool
from tools_env.web.egress import EgressPolicy


def optional_tool_names() -> list[str]:
    """Returns the names of the optional tools."""
    found = []
    for module in pkgutil.iter_modules(tools.__path__):
        spec = importlib.util.find_spec(f"{tools.__name__}.{module.name}")
        with open(spec.origin, encoding="utf-8") as source:
            if "\ndef build_tool(options: dict" in source.read():
                found.append(module.name)
    return found


def build_optional_tools(
    wanted: str, options_json: str, resources: contextlib.AsyncExitStack, egress: EgressPolicy
) -> list[Tool]:
    """Returns the tools of a comma-separated list, on the running event loop. Raises ToolHostError."""
    chosen = [name.strip() for name in wanted.split(",") if name.strip()]
    try:
        options = json.loads(options_json or "{}")
    except ValueError as error:
        raise ToolHostError(
            f"tool_options is not valid JSON ({error}); write an object of tool name to options"
        ) from None
    if not isinstance(options, dict) or not all(isinstance(value, dict) for value in options.values()):
        raise ToolHostError("tool_options must be an object of tool name to an object of its options")
    for name in [*chosen, *options]:
        if name not in optional_tool_names():
            raise ToolHostError(f"there is no tool {name}; the optional tools are {', '.join(optional_tool_names())}")
    for name in options:
        if name not in chosen:
            raise ToolHostError(f"tool_options names {name}, which is not served; add it to --tools")
    made = []
    for name in chosen:
        make = importlib.import_module(f"{tools.__name__}.{name}").build_tool
        rest = [egress] if "egress" in inspect.signature(make).parameters else []
        made.append(make(options.get(name, {}), resources, *rest))
    return made
