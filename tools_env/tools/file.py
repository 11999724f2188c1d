"""`file`: the session's workspace. Reads are paged, writes are atomic, and no path leads outside."""

import stat
from typing import Any

from tools_env.errors import BadArguments, ToolError
from tools_env.search import citations
from tools_env.tools import patch, workspace
from tools_env.tools.base import CallContext, Tool, ToolOutput

_NEEDED = {
    "read": ("path",),
    "write": ("path", "content"),
    "append": ("path", "content"),
    "list": (),
    "stat": ("path",),
    "patch": ("path", "anchor", "replacement"),
}
MAX_LISTED = 500  # files that list shows
SCHEMA = {
    "type": "object",
    "properties": {
        "op": {"type": "string", "enum": list(_NEEDED)},
        "path": {"type": "string", "minLength": 1, "description": "relative to the workspace"},
        "content": {"type": "string", "description": "write, append: the text"},
        "offset": {"type": "integer", "minimum": 0, "description": "read: character to start at"},
        "limit": {"type": "integer", "minimum": 1, "description": "read: characters to return at most"},
        "anchor": {"type": "string", "description": "patch: a piece of the present text, replaced as a whole"},
        "replacement": {"type": "string", "description": "patch: what stands there afterwards"},
    },
    "required": ["op"],
}


def make_file_tool(max_file_chars: int, max_files: int) -> Tool:
    """Returns the tool with its quotas: characters of one file, files of one workspace."""

    async def run(call: CallContext, arguments: dict[str, Any]) -> ToolOutput:
        op = arguments["op"]
        for name in _NEEDED[op]:
            if name not in arguments:
                raise BadArguments(f"{op} needs {name}")
        if op == "list":
            return _list(call, arguments.get("path", "."))
        path = workspace.shown(arguments["path"])
        if op in ("write", "append"):
            old = _text(call, path) if op == "append" and workspace.exists(call.workspace, path) else ""
            _save(call, path, old + arguments["content"])
            verb = "wrote" if op == "write" else "appended"
            return ToolOutput(f"{verb} {len(arguments['content'])} characters to {path}")
        text = _text(call, path)
        if op == "read":
            return _read(call, path, text, arguments.get("offset", 0), arguments.get("limit"))
        if op == "stat":
            return ToolOutput(f"{path}: {len(text)} characters, {len(text.splitlines())} lines")
        patched = patch.apply_patch(text, arguments["anchor"], arguments["replacement"])
        _save(call, path, patched.text)
        how = "" if patched.exact else " (anchor matched approximately)"
        lines = f"line {patched.first_line}"
        if patched.last_line > patched.first_line:
            lines = f"lines {patched.first_line}-{patched.last_line}"
        return ToolOutput(f"patched {path} {lines}{how}")

    def _save(call: CallContext, path: str, text: str) -> None:
        if len(text) > max_file_chars:
            raise ToolError(f"the file would have {len(text)} characters, at most {max_file_chars} are allowed")
        if not workspace.exists(call.workspace, path):
            if sum(1 for _ in workspace.entries(call.workspace)) >= max_files:
                raise ToolError(f"the workspace has {max_files} files already; write to one of them")
        workspace.replace(call.workspace, path, text.encode())

    def _text(call: CallContext, path: str) -> str:
        # A character takes at most 4 bytes; files written by the shell may be larger than this tool's limit.
        content = workspace.read_bytes(call.workspace, path, 4 * max_file_chars)
        try:
            return content.decode()
        except UnicodeDecodeError:
            raise ToolError(f"{path} is not UTF-8 text") from None

    def _list(call: CallContext, name: str) -> ToolOutput:
        if name != "." and not workspace.exists(call.workspace, name):
            raise ToolError(f"{name} is not a folder")
        rows = []
        for path, status in workspace.entries(call.workspace, name):
            if len(rows) == MAX_LISTED:
                rows.append(f"... more than {MAX_LISTED} files; list a folder of them")
                break
            rows.append(f"{path} {_size(call, path, status)}")
        return ToolOutput("\n".join(sorted(rows)) or "No files.")

    def _size(call: CallContext, path: str, status) -> str:
        if stat.S_ISLNK(status.st_mode):
            return "symbolic link"
        if not stat.S_ISREG(status.st_mode):
            return "not a regular file"
        try:
            return f"{len(_text(call, path))} characters"
        except ToolError:
            return f"{status.st_size} bytes"

    return Tool(
        name="file",
        description="Read (in pages), write, append, list, stat or patch text files of your workspace.",
        schema=SCHEMA,
        run=run,
        instant=True,
    )


def _read(call: CallContext, shown: str, text: str, offset: int, limit: int | None) -> ToolOutput:
    if offset and offset >= len(text):
        raise ToolError(f"offset {offset} is past the end; {shown} has {len(text)} characters")
    # Leaves room for the note below, which names three numbers and a path.
    page_chars = max(min(limit or call.max_chars, call.max_chars - 40 - len(shown)), 1)
    rest = text[offset:]
    page = rest[:page_chars]
    if len(rest) > page_chars and (newline := page.rfind("\n")) > 0:
        page = page[:newline]
    end = offset + len(page) + (1 if rest[len(page) : len(page) + 1] == "\n" else 0)
    sources = [call.known[name] for name in dict.fromkeys(citations.CITED.findall(page)) if name in call.known]
    if end < len(text):
        page += f"\n... {len(text) - end} characters left; read with offset {end}"
    return ToolOutput(page or "The file is empty.", sources=sources, paged=True, truncated=end < len(text))
