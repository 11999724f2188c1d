"""What a session must remember over the death of its process: one append-only file of JSON lines in its folder.

A record is one write, so a killed process leaves whole lines and at most one torn last line, which reading drops. It
survives the process, not a power cut: nothing waits for the disk.
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
        """Returns the whole records; empty when there is no journal."""
        try:
            lines = self._path.read_bytes().split(b"\n")
        except FileNotFoundError:
            return []
        # What follows the last newline was cut by the death of the process; a later append must not join it.
        if lines.pop():
            with open(self._path, "r+b") as file:
                file.truncate(sum(len(line) + 1 for line in lines))
        return [json.loads(line) for line in lines]

    def age(self, now: float) -> float:
        """Seconds of wall time since the last record."""
        return now - self._path.stat().st_mtime
