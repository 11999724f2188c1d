"""`todo`: the plan of a session, stored on disk. The items decide the operation.

no items            show the list
[]                  delete the list
items without ids   create the list, or rewrite it
items with ids      change those (status, text); status "deleted" removes; items without ids are added
"""

import json
import os
from typing import Any

from tools_env.errors import ToolError
from tools_env.tools.base import CallContext, Tool, ToolOutput

MARKS = {"pending": "[ ]", "active": "[>]", "done": "[x]"}
SCHEMA = {
    "type": "object",
    "properties": {
        "items": {
            "type": "array",
            "maxItems": 50,
            "items": {
                "anyOf": [
                    {"type": "string", "minLength": 1},
                    {
                        "type": "object",
                        "properties": {
                            "id": {"type": "integer", "minimum": 1},
                            "text": {"type": "string", "minLength": 1},
                            "status": {"type": "string", "enum": [*MARKS, "deleted"]},
                        },
                    },
                ]
            },
        }
    },
}


async def run_todo(call: CallContext, arguments: dict[str, Any]) -> ToolOutput:
    path = call.directory / "todo.json"
    state = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {"next": 1, "items": []}
    items = arguments.get("items")
    if items is None:
        return ToolOutput(_shown("todo", state["items"]) if state["items"] else "No todo list.")
    if not items:
        path.unlink(missing_ok=True)
        return ToolOutput("deleted" if state["items"] else "No todo list.")
    rows = [{"text": item} if isinstance(item, str) else item for item in items]
    if any("id" in row for row in rows):
        verb = "updated"
        state = _update(state, rows)
    else:
        verb = "rewritten" if state["items"] else "created"
        state = {"next": 1, "items": []}
        for row in rows:
            _add(state, row)
    temporary = path.with_suffix(".tmp")
    temporary.write_text(json.dumps(state, ensure_ascii=False), encoding="utf-8")
    os.replace(temporary, path)
    return ToolOutput(_shown(verb, state["items"]))


def _update(state: dict, rows: list[dict]) -> dict:
    """Returns the changed list; raises ToolError before anything has changed."""
    state = {"next": state["next"], "items": [dict(item) for item in state["items"]]}
    by_id = {item["id"]: item for item in state["items"]}
    for row in rows:
        if "id" not in row:
            _add(state, row)
            continue
        if row["id"] not in by_id:
            raise ToolError(f"no item {row['id']}; the list has {', '.join(map(str, by_id)) or 'no items'}")
        by_id[row["id"]].update({name: row[name] for name in ("text", "status") if name in row})
    state["items"] = [item for item in state["items"] if item["status"] != "deleted"]
    return state


def _add(state: dict, row: dict) -> None:
    if "text" not in row:
        raise ToolError("a new item needs text")
    state["items"].append({"id": state["next"], "text": row["text"], "status": row.get("status", "pending")})
    state["next"] += 1


def _shown(verb: str, items: list[dict]) -> str:
    return "\n".join([verb, *(f"{item['id']}. {MARKS[item['status']]} {item['text']}" for item in items)])


TOOL = Tool(
    name="todo",
    description="Keep the plan: items without ids write the list, items with ids change it, [] deletes it.",
    schema=SCHEMA,
    run=run_todo,
    instant=True,
)
