"""First pass over the sources: finds good and bad rows, duplicates, and rows that hold evaluation questions.

Each part of a source file gives one file, data/scan/<source>-<file>-<part>.npz, with all that later passes need to know
about it: for each good row its key, components, content hash, duplicate hashes and evaluation question. The file is
written atomically and kept as long as the part and the scan options are the same.
"""

import dataclasses
import functools
import hashlib
import json
from collections import Counter
from pathlib import Path

import numpy as np

from stepdr_jax import files
from stepdr_jax.data import similarity, sources
from stepdr_jax.errors import UserError

VERSION = 3  # raise when the content of a scan file changes its meaning
MAX_LISTED = 20  # bad rows that are listed; the others are only counted


@dataclasses.dataclass(frozen=True)
class Part:
    """A part of a source file, and the path of its scan file."""

    source: sources.DataSource
    path: Path
    part: tuple[int, int]
    out: Path


@dataclasses.dataclass(frozen=True)
class ScanOptions:
    """What to look for. `evaluation_sets`: name -> path."""

    exact: bool  # exact duplicates
    near: bool  # near duplicates
    evaluation_sets: dict[str, str]
    stop: bool  # at a bad row


@dataclasses.dataclass
class Scan:
    """The good rows of a part.

    keys int64[N]; sizes int32[N] in bytes; labels uint16[N], index into `components`; content, exact uint64[N]; bands
    uint64[N, BANDS or 0]; evaluation int16[N]: 0, or the number of the evaluation set from 1, negative when the row
    also holds the answer. `facts` has counts.
    """

    keys: np.ndarray
    sizes: np.ndarray
    labels: np.ndarray
    content: np.ndarray
    exact: np.ndarray
    bands: np.ndarray
    evaluation: np.ndarray
    components: list[list[str]]
    facts: dict


def list_parts(found: list[sources.DataSource], folder: Path, size: int) -> list[Part]:
    """Returns all parts of all sources, in order; `size` of a part in bytes."""
    return [
        Part(source, path, part, folder / f"{source.name}-{index:05d}-{number:05d}.npz")
        for source in found
        for index, path in enumerate(source.files)
        for number, part in enumerate(source.parts(path, size))
    ]


def scan_inputs(part: Part, options: ScanOptions) -> dict:
    """What a scan depends on, as JSON values: the part is scanned again when this changes."""
    stat = part.path.stat()
    source = dataclasses.asdict(part.source) | {"files": ""}
    paths = options.evaluation_sets
    sets = {name: Path(path).stat().st_mtime_ns for name, path in paths.items() if Path(path).exists()}
    seen = dict(path=str(part.path), size=stat.st_size, mtime=stat.st_mtime_ns, part=list(part.part))
    return dict(version=VERSION, source=source, sets=sets, exact=options.exact, near=options.near) | seen | paths


def is_scanned(part: Part, options: ScanOptions) -> bool:
    """Whether the scan file is up to date; never for a part with bad rows that `options.stop` has to report."""
    try:
        facts = read_facts(part.out)
    except (OSError, ValueError, KeyError):
        return False
    bad = set(facts["bad"]) - {sources.containers.TORN}
    return facts["inputs"] == scan_inputs(part, options) and not (options.stop and bad)


