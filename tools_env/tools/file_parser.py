"""`file_parser`: a document of the workspace as text. Each is parsed in its own process (see `documents`)."""

import asyncio
import contextlib
import json
import sys
from typing import Any

from tools_env.errors import ToolError, ToolHostError
from tools_env.tools import workspace
from tools_env.tools.base import CallContext, Tool, ToolOutput
from tools_env.tools.child import run_child

MAX_FILE_BYTES = 32 << 20
SCHEMA = {
    "type": "object",
    "properties": {
        "path": {"type": "string", "minLength": 1, "description": "relative to the workspace"},
        "first": {"type": "integer", "minimum": 1, "description": "first page, sheet, slide or chapter; default 1"},
        "last": {"type": "integer", "minimum": 1, "description": "last one; default all"},
    },
    "required": ["path"],
}


async def run_file_parser(call: CallContext, arguments: dict[str, Any]) -> ToolOutput:
    """Runs the tool."""
    name = workspace.shown(arguments["path"])
    content = await asyncio.to_thread(workspace.read_bytes, call.workspace, name, MAX_FILE_BYTES)
    blocks = await parse_document(name, content, call.seconds_left() - 0.5)
    first, last = arguments.get("first", 1), arguments.get("last", len(blocks))
    chosen = blocks[first - 1 : last]
    if not chosen:
        raise ToolError(f"{name} has {len(blocks)} parts; first and last name none of them")
    return ToolOutput("\n\n".join(chosen), blocks=chosen)


async def parse_document(name: str, content: bytes, seconds: float) -> list[str]:
    """Returns the blocks of a document. Raises ToolError."""
    command = [sys.executable, "-m", "tools_env.tools.documents", name]
    environment = {"PATH": "/usr/bin:/bin", "PYTHONPATH": ":".join(sys.path), "LANG": "C.UTF-8"}
    _, out = await run_child(command, content, seconds, environment, f"{name} takes too long to read")
    try:
        answer = json.loads(out)
    except ValueError:
        raise ToolError(f"{name} could not be read: it took too much memory or time") from None
    if "error" in answer:
        raise ToolError(f"{name}: {answer['error']}")
    return [block for block in answer["blocks"] if block.strip()] or ["The document has no text."]


def build_tool(options: dict[str, Any], resources: contextlib.AsyncExitStack) -> Tool:
    """Returns the tool for a host; it has no options. Raises ToolHostError."""
    if options:
        raise ToolHostError(f"file_parser has no option {next(iter(options))}; it has none")
    return Tool(
        name="file_parser",
        description="Read a document of the workspace as text: PDF, docx, xlsx, pptx, epub, html, csv.",
        schema=SCHEMA,
        run=run_file_parser,
    )
