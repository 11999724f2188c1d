"""Second pass: chooses the rows that a mixture component keeps and divides them into shards.

It reads scan files only. A plan, data/plan/<component>-<k>-of-<n>.npz, lists the rows of one shard: parts of source
files and keys in them. Duplicates are removed within a component (another component may repeat a text on purpose);
the first one stays. Memory: about 40 bytes for each row of a component, 170 with near duplicates.
"""

import dataclasses
import hashlib
import json
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from stepdr_jax import files
from stepdr_jax.data import scan, sources

COLUMNS = ("keys", "sizes", "content", "exact", "bands", "evaluation")  # of a scan


@dataclasses.dataclass(frozen=True)
class SelectionPolicy:
    """What happens to duplicates (off, count, drop) and to rows with an evaluation question (count, drop)."""

    exact_duplicates: str
    near_duplicates: str
    contaminated: str
    shard_bytes: int


@dataclasses.dataclass(frozen=True)
class Selection:
    """plans: plan file of each shard and a digest of its rows' content; facts: counts for the card as JSON values."""

    plans: list[tuple[Path, str]]
    facts: dict


def select_rows(parts: Sequence[scan.Part], component: str, policy: SelectionPolicy, folder: Path) -> Selection:
    """Chooses the rows of a component over all parts and writes its shard plans, none when there are no rows."""
    part_N, columns, sets, facts = _rows_of_component(parts, component)
    if not len(part_N):
        return Selection([], facts | dict(duplicates=dict(exact=0, near=0), contaminated={}, dropped={}))
    kept_N, counts = _filter_rows(columns, sets, policy)
    order = np.flatnonzero(kept_N)
    ends = np.cumsum(columns["sizes"][order].astype(np.int64))
    count = max(1, round(int(ends[-1]) / policy.shard_bytes)) if len(order) else 0
    cuts = [int(np.searchsorted(ends, ends[-1] * k // count)) for k in range(1, count)]
    shards = [shard for shard in np.split(order, cuts) if len(shard)] if count else []
    plans = []
    for index, shard in enumerate(shards):
        path = folder / f"{component}-{index:05d}-of-{len(shards):05d}.npz"
        digest = hashlib.blake2b(columns["content"][shard].tobytes(), digest_size=8).hexdigest()
        _write_plan(path, parts, part_N[shard], columns["keys"][shard])
        plans.append((path, digest))
    return Selection(plans, facts | counts)


def _rows_of_component(
    parts: Sequence[scan.Part], component: str
) -> tuple[np.ndarray, dict[str, np.ndarray], list[str], dict]:
    """Returns the part number of each good row, the rows' scan columns, the evaluation sets and counts for the card."""
    part_numbers, columns = [np.zeros(0, np.int32)], []
    bad, listed, skipped, rows_by_source = Counter(), [], 0, Counter()
    sets: list[str] = []
    for index, part in enumerate(parts):
        scanned = scan.read_scan(part.out)
        sets = scanned.facts["sets"]
        labels = [number for number, names in enumerate(scanned.components) if component in names]
        rows = np.flatnonzero(np.isin(scanned.labels, labels))
        if part.source.component == component or len(rows):
            bad.update(scanned.facts["bad"])
            listed += scanned.facts["listed"]
            skipped += scanned.facts["skipped"]
        if len(rows):
            rows_by_source[part.source.name] += len(rows)
            columns.append({name: getattr(scanned, name)[rows] for name in COLUMNS})
            part_numbers.append(np.full(len(rows), index, np.int32))
    facts = dict(
        bad_rows=dict(bad),
        bad_listed=listed[: scan.MAX_LISTED],
        skipped=skipped,
        rows_by_source=dict(rows_by_source),
    )
    joined = {name: np.concatenate([column[name] for column in columns]) for name in COLUMNS} if columns else {}
    return np.concatenate(part_numbers), joined, sets, facts


def _filter_rows(
    columns: dict[str, np.ndarray], sets: Sequence[str], policy: SelectionPolicy
) -> tuple[np.ndarray, dict]:
    """Returns which rows are kept, bool[N], and counts: duplicates, contaminated, dropped by reason."""
    kept_N = np.ones(len(columns["keys"]), bool)
    contaminated, dropped = {}, Counter()
    for number, name in enumerate(sets, 1):
        hit_N = np.abs(columns["evaluation"]) == number
        answered = int((columns["evaluation"] == -number).sum())
        contaminated[name] = dict(rows=int(hit_N.sum()), with_answer=answered)
        if policy.contaminated == "drop":
            dropped["contaminated"] += int((kept_N & hit_N).sum())
            kept_N &= ~hit_N
    duplicates = {}
    for kind, keys in (("exact", columns["exact"][:, None]), ("near", columns["bands"])):
        action = getattr(policy, f"{kind}_duplicates")
        repeats_N = np.zeros(len(kept_N), bool)
        if action != "off":
            repeats_N[kept_N] = _repeats(keys[kept_N])
        duplicates[kind] = int(repeats_N.sum())
        if action == "drop":
            dropped[f"{kind}_duplicate"] = duplicates[kind]
            kept_N &= ~repeats_N
    return kept_N, dict(duplicates=duplicates, contaminated=contaminated, dropped=dict(dropped))


def _repeats(keys_NB: np.ndarray) -> np.ndarray:
    """Returns bool[N]: rows that share a value of some column of keys_NB with an earlier row."""
    repeated_N = np.zeros(len(keys_NB), bool)
    for column in keys_NB.T:
        first = np.unique(column, return_index=True)[1]
        is_first_N = np.zeros(len(column), bool)
        is_first_N[first] = True
        repeated_N |= ~is_first_N
    return repeated_N


def _write_plan(path: Path, parts: Sequence[scan.Part], part_N: np.ndarray, keys_N: np.ndarray) -> None:
    used, local_N = np.unique(part_N, return_inverse=True)
    table = []
    for index in used:
        source = dataclasses.asdict(parts[index].source) | {"files": []}
        table.append(dict(source=source, path=str(parts[index].path), part=parts[index].part))
    with files.atomic_path(path) as temporary, open(temporary, "wb") as out:
        np.savez(out, table=np.frombuffer(json.dumps(table).encode(), np.uint8), part=local_N, keys=keys_N)


def read_plan_rows(plan: Path) -> Iterator[dict]:
    """Yields the rows of a plan from their source files, with the name of their source."""
    with np.load(plan) as stored:
        table, part_N, keys_N = json.loads(stored["table"].tobytes()), stored["part"], stored["keys"]
    for index, entry in enumerate(table):
        source = sources.DataSource(**(entry["source"] | {"files": ()}))
        keys = keys_N[part_N == index].tolist()
        for row in source.pick(Path(entry["path"]), tuple(entry["part"]), keys):
            yield row | {"source": source.name}
