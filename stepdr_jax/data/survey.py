"""First pass over the sources: what rows there are, which are bad, and what they have in common with others.

One part of a source file gives one file, data/survey/<source>-<file>-<part>.npz, which is all that later passes need to know of
the part: keys of good rows, their components, hashes of their content, of duplicates and of evaluation questions. It is
written whole and kept as long as the part and what it is looked at for are the same.
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

VERSION = 2  # raise when a survey changes its meaning
NAMED = 20  # bad rows that are named; the others are counted


@dataclasses.dataclass(frozen=True)
class Part:
    """A piece of a source file, and where its survey lies."""

    source: sources.Source
    path: Path
    part: tuple[int, int]
    out: Path


@dataclasses.dataclass(frozen=True)
class Look:
    """What to look for. `evaluation`: name -> path of evaluation sets."""

    exact: bool
    near: bool
    evaluation: dict[str, str]
    stop: bool  # at a bad row


@dataclasses.dataclass
class Survey:
    """keys int64[N]; sizes int32[N] bytes; labels uint16[N] into `components`; content, exact uint64[N]; bands uint64[N, BANDS or 0];
    evaluation int16[N], number of the set from 1, negative where its answer stands there too, 0 for none; `facts` counts."""

    keys: np.ndarray
    sizes: np.ndarray
    labels: np.ndarray
    content: np.ndarray
    exact: np.ndarray
    bands: np.ndarray
    evaluation: np.ndarray
    components: list[list[str]]
    facts: dict


def parts_of(found: list[sources.Source], folder: Path, size: int) -> list[Part]:
    """Returns all parts of all sources, in order; `size` in bytes."""
    return [
        Part(source, path, part, folder / f"{source.name}-{index:05d}-{number:05d}.npz")
        for source in found
        for index, path in enumerate(source.files)
        for number, part in enumerate(source.parts(path, size))
    ]


def inputs_of(part: Part, look: Look) -> dict:
    """What a survey depends on, as JSON values: it is made again when this changes."""
    stat = part.path.stat()
    source = dataclasses.asdict(part.source) | {"files": ""}
    sets = {name: Path(path).stat().st_mtime_ns for name, path in look.evaluation.items() if Path(path).exists()}
    seen = dict(path=str(part.path), size=stat.st_size, mtime=stat.st_mtime_ns, part=list(part.part))
    return dict(version=VERSION, source=source, sets=sets, exact=look.exact, near=look.near) | seen | look.evaluation


def finished(part: Part, look: Look) -> bool:
    """Whether the survey on disk is of this very part, looked at for the same; a bad row that is to stop is never finished."""
    try:
        facts = read_facts(part.out)
    except (OSError, ValueError, KeyError):
        return False
    return facts["inputs"] == inputs_of(part, look) and not (
        look.stop and set(facts["bad"]) - {sources.containers.TORN}
    )


def make(part: Part, look: Look) -> None:
    """Looks at one part and writes its survey. Raises UserError at a bad row when `look.stop`."""
    sets = _sets(tuple(sorted(look.evaluation.items())), json.dumps(inputs_of(part, look)["sets"]))
    columns: dict[str, list] = {
        name: [] for name in ("keys", "sizes", "labels", "content", "exact", "bands", "evaluation")
    }
    labels: dict[tuple[str, ...], int] = {}
    bad, named, left_out = Counter(), [], 0
    for key, row, size in part.source.scan(part.path, part.part):
        if row is None:
            left_out += 1
            continue
        if isinstance(row, ValueError):
            reason = str(row)
            if look.stop and reason != sources.containers.TORN:
                raise UserError(
                    f"{place(part, key)}: {reason}; fix or delete that line, or set config.data.on_bad_row=skip"
                )
            bad[_kind(reason)] += 1
            if len(named) < NAMED:
                named.append(f"{place(part, key)}: {reason}"[:300])
            continue
        columns["keys"].append(key)
        columns["sizes"].append(min(size, np.iinfo(np.int32).max))
        columns["labels"].append(labels.setdefault(tuple(row["components"]), len(labels)))
        same = {name: value for name, value in row.items() if name != "provenance"}
        columns["content"].append(_hash(json.dumps(same, sort_keys=True, ensure_ascii=False)))
        words = similarity.units(sources.words_of(row)) if look.exact or look.near or look.evaluation else []
        columns["exact"].append(similarity.exact_hash(words) if look.exact else 0)
        if look.near:
            columns["bands"].append(similarity.bands_of(words))
        hit = sets.find(words)
        columns["evaluation"].append(0 if hit is None else (hit[0] + 1) * (-1 if hit[1] else 1))
    facts = dict(
        inputs=inputs_of(part, look),
        bad=dict(bad),
        named=named,
        left_out=left_out,
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
                len(columns["keys"]), similarity.BANDS if look.near else 0
            ),
            evaluation=np.asarray(columns["evaluation"], np.int16),
        )


def place(part: Part, key: int) -> str:
    """Where a record stands, for a person: file and line, else file and number."""
    if sources.FORMATS[part.source.format].container is sources.containers.Lines and part.path.suffix not in (
        ".gz",
        ".bz2",
    ):
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


def read(path: Path) -> Survey:
    with np.load(path) as stored:
        facts = json.loads(stored["facts"].tobytes())
        arrays = {name: stored[name] for name in stored.files if name != "facts"}
    return Survey(**arrays, components=facts["components"], facts=facts)


@functools.lru_cache(maxsize=1)
def _sets(paths: tuple[tuple[str, str], ...], versions: str) -> similarity.EvaluationSets:
    """A worker reads them once for all its parts; `versions` makes changed files other ones."""
    del versions
    return similarity.evaluation_sets(dict(paths))


def _hash(text: str) -> int:
    return int.from_bytes(hashlib.blake2b(text.encode(errors="surrogatepass"), digest_size=8).digest(), "little")


def _kind(reason: str) -> str:
    """A reason without what belongs to one row, so that rows of the same fault are counted together."""
    head = reason.split(":")[0] if reason[:5] not in ("field", "turn ", "step ") else reason
    return "".join("#" if c.isdigit() else c for c in head)[:80]
