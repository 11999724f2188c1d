"""What all JSON rows have in common: an object, the fields that any may bring along, texts that are not empty."""

import json


def parsed(line: bytes) -> dict:
    """Returns a line as an object. Raises ValueError saying what it is instead."""
    try:
        row = json.loads(line)
    except UnicodeDecodeError:
        raise ValueError("not UTF-8 text") from None
    if not isinstance(row, dict):
        raise ValueError(f"expected a JSON object, got {type(row).__name__}")
    return row


def common(row: dict) -> dict:
    """The fields that any row may bring along, under their names here."""
    named = dict(
        id=row.get("id"),
        component=row.get("component"),
        capability=row.get("capability"),
        lang=row.get("lang") or row.get("language"),
        licence=row.get("licence") or row.get("license"),
        provenance=row.get("provenance") or row.get("url"),
    )
    found = {name: str(value) for name, value in named.items() if value not in (None, "") and _plain(value)}
    if component := found.pop("component", None):
        found["components"] = [component]
    return found


def _plain(value) -> bool:
    return isinstance(value, str | int)


def text(value, field: str) -> str:
    """Raises ValueError for what is no text or has none in it."""
    if not isinstance(value, str):
        raise ValueError(f"field {field!r}: expected text, got {type(value).__name__}")
    if not value.strip():
        raise ValueError(f"field {field!r} is empty")
    return value
