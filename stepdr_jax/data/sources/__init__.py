"""Readers of public source formats: Wikipedia, papers, trajectories, dialogue or your own data to rows.

A source is an entry of `config.data.sources`: name -> {format, path, component, capability, lang, license, family}.
`path` is a glob; `component` is the mixture component that its rows belong to (synthesis rows name their own). The
other fields are defaults for rows that lack them. A format is a container (how a file is divided into records) and a
conversion (of a record to a row).

A row is a dict with `id`, `components`, `capability`, `lang`, `license`, `provenance` (URL, or file and position) and
one of `text` | `prompt`, `completion` (optionally `chat`, `loss`) | `trajectory` (a `records.Trajectory` as a dict).
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
    """`container` has parts(path, size), scan(path, part) and pick(path, part, keys); `row` converts a record."""

    container: Any
    row: Callable[[Any], dict | None]  # None: skipped on purpose, such as a redirect; ValueError: a bad row


FORMATS = {
    "jsonl": Format(containers.Lines, plain.any_row),
    "synthesis_documents": Format(containers.Lines, plain.synthesis_documents),
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
FIELDS = ("format", "path", "component", "capability", "lang", "license", "family")


@dataclasses.dataclass(frozen=True)
class DataSource:
    """A validated entry of `config.data.sources`. `files` are sorted, so the same folder gives the same order."""

    name: str
    format: str
    files: tuple[Path, ...]
    component: str
    capability: str = ""
    lang: str = ""
    license: str = ""
    family: str = ""

    def scan(self, path: Path, part: tuple[int, int]) -> Iterator[tuple[int, dict | ValueError | None, int]]:
        """Yields (key, row, bytes) of each record; the row is None if skipped on purpose, a ValueError if bad."""
        for key, record in FORMATS[self.format].container.scan(path, part):
            size = record.size if isinstance(record, containers.Broken) else containers.size_of(record)
            yield key, self._row(record, path, key), size

    def pick(self, path: Path, part: tuple[int, int], keys: list[int]) -> Iterator[dict]:
        """Yields the rows of a part with these keys, which `scan` found good, in ascending order."""
        for key, record in FORMATS[self.format].container.pick(path, part, keys):
            row = self._row(record, path, key)
            if not isinstance(row, dict):
                raise UserError(f"{path} changed while data was built; run launch.build_data again")
            yield row

    def parts(self, path: Path, size: int) -> list[tuple[int, int]]:
        """Returns the parts of a file for workers: of about `size` bytes each where the format allows it."""
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
        row["license"] = row.get("license") or self.license
        row["lang"] = row.get("lang") or self.lang or document_language(row_text(row))
        return row


def row_text(row: dict) -> str:
    """The text of a row in which duplicates and evaluation questions are searched.

    System prompts are left out: many trajectories share a long one without being duplicates.
    """
    if "trajectory" in row:
        return "\n".join(m["content"] for m in row["trajectory"]["messages"] if m["role"] != "system")
    return row["text"] if "text" in row else f"{row['prompt']}\n{row['completion']}"


def list_sources(config: ConfigDict) -> list[DataSource]:
    """Returns the sources of a config: the files that launch.synthesize wrote into run_dir/corpus, then its entries.

    Raises UserError for an unknown format or field, and for a path without files.
    """
    found = []
    corpus = Path(config.run_dir) / "corpus"
    written = {"synthesis_documents": "synthetic_documents.jsonl", "synthesis_trajectories": "trajectories.jsonl"}
    for format_, name in written.items():
        if (corpus / name).exists():
            found.append(DataSource(name.removesuffix(".jsonl"), format_, (corpus / name,), component=""))
        elif not config.data.sources:
            raise UserError(f"{corpus / name} does not exist; run launch.synthesize first, or fill config.data.sources")
    return found + [_validated(name, dict(entry)) for name, entry in config.data.sources.items()]


@functools.lru_cache(maxsize=64)
def _files(pattern: str) -> tuple[Path, ...]:
    return tuple(Path(name) for name in sorted(glob.glob(pattern, recursive=True)) if Path(name).is_file())


def _validated(name: str, entry: dict) -> DataSource:
    where = f"config.data.sources.{name}"
    if unknown := set(entry) - set(FIELDS):
        raise UserError(f"{where}: unknown field {sorted(unknown)[0]!r}; allowed fields: {', '.join(FIELDS)}")
    if entry.get("format") not in FORMATS:
        raise UserError(f"{where}.format: expected one of {', '.join(FORMATS)}, got {entry.get('format')!r}")
    files = _files(entry.get("path", ""))
    if not files:
        raise UserError(
            f"{where}.path: no file matches {entry.get('path', '')!r}; correct the path (globs are allowed)"
        )
    names_components = entry["format"].startswith("synthesis_")
    if not entry.get("component") and not names_components:
        raise UserError(f"{where}.component: expected the mixture component of its rows, got none")
    texts = {field: str(entry.get(field, "")) for field in FIELDS if field not in ("format", "path")}
    return DataSource(name, entry["format"], files, **texts)
