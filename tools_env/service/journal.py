"""Journal of a session, from which a restarted process restores it: one append-only file of JSON lines.

Each record is one write, so a killed process leaves whole lines and at most one torn last line, which is dropped on
reading. The journal survives the process but not a power failure: writes do not wait for the disk.
"""

import json
import os
from pathlib import Path
from typing import Any

NAME = "journal.jsonl"


class SessionJournal:
    """The records of one session, oldest first."""

    def __init__(self, directory: Path):
        self._path = directory / NAME

    def append(self, record: dict[str, Any]) -> None:
        line = json.dumps(record, ensure_ascii=False, separators=(",", ":")) + "\n"
        descriptor = os.open(self._path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
        try:
            os.write(descriptor, line.encode())
        finally:
            os.close(descriptor)

    def read(self) -> list[dict[str, Any]]:
        """Returns the complete records; empty when there is no journal."""
        try:
            lines = self._path.read_bytes().split(b"\n")
        except FileNotFoundError:
            return []
        # A torn last line is removed, so that a later append does not join it.
        if lines.pop():
            with open(self._path, "r+b") as file:
                file.truncate(sum(len(line) + 1 for line in lines))
        return [json.loads(line) for line in lines]

    def age(self, now: float) -> float:
        """Returns the seconds of wall time since the last record."""
        return now - self._path.stat().st_mtime
