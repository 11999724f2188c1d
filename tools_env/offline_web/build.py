"""Writes an offline web to disk: the built-in pages, the facts behind them, and the user's own documents.

documents.jsonl  one page per line: id, url, title, text (markdown, one passage per line), lang, source, authority,
                 published_at, links
entities.jsonl   id, kind, en, zh, attributes (relation -> language -> value as written)
triples.jsonl    head, relation, tail, tail_is_entity
errors.jsonl     passages with injected errors: url, lang, passage, entity, relation, stated, true, reason
sites.json       hosts with their authority and behavior, redirects and pages with defects; fingerprint of the inputs

Equal inputs give byte-equal files. The clock is not read: pages are dated before pages.LAST_DAY.
"""

import contextlib
import dataclasses
import hashlib
import json
import os
import shutil
from collections.abc import Iterable
from pathlib import Path

from tools_env.errors import ToolHostError
from tools_env.offline_web import folder, pages, sentences
from tools_env.offline_web.facts import Entity, load_facts, source_version


def build_offline_web(offline_web_dir: str | os.PathLike, *, seed: int, documents: str = "") -> None:
    """Builds the offline web in `offline_web_dir` (2 s without documents), unless it exists for these inputs.

    The directory is replaced atomically. An offline web of other inputs is replaced, with everything derived from it.

    Args:
        offline_web_dir: absent, empty, or an earlier offline web.
        seed: decides dates, links, which passages have errors, and which pages exist on the smaller hosts.
        documents: folder of md, html, txt and pdf files to add as the host library.test; "" for none.

    Raises:
        ToolHostError: the folder or one of its files cannot be read, or `offline_web_dir` holds something else.
    """
    target = Path(offline_web_dir)
    library = folder.read_folder(documents) if documents else []
    fingerprint = _fingerprint(seed, library)
    if _built(target) == fingerprint:
        return
    if target.exists() and not (target / "sites.json").is_file() and (not target.is_dir() or any(target.iterdir())):
        raise ToolHostError(
            f"expected {target} to be absent, empty or a built offline web; it is not; name another directory"
        )
    temporary = target.with_name(f".{target.name}.{os.getpid()}.tmp")
    retired = target.with_name(f".{target.name}.{os.getpid()}.old")
    try:
        temporary.mkdir(parents=True, exist_ok=False)
        _write(temporary, seed, library, fingerprint)
        if target.exists():
            os.rename(target, retired)
        try:
            os.rename(temporary, target)
        except OSError:
            if _built(target) != fingerprint:  # else another process built the same one first
                raise
    except OSError as error:
        if not target.exists() and retired.exists():
            os.rename(retired, target)
        raise ToolHostError(
            f"cannot write the offline web to {target}: {error.strerror}; free the path or name another"
        ) from None
    finally:
        for leftover in (temporary, retired):
            shutil.rmtree(leftover, ignore_errors=True)


def _fingerprint(seed: int, library: list[dict]) -> str:
    """Returns the hash of all inputs: the seed, the data sources, the code of this package, the documents."""
    digest = hashlib.sha256(f"{seed} {source_version()}".encode())
    for source in sorted(Path(__file__).parent.glob("*.py")):
        digest.update(source.read_bytes())
    for row in library:
        digest.update(json.dumps(row, ensure_ascii=False, sort_keys=True).encode())
    return digest.hexdigest()


def _built(target: Path) -> str | None:
    with contextlib.suppress(OSError, ValueError, KeyError):
        return json.loads((target / "sites.json").read_text(encoding="utf-8"))["fingerprint"]
    return None


def _write(out: Path, seed: int, library: list[dict], fingerprint: str) -> None:
    facts = load_facts()
    built = list(pages.all_pages(facts, seed))
    _write_rows(out / "documents.jsonl", [*(page.document() for page in built), *library])
    _write_rows(out / "entities.jsonl", map(_entity_row, facts.entities.values()))
    _write_rows(out / "triples.jsonl", facts.triples())
    mistakes = [
        {"url": page.url, "lang": page.lang} | dataclasses.asdict(mistake)
        for page in built
        for mistake in page.mistakes
    ]
    _write_rows(out / "errors.jsonl", mistakes)
    hosts = {name: dict(site) for name, site in pages.HOSTS.items()}
    if library:
        hosts[folder.HOST] = dict(folder.SITE)
    for name, moved in pages.redirects(facts).items():
        hosts[name]["redirects"] = moved
    for name, odd in pages.oddities().items():
        hosts[name]["pages"] = odd
    counts = {name: sum(page.host == name for page in built) for name in pages.HOSTS}
    if library:
        counts[folder.HOST] = len(library)
    for name, count in counts.items():
        hosts[name]["documents"] = count
    sites = {"fingerprint": fingerprint, "seed": seed, "hosts": hosts}
    _write_text(out / "sites.json", json.dumps(sites, ensure_ascii=False, indent=1, sort_keys=True) + "\n")


def _entity_row(entity: Entity) -> dict:
    attributes = {
        relation: {
            lang: sentences.join_items(value.items(lang), lang)
            for lang in pages.LANGS
            if lang == "en" or relation in sentences.WORD_ZH
        }
        for relation, value in entity.values.items()
    }
    return {"id": entity.id, "kind": entity.kind, "en": entity.en, "zh": entity.zh, "attributes": attributes}


def _write_rows(path: Path, rows: Iterable[dict]) -> None:
    _write_text(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))


def _write_text(path: Path, text: str) -> None:
    with open(path, "w", encoding="utf-8", newline="\n") as out:
        out.write(text)
        out.flush()
        os.fsync(out.fileno())
