"""Detects exact duplicates, near duplicates, and texts that hold a question of an evaluation set.

Texts are compared by their units: words, and single characters of Chinese, Japanese and Korean, after NFKC and case
folding; punctuation is ignored.
- exact: hash of all units.
- near: MinHash of 5-grams of units, 128 permutations in 16 bands of 8 rows, which finds half of the pairs at Jaccard
  similarity 0.67 and 95 % at 0.8 (1 - (1 - J^8)^16; as in Gopher-like pipelines, e.g. FineWeb's 14 x 8).
- evaluation: 13-grams of units (GPT-3, arXiv 2005.14165, appendix C). Questions of 8 to 12 units must match as a whole,
  shorter ones count only together with their answer.
"""

import dataclasses
import hashlib
import re
import unicodedata
import zlib
from pathlib import Path

import numpy as np

from stepdr_jax import files
from stepdr_jax.errors import UserError
from stepdr_jax.text.scripts import UNSPACED

SHINGLE, PERMUTATIONS, BANDS = 5, 128, 16
NGRAM = 13  # units that must match
MIN_ALONE, MIN_WITH_ANSWER = 8, 4  # units of the shortest question that counts without, and with, its answer
_UNIT = re.compile(rf"[{UNSPACED}]|[^\W_{UNSPACED}]+")
_BASE = np.uint64(0x9E3779B97F4A7C15)


def text_units(text: str) -> list[str]:
    return _UNIT.findall(unicodedata.normalize("NFKC", text).casefold())


def exact_hash(units: list[str]) -> int:
    """Returns 64 bits, equal for texts of the same units."""
    return int.from_bytes(hashlib.blake2b(" ".join(units).encode(), digest_size=8).digest(), "little")


def minhash_bands(units: list[str]) -> np.ndarray:
    """Returns uint64[BANDS]: near duplicates agree in at least one band."""
    import rensa

    shingles = [" ".join(units[start : start + SHINGLE]) for start in range(max(len(units) - SHINGLE + 1, 1))]
    sketch = rensa.RMinHash(num_perm=PERMUTATIONS, seed=0)
    sketch.update(shingles)
    rows = np.asarray(sketch.digest(), np.uint32).reshape(BANDS, -1)
    hashes = [int.from_bytes(hashlib.blake2b(row.tobytes(), digest_size=8).digest(), "little") for row in rows]
    return np.asarray(hashes, np.uint64)


def _unit_hashes(units: list[str]) -> np.ndarray:
    return np.fromiter((zlib.crc32(unit.encode()) | len(unit) << 32 for unit in units), np.uint64, len(units))


def _ngram_hashes(numbers: np.ndarray, length: int) -> np.ndarray:
    """Returns uint64[N - length + 1]: a hash of each run of `length` numbers (arithmetic modulo 2^64)."""
    count = len(numbers) - length + 1
    total = np.zeros(max(count, 0), np.uint64)
    for offset in range(length if count > 0 else 0):
        total = total * _BASE + (numbers[offset : offset + count] + np.uint64(1)) * _BASE
    return total


@dataclasses.dataclass(frozen=True)
class EvaluationSets:
    """Questions that no training row may hold. `hashes`: n -> sorted n-gram hashes, `where`: their (set, question)."""

    names: tuple[str, ...]
    hashes: dict[int, np.ndarray]
    where: dict[int, list[tuple[int, int]]]
    answers: tuple[tuple[tuple[str, ...], ...], ...]  # by set and question: accepted answers as joined units
    questions: tuple[int, ...]  # number by set

    def find(self, units: list[str]) -> tuple[int, bool] | None:
        """Returns (set, whether the units also hold its answer) of the first question found, else None."""
        if not self.hashes or not units:
            return None
        numbers, joined = _unit_hashes(units), None
        for length, known in self.hashes.items():
            found = _ngram_hashes(numbers, length)
            at = np.searchsorted(known, found)
            for place in np.unique(at[(at < len(known)) & (known[np.minimum(at, len(known) - 1)] == found)]):
                joined = joined or f" {' '.join(units)} "
                set_, question = self.where[length][place]
                answered = any(f" {answer} " in joined for answer in self.answers[set_][question])
                if length >= MIN_ALONE or answered:
                    return set_, answered
        return None


def read_evaluation_sets(paths: dict[str, str]) -> EvaluationSets:
    """Reads evaluation sets: name -> a JSON, JSONL, CSV or TSV file with questions (and answers) in its usual fields.

    Raises UserError for a file that is absent or has no questions.
    """
    hashes: dict[int, dict[int, tuple[int, int]]] = {}
    answers, counts = [], []
    for index, (name, path) in enumerate(sorted(paths.items())):
        pairs = _questions(name, Path(path))
        answers.append(tuple(tuple(filter(None, (" ".join(text_units(a)) for a in accepted))) for _, accepted in pairs))
        counts.append(len(pairs))
        for number, (question, _) in enumerate(pairs):
            units = text_units(question)
            if len(units) >= MIN_WITH_ANSWER:
                length = min(NGRAM, len(units))
                for value in _ngram_hashes(_unit_hashes(units), length):
                    hashes.setdefault(length, {}).setdefault(int(value), (index, number))
    ordered = {length: sorted(found) for length, found in sorted(hashes.items())}
    return EvaluationSets(
        names=tuple(sorted(paths)),
        hashes={length: np.asarray(values, np.uint64) for length, values in ordered.items()},
        where={length: [hashes[length][value] for value in values] for length, values in ordered.items()},
        answers=tuple(answers),
        questions=tuple(counts),
    )


_QUESTION_FIELDS = ("question", "Question", "problem", "prompt", "Prompt", "query")
_ANSWER_FIELDS = ("answer", "Answer", "answers", "completion", "aliases")


def _questions(name: str, path: Path) -> list[tuple[str, list[str]]]:
    where = f"config.data.evaluation_sets.{name}"
    if not path.is_file():
        raise UserError(f"{where}: {path} does not exist; correct the path or remove the set")
    if path.suffix in (".csv", ".tsv"):
        import csv

        with open(path, newline="") as file:
            rows = list(csv.DictReader(file, delimiter="\t" if path.suffix == ".tsv" else ","))
    elif path.suffix == ".json":
        rows = files.read_json(path)
        rows = rows.get("Data", rows.get("data", [rows])) if isinstance(rows, dict) else rows
    else:
        rows = files.read_jsonl(path)
    found = []
    for row in rows:
        question = next((row[field] for field in _QUESTION_FIELDS if isinstance(row.get(field), str)), "")
        answer = next((row[field] for field in _ANSWER_FIELDS if row.get(field)), [])
        if isinstance(answer, dict):  # TriviaQA and our own tasks: a value and its aliases
            answer = [answer.get("Value", answer.get("value")), *answer.get("Aliases", answer.get("aliases", []))]
        if question.strip():
            found.append((question, [str(a) for a in (answer if isinstance(answer, list) else [answer]) if a]))
    if not found:
        raise UserError(f"{where}: {path} has no row with a field {', '.join(_QUESTION_FIELDS[:4])} or query")
    return found
