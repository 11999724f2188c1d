"""Readers of public source formats: files of Wikipedia, papers, trajectories, dialogue or one's own data to rows.

A source is an entry of `config.data.sources`: name -> {format, path, component, capability, lang, licence}. `path` is a glob;
`component` is the mixture component that its rows belong to (synthesis rows name their own). The others fill in what a row
does not say. A format is a container (how a file is cut into records) and a conversion (a record to a row).

A row is a dict with `id`, `component`, `capability`, `lang`, `licence`, `provenance` (url, else file and position) and one of
`text` | `prompt`, `completion` (optionally `chat`, `loss`) | `trajectory` (a `records.Trajectory` as a dict).
"""

import dataclasses
import functools
import glob
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from stepdr_jax.data.sources import agents, articles, containers, dialogue, plain
from stepdr_jax.errors import UserError
from stepdr_jax.text.scripts import document_language


@dataclasses.dataclass(frozen=True)
class Format:
    """`container` has parts(path, size), scan(path, part) and pick(path, part, keys); `row` takes a record apart."""

    container: Any
    row: Callable[[Any], dict | None]  # None: left out on purpose, such as a redirect; ValueError: a bad row


FORMATS = {
    "jsonl": Format(containers.Lines, plain.any_row),
    "synthesis_reading": Format(containers.Lines, plain.synthesis_reading),
    "synthesis_trajectories": Format(containers.Lines, plain.synthesis_trajectory),
    "text": Format(containers.WholeFile, plain.text_file),
    "wikipedia": Format(containers.MediaWiki, articles.wikipedia),
    "baike": Format(containers.Lines, articles.baike),
    "papers": Format(containers.Lines, articles.paper),
    "synth": Format(containers.Parquet, articles.synth),
    "url_qa": Format(containers.Lines, plain.url_qa),
    "dialogue": Format(containers.Lines, dialogue.dialogue),
    "adp": Format(containers.Lines, agents.agent_data_protocol),
    "adp_json": Format(containers.JsonArray, agents.agent_data_protocol),
}
FIELDS = ("format", "path", "component", "capability", "lang", "licence", "family")


@dataclasses.dataclass(frozen=True)
class Source:
    """One entry of `config.data.sources`, checked. `files` are sorted, so the same folder gives the same order."""

    name: str
    format: str
    files: tuple[Path, ...]
    component: str
    capability: str = ""
    lang: str = ""
    licence: str = ""
    family: str = ""

    def scan(self, path: Path, part: tuple[int, int]) -> Iterator[tuple[int, dict | ValueError | None, int]]:
        """Yields (key, row, bytes) of a part: the row, None where it is left out on purpose, the error of a bad row."""
        for key, record in FORMATS[self.format].container.scan(path, part):
            size = record.size if isinstance(record, containers.Broken) else containers.size_of(record)
            yield key, self._row(record, path, key), size

    def pick(self, path: Path, part: tuple[int, int], keys: list[int]) -> Iterator[dict]:
        """Yields the rows of these keys of a part, which `scan` has found good, in ascending order."""
        for key, record in FORMATS[self.format].container.pick(path, part, keys):
            row = self._row(record, path, key)
            if not isinstance(row, dict):
                raise UserError(f"{path} changed while data was built; run launch.build_data again")
            yield row

    def parts(self, path: Path, size: int) -> list[tuple[int, int]]:
        """Returns how a file is cut for workers: pieces of about `size` bytes where the format allows it."""
        return FORMATS[self.format].container.parts(path, size)

    def _row(self, record: Any, path: Path, key: int) -> dict | ValueError | None:
        if isinstance(record, containers.Broken):
            return ValueError(record.reason)
        try:
            row = FORMATS[self.format].row(record)
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            reason = f"field {error} is missing" if isinstance(error, KeyError) else str(error)
            return ValueError(reason)
        if row is None:
            return None
        row["provenance"] = row.get("provenance") or f"{path.name}:{key}"
        row["id"] = row.get("id") or f"{self.name}/{row['provenance']}"
        row["components"] = [self.component] if self.component else row.get("components") or []
        if not row["components"] and row.get("components") is None:
            return ValueError("the row names no component, and its source has none")
        row["capability"] = row.get("capability") or self.capability
        row["licence"] = row.get("licence") or self.licence
        row["lang"] = row.get("lang") or self.lang or document_language(words_of(row))
        return row


def words_of(row: dict) -> str:
    """What a row says, as one text: what duplicates and evaluation questions are looked for in.

    System prompts are left out, as many trajectories share a long one and are no duplicates for that.
    """
    if "trajectory" in row:
        return "\n".join(m["content"] for m in row["trajectory"]["messages"] if m["role"] != "system")
    return row["text"] if "text" in row else f"{row['prompt']}\n{row['completion']}"


def of(config: ConfigDict) -> list[Source]:
    """Returns the sources of a config: its own entries and what launch.synthesize has written into run_dir/corpus.

    Raises UserError for an unknown format or field, and for a path where nothing lies.
    """
    found = []
    corpus = Path(config.run_dir) / "corpus"
    for format_, name in (("synthesis_reading", "reading.jsonl"), ("synthesis_trajectories", "trajectories.jsonl")):
        if (corpus / name).exists():
            found.append(Source(name.removesuffix(".jsonl"), format_, (corpus / name,), component=""))
        elif not config.data.sources:
            raise UserError(f"{corpus / name} does not exist; run launch.synthesize first, or fill config.data.sources")
    return found + [_checked(name, dict(entry)) for name, entry in config.data.sources.items()]


@functools.lru_cache(maxsize=64)
def _files(pattern: str) -> tuple[Path, ...]:
    return tuple(Path(name) for name in sorted(glob.glob(pattern, recursive=True)) if Path(name).is_file())


def _checked(name: str, entry: dict) -> Source:
    where = f"config.data.sources.{name}"
    if unknown := set(entry) - set(FIELDS):
        raise UserError(f"{where}: unknown field {sorted(unknown)[0]!r}; it may have {', '.join(FIELDS)}")
    if entry.get("format") not in FORMATS:
        raise UserError(f"{where}.format: expected one of {', '.join(FORMATS)}, got {entry.get('format')!r}")
    files = _files(entry.get("path", ""))
    if not files:
        raise UserError(
            f"{where}.path: no file matches {entry.get('path', '')!r}; correct the path (a glob may be used)"
        )
    names_own = entry["format"].startswith("synthesis_")
    if not entry.get("component") and not names_own:
        raise UserError(f"{where}.component: expected the mixture component of its rows, got none")
    texts = {field: str(entry.get(field, "")) for field in FIELDS if field not in ("format", "path")}
    return Source(name, entry["format"], files, **texts)
