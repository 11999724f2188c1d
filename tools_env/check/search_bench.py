"""Search quality and speed of the embedded engine on real articles: a Markdown table for docs/benchmarks.md.

python -m tools_env.check.search_bench --articles=FOLDER_OR_TAR

Collection: paragraphs of the articles (.txt files named by their titles), `--paragraphs` of them, and the Chinese pages
of the offline web. Each query has one known paragraph to be found:

known item   a sentence of 8 to 30 words without the words of its article's title
paraphrase   40 % of these words dropped, the rest shuffled, and half of those longer than five letters given another
             ending (ing, ed, s, ly, ion exchanged or added); no synonyms
Chinese      a sentence of a Chinese page of the offline web without every fifth character. These pages are generated
             from sentence templates, so they are easier than real ones. No query crosses languages.

Authority, 0 to 2, is assigned by the hash of the title, so it is unrelated to relevance: the loss of `+authority` is
the cost of an uninformative boost.
"""

import argparse
import hashlib
import json
import multiprocessing
import random
import re
import tarfile
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import quote, unquote

import numpy as np
import psutil

from tools_env.offline_web import folder
from tools_env.offline_web.build import build_offline_web
from tools_env.search import store, text
from tools_env.search.index import PassageIndex, build_vectors

_SENTENCE = re.compile(r"[A-Z][^.!?]{40,250}[.!?]")
_ENDINGS = ("ing", "ed", "s", "ly", "ion")
MODES = (("BM25 of the engine alone", "bm25", None), ("bm25", "bm25", False), ("bm25 + authority", "bm25", True))
MODES += (("dense", "dense", False), ("hybrid", "hybrid", False), ("hybrid + authority", "hybrid", True))


def articles(path: Path) -> Iterator[tuple[str, str]]:
    """Yields (title, text) of the .txt files of a folder or an archive."""
    if path.is_dir():
        for file in sorted(path.rglob("*.txt")):
            yield unquote(file.stem).replace("_", " "), file.read_text(encoding="utf-8", errors="replace")
        return
    with tarfile.open(path, "r|*") as archive:
        for member in archive:
            if member.name.endswith(".txt"):
                body = archive.extractfile(member).read().decode("utf-8", "replace")
                yield unquote(Path(member.name).stem).replace("_", " "), body


def paragraphs(body: str) -> list[str]:
    """Returns the prose of an article: blocks of at least 80 characters that end like sentences."""
    blocks = (" ".join(block.split()) for block in re.split(r"\n\s*\n", body))
    return folder.split_paragraphs(
        b for b in blocks if len(b) >= 80 and b.endswith((".", '."')) and not b.startswith("#")
    )


def collection(path: Path, limit: int, offline_web: Path) -> Iterator[dict]:
    """Yields documents to index: articles in order of their titles' hashes, then Chinese pages of the offline web."""
    kept = 0
    for title, body in sorted(articles(path), key=lambda pair: _hash(pair[0])):
        found = paragraphs(body)[: max(0, limit - kept)]
        kept += len(found)
        if found:
            url = f"http://articles.example/{quote(title)}"
            level = int(_hash(title)[:8], 16) % 3
            yield {"id": url, "url": url, "title": title, "text": "\n".join(found), "lang": "en", "authority": level}
    for line in (offline_web / "documents.jsonl").read_text(encoding="utf-8").splitlines():
        row = json.loads(line)
        if row["lang"] == "zh":
            yield row


def queries(passages: store.Passages, count: int) -> dict[str, list[tuple[str, str]]]:
    """Returns (query, text to be found) by kind. Deterministic in the collection."""
    rng = random.Random(0)
    english, chinese = [], []
    order = list(range(len(passages)))
    rng.shuffle(order)
    for ordinal in order:
        passage = passages[ordinal]
        if passages.language(ordinal) == "zh" and len(chinese) < count and len(passage.text) >= 12:
            chinese.append(("".join(c for i, c in enumerate(passage.text) if i % 5 != 4), passage.text))
        elif passages.language(ordinal) == "en" and len(english) < count:
            title = set(text.tokens(passage.title))
            for sentence in _SENTENCE.findall(passage.text)[:1]:
                words = [w for w in re.findall(r"[^\W\d_]+|\d+", sentence) if not title & set(text.tokens(w))]
                if 8 <= len(words) <= 30:
                    english.append((words, passage.text))
    return {
        "known item": [(" ".join(words), wanted) for words, wanted in english],
        "paraphrase": [(" ".join(_rephrased(words, rng)), wanted) for words, wanted in english],
        "Chinese": chinese,
    }


