"""Reads the offline web, or documents of one's own, as the records that synthesis works on."""

import dataclasses
from pathlib import Path
from typing import Any

import pydantic

from stepdr_jax import files
from stepdr_jax.errors import UserError
from stepdr_jax.records import Document, Triple, read_records


@dataclasses.dataclass(frozen=True)
class Entity:
    """A thing with a name in both languages. `attributes`: relation -> language -> value as pages write it."""

    id: str
    kind: str  # country, city, currency, language, region
    en: str
    zh: str
    attributes: dict[str, dict[str, str]]


@dataclasses.dataclass(frozen=True)
class PlantedError:
    """A passage of the offline web that is wrong on purpose, with the true value."""

    url: str
    lang: str
    passage: str
    entity: str
    relation: str
    stated: str
    true: str
    reason: str  # swapped: another entity's value; outdated: a former value


def read_documents(world_dir: str | Path) -> list[Document]:
    """Pages in file order. Raises UserError when the file is absent or a row does not validate."""
    return read_records(Path(world_dir) / "documents.jsonl", Document)


def read_triples(world_dir: str | Path) -> list[Triple]:
    return read_records(Path(world_dir) / "triples.jsonl", Triple)


def read_entities(world_dir: str | Path) -> dict[str, Entity]:
    """Entity id -> entity, in file order."""
    return {entity.id: entity for entity in _rows(Path(world_dir) / "entities.jsonl", Entity)}


def read_planted_errors(world_dir: str | Path) -> list[PlantedError]:
    """The wrong passages of the offline web; a policy never sees this list."""
    return _rows(Path(world_dir) / "errors.jsonl", PlantedError)


def _rows(path: Path, kind: type) -> list[Any]:
    adapter = pydantic.TypeAdapter(kind)
    found = []
    for number, row in enumerate(files.read_jsonl(path), 1):
        try:
            found.append(adapter.validate_python(row))
        except pydantic.ValidationError as error:
            first = error.errors()[0]
            raise UserError(
                f"{path} row {number}: field {'.'.join(map(str, first['loc']))!r}: {first['msg']}; "
                f"delete {path.parent} and build the offline web again"
            ) from None
    return found
