"""`file`: the session's workspace. Reads page, writes are atomic, and no path leads outside."""

import os
from pathlib import Path
from typing import Any

from tools_env.errors import BadArguments, ToolError
from tools_env.search import citations
from tools_env.tools import patch
from tools_env.tools.base import Call, Output, Tool

_NEEDED = {
    "read": ("path",),
    "write": ("path", "content"),
    "append": ("path", "content"),
    "list": (),
    "stat": ("path",),
    "patch": ("path", "anchor", "replacement"),
}
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


def make(max_file_chars: int, max_files: int) -> Tool:
    """Returns the tool with its quotas: characters of one file, files of one workspace."""

    async def run(call: Call, arguments: dict[str, Any]) -> Output:
        op = arguments["op"]
        for name in _NEEDED[op]:
            if name not in arguments:
                raise BadArguments(f"{op} needs {name}")
        if op == "list":
            return _list(call, arguments.get("path", "."))
        path = _inside(call.workspace, arguments["path"])
        shown = path.relative_to(call.workspace.resolve()).as_posix()
        if op in ("write", "append"):
            old = _text(path, shown) if op == "append" and path.exists() else ""
            return _write(call, path, shown, old + arguments["content"], len(arguments["content"]), op)
        text = _text(path, shown)
        if op == "read":
            return _read(call, shown, text, arguments.get("offset", 0), arguments.get("limit"))
        if op == "stat":
            return Output(f"{shown}: {len(text)} characters, {len(text.splitlines())} lines")
        patched = patch.apply(text, arguments["anchor"], arguments["replacement"])
        _save(call, path, patched.text)
        how = "" if patched.exact else " (anchor matched approximately)"
        lines = f"line {patched.first_line}"
        if patched.last_line > patched.first_line:
            lines = f"lines {patched.first_line}-{patched.last_line}"
        return Output(f"patched {shown} {lines}{how}")

    def _save(call: Call, path: Path, text: str) -> None:
        if len(text) > max_file_chars:
            raise ToolError(f"the file would have {len(text)} characters, at most {max_file_chars} are allowed")
        if path.is_dir():
            raise ToolError("path is a folder")
        if not path.exists() and sum(1 for p in call.workspace.rglob("*") if p.is_file()) >= max_files:
            raise ToolError(f"the workspace has {max_files} files already; write to one of them")
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
        except (FileExistsError, NotADirectoryError):
            raise ToolError("a part of path is a file, not a folder") from None
        temporary = path.with_name(f".{path.name}.tmp")
        temporary.write_text(text, encoding="utf-8")
        os.replace(temporary, path)

    def _write(call: Call, path: Path, shown: str, text: str, added: int, op: str) -> Output:
        _save(call, path, text)
        return Output(f"{'wrote' if op == 'write' else 'appended'} {added} characters to {shown}")

    return Tool(
        name="file",
        description="Read (in pages), write, append, list, stat or patch text files of your workspace.",
        schema=SCHEMA,
        run=run,
    )


def _inside(workspace: Path, name: str) -> Path:
    """Returns the absolute path of `name`; raises ToolError when it lies outside the workspace, links followed."""
    root = workspace.resolve()
    try:
        path = (root / name).resolve()
    except (OSError, ValueError, RuntimeError):
        raise ToolError(f"{name!r} is not a usable path") from None
    if "\0" in name or Path(name).is_absolute() or not path.is_relative_to(root):
        raise ToolError(f"{name} lies outside the workspace; use a relative path")
    if len(name) > 200 or any(len(part.encode()) > 200 for part in path.parts):
        raise ToolError("path is too long; use at most 200 characters")
    return path


def _text(path: Path, shown: str) -> str:
    if path.is_dir():
        raise ToolError(f"{shown} is a folder; use list")
    try:
        return path.read_text(encoding="utf-8")
    except (FileNotFoundError, NotADirectoryError):
        raise ToolError(f"{shown} does not exist; use list") from None


def _list(call: Call, name: str) -> Output:
    folder = _inside(call.workspace, name)
    if folder.is_file() or not folder.exists():
        raise ToolError(f"{name} is not a folder")
    root = call.workspace.resolve()
    files = sorted(p for p in folder.rglob("*") if p.is_file() and not p.name.endswith(".tmp"))
    lines = [f"{p.relative_to(root).as_posix()} {len(p.read_text(encoding='utf-8'))} characters" for p in files]
    return Output("\n".join(lines) or "No files.")


def _read(call: Call, shown: str, text: str, offset: int, limit: int | None) -> Output:
    if offset and offset >= len(text):
        raise ToolError(f"offset {offset} is past the end; {shown} has {len(text)} characters")
    # The note below may name three numbers and a path; the page leaves room for it.
    page_chars = max(min(limit or call.max_chars, call.max_chars - 40 - len(shown)), 1)
    rest = text[offset:]
    page = rest[:page_chars]
    if len(rest) > page_chars and (newline := page.rfind("\n")) > 0:
        page = page[:newline]
    end = offset + len(page) + (1 if rest[len(page) : len(page) + 1] == "\n" else 0)
    sources = [call.known[name] for name in dict.fromkeys(citations.CITED.findall(page)) if name in call.known]
    if end < len(text):
        page += f"\n... {len(text) - end} characters left; read with offset {end}"
    return Output(page or "The file is empty.", sources=sources, paged=True, truncated=end < len(text))