def _rephrased(words: list[str], rng: random.Random) -> list[str]:
    kept = rng.sample(words, max(4, round(0.6 * len(words))))
    return [_bent(word, rng) if len(word) > 5 and rng.random() < 0.5 else word for word in kept]


def _bent(word: str, rng: random.Random) -> str:
    for ending in _ENDINGS:
        if word.endswith(ending):
            return word.removesuffix(ending) + rng.choice([other for other in _ENDINGS if other != ending])
    return word + rng.choice(_ENDINGS)


def _hash(title: str) -> str:
    return hashlib.sha256(title.encode()).hexdigest()


def measure(directory: str, mode: str, authority: bool | None, asked: dict[str, list[tuple[str, str]]]) -> dict:
    """Returns recall@5 and MRR@10 by kind of query, milliseconds of each query and MB of the process.

    `authority` None takes the full-text engine's order as it is.
    """
    began = time.perf_counter()
    index = PassageIndex(directory, mode, authority=bool(authority))
    opened = time.perf_counter() - began
    found, times = {}, []
    for kind, pairs in asked.items():
        ranks = []
        for query, wanted in pairs:
            began = time.perf_counter()
            if authority is None:
                ordinals = index.full_text(query, 10)
            else:
                ordinals = index.search(query, 10)
            times.append(1000 * (time.perf_counter() - began))
            texts = [index.passages[ordinal].text for ordinal in ordinals]
            ranks.append(texts.index(wanted) + 1 if wanted in texts else 0)
        if not pairs:
            continue
        found[kind] = (np.mean([0 < r <= 5 for r in ranks]), np.mean([1 / r if r else 0.0 for r in ranks]))
    memory = psutil.Process().memory_info()
    return {"found": found, "times": times, "opened": opened, "rss": (memory.rss - memory.shared) / 1e6}


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--articles", required=True, type=Path, help="folder or .tar(.xz) of .txt files")
    parser.add_argument("--paragraphs", type=int, default=100_000)
    parser.add_argument("--queries", type=int, default=500, help="of each kind")
    flags = parser.parse_args(argv)
    with tempfile.TemporaryDirectory(prefix="stepdr_search_") as temporary:
        offline_web, directory = Path(temporary) / "world", Path(temporary) / "collection"
        build_offline_web(offline_web, seed=0)
        began = time.perf_counter()
        rows = list(collection(flags.articles, flags.paragraphs, offline_web))
        read = time.perf_counter() - began
        began = time.perf_counter()
        writer = store.Writer(directory / "index")
        for row in rows:
            writer.add(row)
        writer.commit()
        writer.close()
        indexed = time.perf_counter() - began
        began = time.perf_counter()
        build_vectors(directory / "index", None)
        vectors = time.perf_counter() - began
        asked = queries(store.Passages(directory / "index"), flags.queries)
        size = sum(file.stat().st_size for file in directory.rglob("*") if file.is_file()) / 1e6
        print(
            f"{len(rows)} documents, {writer.passages} passages; reading {read:.0f} s, full text {indexed:.0f} s, "
            f"vectors {vectors:.0f} s; {size:.0f} MB on disk; queries: "
            + ", ".join(f"{len(pairs)} {kind}" for kind, pairs in asked.items())
            + "\n"
        )
        columns = [f"{kind} {what}" for kind in asked for what in ("R@5", "MRR@10")]
        print("| ranking | " + " | ".join(columns) + " | p50 ms | p99 ms | opens in s | own memory MB |")
        print("|---|" + "---|" * (len(columns) + 4))
        spawn = multiprocessing.get_context("spawn")
        for name, mode, authority in MODES:
            with spawn.Pool(1) as pool:
                seen = pool.apply(measure, (str(directory), mode, authority, asked))
            p50, p99 = np.percentile(seen["times"], [50, 99])
            cells = [f"{value:.3f}" for kind in asked for value in seen["found"][kind]]
            cells += [f"{p50:.1f}", f"{p99:.1f}", f"{seen['opened']:.2f}", f"{seen['rss']:.0f}"]
            print(f"| {name} | " + " | ".join(cells) + " |", flush=True)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
