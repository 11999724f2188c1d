"""Parsing shared by all formats of JSON rows: the object, its optional fields, and texts that must not be empty."""

import json


def parsed(line: bytes) -> dict:
    """Returns a line as an object. Raises ValueError for anything else."""
    try:
        row = json.loads(line)
    except UnicodeDecodeError:
        raise ValueError("not UTF-8 text") from None
    if not isinstance(row, dict):
        raise ValueError(f"expected a JSON object, got {type(row).__name__}")
    return row


def common(row: dict) -> dict:
    """The optional fields of any row, under our names."""
    named = dict(
        id=row.get("id"),
        component=row.get("component"),
        capability=row.get("capability"),
        lang=row.get("lang") or row.get("language"),
        license=row.get("license") or row.get("licence"),
        provenance=row.get("provenance") or row.get("url"),
    )
    found = {name: str(value) for name, value in named.items() if value not in (None, "") and _plain(value)}
    if component := found.pop("component", None):
        found["components"] = [component]
    return found


def _plain(value) -> bool:
    return isinstance(value, str | int)


def text(value, field: str) -> str:
    """Returns `value`. Raises ValueError when it is no string or is blank."""
    if not isinstance(value, str):
        raise ValueError(f"field {field!r}: expected text, got {type(value).__name__}")
    if not value.strip():
        raise ValueError(f"field {field!r} is empty")
    return value
