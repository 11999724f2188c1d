"""Second pass: which rows a mixture component keeps, and how they are cut into shards.

Works on surveys alone. A plan, data/plan/<component>-<k>-of-<n>.npz, lists the rows of one shard: parts of source files and keys
in them. Duplicates are looked for within a component (another component may say the same on purpose); the first one stays.
Memory: about 40 bytes a row of one component, 170 with near duplicates.
"""

import dataclasses
import hashlib
import json
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from stepdr_jax import files
from stepdr_jax.data import sources, survey

POLICIES = {"exact_duplicates": ("off", "count", "drop"), "near_duplicates": ("off", "count", "drop")}


@dataclasses.dataclass(frozen=True)
class Policy:
    """What happens to duplicates (off, count, drop) and to rows with an evaluation question (count, drop)."""

    exact_duplicates: str
    near_duplicates: str
    contaminated: str
    shard_bytes: int


@dataclasses.dataclass(frozen=True)
class Selected:
    """plans: of each shard its file and a digest of its rows' content; facts: counts for the card, as JSON values."""

    plans: list[tuple[Path, str]]
    facts: dict


def select(parts: Sequence[survey.Part], component: str, policy: Policy, folder: Path) -> Selected:
    """Chooses the rows of a component over all parts and writes its plans. No plans when there are no rows."""
    of_part, columns = [], []
    bad, named, left_out, origins = Counter(), [], 0, Counter()
    sets: list[str] = []
    for index, part in enumerate(parts):
        seen = survey.read(part.out)
        sets = seen.facts["sets"]
        labels = [number for number, names in enumerate(seen.components) if component in names]
        rows = np.flatnonzero(np.isin(seen.labels, labels))
        if part.source.component == component or len(rows):
            bad.update(seen.facts["bad"])
            named += seen.facts["named"]
            left_out += seen.facts["left_out"]
        if len(rows):
            origins[part.source.name] += len(rows)
            columns.append(
                {
                    name: getattr(seen, name)[rows]
                    for name in ("keys", "sizes", "content", "exact", "bands", "evaluation")
                }
            )
            of_part.append(np.full(len(rows), index, np.int32))
    facts = dict(bad_rows=dict(bad), bad_named=named[: survey.NAMED], left_out=left_out, rows_by_source=dict(origins))
    if not columns:
        return Selected([], facts | dict(duplicates=dict(exact=0, near=0), contaminated={}, dropped={}))
    part_N = np.concatenate(of_part)
    columns = {name: np.concatenate([column[name] for column in columns]) for name in columns[0]}
    kept_N = np.ones(len(part_N), bool)
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
        what = getattr(policy, f"{kind}_duplicates")
        repeats_N = np.zeros(len(kept_N), bool)
        if what != "off":
            repeats_N[kept_N] = _repeats(keys[kept_N])
        duplicates[kind] = int(repeats_N.sum())
        if what == "drop":
            dropped[f"{kind}_duplicate"] = duplicates[kind]
            kept_N &= ~repeats_N
    facts |= dict(duplicates=duplicates, contaminated=contaminated, dropped=dict(dropped))
    order = np.flatnonzero(kept_N)
    ends = np.cumsum(columns["sizes"][order].astype(np.int64))
    count = max(1, round(int(ends[-1]) / policy.shard_bytes)) if len(order) else 0
    cuts = [int(np.searchsorted(ends, ends[-1] * k // count)) for k in range(1, count)]
    shards = [shard for shard in np.split(order, cuts) if len(shard)] if count else []
    plans = []
    for index, shard in enumerate(shards):
        path = folder / f"{component}-{index:05d}-of-{len(shards):05d}.npz"
        digest = hashlib.blake2b(columns["content"][shard].tobytes(), digest_size=8).hexdigest()
        _write(path, parts, part_N[shard], columns["keys"][shard])
        plans.append((path, digest))
    return Selected(plans, facts)


def _repeats(keys_NB: np.ndarray) -> np.ndarray:
    """Returns bool[N]: rows that share a value of some column with an earlier row."""
    repeated_N = np.zeros(len(keys_NB), bool)
    for column in keys_NB.T:
        first = np.unique(column, return_index=True)[1]
        is_first_N = np.zeros(len(column), bool)
        is_first_N[first] = True
        repeated_N |= ~is_first_N
    return repeated_N


def _write(path: Path, parts: Sequence[survey.Part], part_N: np.ndarray, keys_N: np.ndarray) -> None:
    used, local_N = np.unique(part_N, return_inverse=True)
    table = []
    for index in used:
        source = dataclasses.asdict(parts[index].source) | {"files": []}
        table.append(dict(source=source, path=str(parts[index].path), part=parts[index].part))
    with files.atomic_path(path) as temporary, open(temporary, "wb") as out:
        np.savez(out, table=np.frombuffer(json.dumps(table).encode(), np.uint8), part=local_N, keys=keys_N)


def rows_of(plan: Path) -> Iterator[dict]:
    """Yields the rows of a plan, read from their source files; each names its source."""
    with np.load(plan) as stored:
        table, part_N, keys_N = json.loads(stored["table"].tobytes()), stored["part"], stored["keys"]
    for index, entry in enumerate(table):
        source = sources.Source(**(entry["source"] | {"files": ()}))
        keys = keys_N[part_N == index].tolist()
        for row in source.pick(Path(entry["path"]), tuple(entry["part"]), keys):
            yield row | {"source": source.name}