def scan_part(part: Part, options: ScanOptions) -> None:
    """Scans one part and writes its file. Raises UserError at a bad row when `options.stop`."""
    versions = json.dumps(scan_inputs(part, options)["sets"])
    sets = _read_evaluation_sets(tuple(sorted(options.evaluation_sets.items())), versions)
    columns: dict[str, list] = {
        name: [] for name in ("keys", "sizes", "labels", "content", "exact", "bands", "evaluation")
    }
    labels: dict[tuple[str, ...], int] = {}
    bad, listed, skipped = Counter(), [], 0
    for key, row, size in part.source.scan(part.path, part.part):
        if row is None:
            skipped += 1
            continue
        if isinstance(row, ValueError):
            reason = str(row)
            where = record_location(part, key) if options.stop or len(listed) < MAX_LISTED else ""
            if options.stop and reason != sources.containers.TORN:
                raise UserError(f"{where}: {reason}; fix or delete that line, or set config.data.on_bad_row=skip")
            bad[_error_kind(reason)] += 1
            if len(listed) < MAX_LISTED:
                listed.append(f"{where}: {reason}"[:300])
            continue
        columns["keys"].append(key)
        columns["sizes"].append(min(size, np.iinfo(np.int32).max))
        columns["labels"].append(labels.setdefault(tuple(row["components"]), len(labels)))
        same = {name: value for name, value in row.items() if name != "provenance"}
        columns["content"].append(_hash(json.dumps(same, sort_keys=True, ensure_ascii=False)))
        compared = options.exact or options.near or options.evaluation_sets
        units = similarity.text_units(sources.row_text(row)) if compared else []
        columns["exact"].append(similarity.exact_hash(units) if options.exact else 0)
        if options.near:
            columns["bands"].append(similarity.minhash_bands(units))
        hit = sets.find(units)
        columns["evaluation"].append(0 if hit is None else (hit[0] + 1) * (-1 if hit[1] else 1))
    facts = dict(
        inputs=scan_inputs(part, options),
        bad=dict(bad),
        listed=listed,
        skipped=skipped,
        components=[list(label) for label in labels],
        sets=list(sets.names),
    )
    with files.atomic_path(part.out) as temporary, open(temporary, "wb") as out:
        np.savez(
            out,
            facts=np.frombuffer(json.dumps(facts).encode(), np.uint8),
            keys=np.asarray(columns["keys"], np.int64),
            sizes=np.asarray(columns["sizes"], np.int32),
            labels=np.asarray(columns["labels"], np.uint16),
            content=np.asarray(columns["content"], np.uint64),
            exact=np.asarray(columns["exact"], np.uint64),
            bands=np.asarray(columns["bands"], np.uint64).reshape(
                len(columns["keys"]), similarity.BANDS if options.near else 0
            ),
            evaluation=np.asarray(columns["evaluation"], np.int16),
        )


def record_location(part: Part, key: int) -> str:
    """Where a record is, for messages: file and line, or file and record number."""
    lines = sources.FORMATS[part.source.format].container is sources.containers.Lines
    if lines and part.path.suffix not in (".gz", ".bz2"):
        with open(part.path, "rb") as file:
            line = 1
            while key > 0 and (block := file.read(min(key, 1 << 20))):
                line += block.count(b"\n")
                key -= len(block)
        return f"{part.path} line {line}"
    return f"{part.path} record {key}"


def read_facts(path: Path) -> dict:
    with np.load(path) as stored:
        return json.loads(stored["facts"].tobytes())


def read_scan(path: Path) -> Scan:
    with np.load(path) as stored:
        facts = json.loads(stored["facts"].tobytes())
        arrays = {name: stored[name] for name in stored.files if name != "facts"}
    return Scan(**arrays, components=facts["components"], facts=facts)


@functools.lru_cache(maxsize=1)
def _read_evaluation_sets(paths: tuple[tuple[str, str], ...], versions: str) -> similarity.EvaluationSets:
    """A worker reads them once for all its parts; `versions` is part of the cache key, so that changes are read."""
    del versions
    return similarity.read_evaluation_sets(dict(paths))


def _hash(text: str) -> int:
    return int.from_bytes(hashlib.blake2b(text.encode(errors="surrogatepass"), digest_size=8).digest(), "little")


def _error_kind(reason: str) -> str:
    """A reason without details of one row, so that rows with the same error are counted together."""
    head = reason.split(":")[0] if reason[:5] not in ("field", "turn ", "step ") else reason
    return "".join("#" if c.isdigit() else c for c in head)[:80]
