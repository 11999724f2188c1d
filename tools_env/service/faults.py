"""Fault injection on a session's request, to study how an agent copes: declarative, seeded and deterministic.

A profile is JSON, one list of faults per tool ("*" for every tool), e.g.

    {"seed": 7, "tools": {"batch_web_surfer": [{"kind": "latency", "rate": 0.5, "seconds": 1.0},
                                               {"kind": "contradiction", "rate": 0.2}]}}

kind              effect on a call                                           settings (default)
latency           it waits first                                             seconds (0.5)
timeout           it waits, then fails as timed out; the tool never runs     seconds (1.0)
http_error        it fails with an HTTP status; the tool never runs          status (503)
empty             the tool runs, its result is "No results."
truncate          the text is cut, possibly within a sentence                keep (0.5), the share that is kept
rename_fields     an argument has another name for the whole session         fields ({"queries": "q"}), required
contradiction     each passage is followed by a contradicting one

`rate` (default 1) is the probability. Draws are hashes of (seed, session's seed, tool, fault, call id), so the order
and timing of calls do not matter. The reply's `faults` names what was injected; its text does not.
"""

import asyncio
import copy
import dataclasses
import hashlib
import json
import re
import time
from collections.abc import Collection, Mapping
from typing import Any

from tools_env.errors import BadArguments, ToolError
from tools_env.search.citations import Citations
from tools_env.tools.base import ToolOutput

KINDS = {
    "latency": {"seconds": 0.5},
    "timeout": {"seconds": 1.0},
    "http_error": {"status": 503},
    "empty": {},
    "truncate": {"keep": 0.5},
    "rename_fields": {"fields": None},
    "contradiction": {},
}
_NUMBER = re.compile(r"[0-9]{1,15}")
_NAME = re.compile(r"(?<=[a-z,] )[A-Z][a-z]{2,}")
_OTHER_NAMES = ("Aldmere", "Corvain", "Eastholm", "Marrowby", "Tessaly")


@dataclasses.dataclass(frozen=True)
class Fault:
    kind: str
    rate: float
    settings: Mapping[str, Any]
    position: int  # index in its tool's list; part of the draw


@dataclasses.dataclass(frozen=True)
class FaultProfile:
    seed: int
    tools: Mapping[str, tuple[Fault, ...]]

    def plan(self, tool: str, session_seed: int, call_id: str) -> "FaultPlan":
        """Returns the faults of one call."""
        chosen = []
        for fault in self.tools.get(tool, self.tools.get("*", ())):
            # A field stays renamed for the whole session, like an interface.
            unit = "" if fault.kind == "rename_fields" else call_id
            digest = _draw(self.seed, session_seed, tool, fault.position, unit)
            if int.from_bytes(digest[:8], "big") / 2**64 < fault.rate:
                chosen.append((fault, digest))
        return FaultPlan(tuple(chosen))


def parse_fault_profile(text: str, tools: Collection[str]) -> FaultProfile:
    """Returns the profile; "" means no faults. Raises BadArguments that names the wrong part."""
    if not text:
        return FaultProfile(0, {})
    try:
        given = json.loads(text)
        seed, by_tool = int(given.get("seed", 0)), given["tools"]
        rows = {tool: list(faults) for tool, faults in by_tool.items()}
    except (ValueError, KeyError, TypeError, AttributeError):
        raise BadArguments('faults must be {"seed": number, "tools": {tool: [fault, ...]}}') from None
    for tool in rows:
        if tool != "*" and tool not in tools:
            raise BadArguments(f"faults name no tool of this host: {tool}; the tools are {', '.join(tools)}")
    return FaultProfile(
        seed, {tool: tuple(_fault(tool, i, row) for i, row in enumerate(of)) for tool, of in rows.items()}
    )


def _fault(tool: str, position: int, row: Any) -> Fault:
    where = f"faults of {tool}, entry {position}"
    if not isinstance(row, dict) or row.get("kind") not in KINDS:
        raise BadArguments(f"{where}: kind must be one of {', '.join(KINDS)}")
    allowed = KINDS[row["kind"]]
    for name in row:
        if name not in ("kind", "rate", *allowed):
            raise BadArguments(f"{where}: {row['kind']} has no setting {name}; it has {', '.join(['rate', *allowed])}")
    settings = {name: row.get(name, default) for name, default in allowed.items()}
    rate = row.get("rate", 1.0)
    bounds = {"rate": (rate, 0, 1), **{name: (settings[name], 0, 3600) for name in settings if name != "fields"}}
    if "keep" in bounds:
        bounds["keep"] = (settings["keep"], 0, 1)
    for name, (value, low, high) in bounds.items():
        if isinstance(value, bool) or not isinstance(value, int | float) or not low <= value <= high:
            raise BadArguments(f"{where}: {name} must be a number from {low} to {high}, got {value!r}")
    if "fields" in settings:
        fields = settings["fields"]
        if not isinstance(fields, dict) or not fields or not all(isinstance(v, str) and v for v in fields.values()):
            raise BadArguments(f'{where}: fields must be {{"old name": "new name"}}')
    return Fault(row["kind"], float(rate), settings, position)


def _draw(*parts: Any) -> bytes:
    return hashlib.sha256(json.dumps(parts).encode()).digest()


@dataclasses.dataclass(frozen=True)
class FaultPlan:
    """The faults of one call, each with the digest that its random choices derive from."""

    chosen: tuple[tuple[Fault, bytes], ...]

    def _of(self, *kinds: str) -> list[tuple[Fault, bytes]]:
        return [pair for pair in self.chosen if pair[0].kind in kinds]

    def arguments(self, given: dict[str, Any], schema: Mapping[str, Any], injected: list[str]) -> dict[str, Any]:
        """Returns the arguments under the tool's own names. Raises BadArguments for the old name of a renamed field."""
        for fault, _ in self._of("rename_fields"):
            injected.append(fault.kind)
            new = {old: name for old, name in fault.settings["fields"].items() if old in schema.get("properties", {})}
            for old in new:
                if old in given:
                    names = ", ".join(new.get(name, name) for name in schema["properties"])
                    raise BadArguments(f"unknown field {old}; the fields are {names}")
            back = {name: old for old, name in new.items()}
            given = {back.get(name, name): value for name, value in given.items()}
        return given

    async def before(self, deadline: float, injected: list[str]) -> None:
        """Waits and fails as planned. `deadline`: time.monotonic() of the call's end. Raises ToolError."""
        for fault, _ in self._of("latency", "timeout", "http_error"):
            injected.append(fault.kind)
            if fault.kind == "http_error":
                raise ToolError(f"HTTP {fault.settings['status']:g}")
            left = max(deadline - time.monotonic() - 0.05, 0.0)
            await asyncio.sleep(
                min(fault.settings["seconds"], left) if fault.kind == "timeout" else fault.settings["seconds"]
            )
            if fault.kind == "timeout":
                raise ToolError("timed out")

    def after(self, output: ToolOutput, injected: list[str]) -> ToolOutput:
        """Returns the output with the faults applied; the given one may be shared and is not changed."""
        for fault, digest in self._of("empty", "contradiction", "truncate"):
            if output.failed:
                break
            injected.append(fault.kind)
            output = copy.copy(output)
            if fault.kind == "empty":
                output = ToolOutput("No results.", cache_hit=output.cache_hit)
            elif fault.kind == "contradiction":
                _contradict(output, digest)
            else:
                output.text = output.text[: int(len(output.text) * fault.settings["keep"])]
                output.blocks = []
                output.sources = [s for s in output.sources if f"\\cite{{{s.id}}}" in output.text]
        return output


def _contradict(output: ToolOutput, digest: bytes) -> None:
    """Adds a contradicting copy, with its own citation id, after every passage that has a number or a name."""
    ids, twins = Citations(), []
    for i, source in enumerate(output.sources):
        other = _altered(source.text, digest[i % 32] + i)
        if other == source.text:
            continue
        url = source.url + ("&" if "?" in source.url else "?") + "edition=2"
        twin = dataclasses.replace(source, id=ids.id(url, other), url=url, text=other)
        old = f"{source.text} \\cite{{{source.id}}}"
        new = f"{old}\n{other} \\cite{{{twin.id}}}"
        output.text = output.text.replace(old, new)
        output.blocks = [block.replace(old, new) for block in output.blocks]
        twins.append(twin)
    output.sources = [*output.sources, *twins]


def _altered(text: str, choice: int) -> str:
    """Returns the text with its last number, or else its last name within a sentence, replaced."""
    if numbers := list(_NUMBER.finditer(text)):
        last = numbers[-1]
        return text[: last.start()] + str(int(last.group()) + 1 + choice % 9) + text[last.end() :]
    if names := list(_NAME.finditer(text)):
        last = names[-1]
        other = [name for name in _OTHER_NAMES if name != last.group()][choice % 4]
        return text[: last.start()] + other + text[last.end() :]
    return text
