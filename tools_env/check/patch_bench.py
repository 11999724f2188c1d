"""Benchmark of the patch operation: tokens compared with rewriting, success with search-and-replace and unified diff.

python -m tools_env.check.patch_bench [--texts=FOLDER] [--edits=500] [--seed=0]

Edits of one to three lines or one sentence are made in long texts (*.txt files of a folder, or pages of the offline
web). The anchor copies the old text exactly, or with one to three injected errors: a letter, a space, a capital. An
edit succeeds when the result is exactly as intended; a different result without an error is a wrong edit.
"""

import argparse
import json
import random
import re
import sys
import tempfile
from collections import Counter
from pathlib import Path

from tools_env.errors import ToolError
from tools_env.search.text import estimated_tokens
from tools_env.tools import patch

MIN_CHARS = 4_000  # a long text
_METHODS = ("patch", "search and replace", "unified diff")


def run_patch_bench(texts: list[str], edits: int, seed: int) -> dict:
    """Returns token counts of patching and rewriting, and for each method its right, refused and wrong edits."""
    rng = random.Random(seed)
    outcomes = {slips: {method: Counter() for method in _METHODS} for slips in ("exact", "slips")}
    tokens = Counter()
    for number in range(edits):
        text = texts[rng.randrange(len(texts))]
        start, end, new = _edit(rng, text)
        old = text[start:end]
        meant = text[:start] + new + text[end:]
        call = {"op": "patch", "path": "report.md", "anchor": old, "replacement": new}
        tokens["patch"] += estimated_tokens(json.dumps(call, ensure_ascii=False))
        call = {"op": "write", "path": "report.md", "content": meant}
        tokens["rewrite"] += estimated_tokens(json.dumps(call, ensure_ascii=False))
        kind = ("exact", "slips")[number % 2]
        anchor = old if kind == "exact" else _with_slips(rng, old)
        for method, apply in (("patch", _patched), ("search and replace", _replaced)):
            outcomes[kind][method][_outcome(apply(text, anchor, new), meant)] += 1
        hunk = _hunk(rng, text, start, end, new, slips=kind == "slips")
        outcomes[kind]["unified diff"][_outcome(_apply_hunk(text, *hunk), meant)] += 1
    return {"tokens": tokens, "outcomes": outcomes}


def _outcome(result: str | None, meant: str) -> str:
    return "refused" if result is None else "right" if result == meant else "wrong"


def _patched(text: str, anchor: str, new: str) -> str | None:
    try:
        return patch.apply_patch(text, anchor, new).text
    except ToolError:
        return None


def _replaced(text: str, anchor: str, new: str) -> str | None:
    return text.replace(anchor, new) if text.count(anchor) == 1 else None


def _edit(rng: random.Random, text: str) -> tuple[int, int, str]:
    """Returns (start, end, new text) of a place that occurs once in `text`."""
    lines = [match.span() for match in re.finditer(r"(?m)^.*$", text)]
    while True:
        if rng.random() < 0.5:
            at, height = rng.randrange(len(lines)), rng.randint(1, 3)
            start, end = lines[at][0], lines[min(at + height, len(lines)) - 1][1]
        else:
            at = rng.randrange(len(text))
            found = re.compile(r"(?<=[.!?] )[A-Z][^.!?\n]{30,300}[.!?](?=\s)").search(text, at)
            if found is None:
                continue
            start, end = found.span()
        old = text[start:end]
        if len(old.strip()) >= 30 and old[0].strip() and old[-1].strip() and text.count(old) == 1:
            break
    words = old.split(" ")
    for _ in range(rng.randint(1, 3)):
        at = rng.randrange(len(words))
        words[at] = rng.choice((words[at] + " revised", "corrected", words[at].upper() + "!", "in 2025,"))
    return start, end, " ".join(words)


def _with_slips(rng: random.Random, text: str) -> str:
    """Returns `text` with injected errors; never a substring of `text`."""
    slipped = text
    while slipped in text:
        slipped = text
        for _ in range(rng.randint(1, 3)):
            at = rng.randrange(len(slipped))
            kind = rng.randrange(4)
            if kind == 0:
                slipped = slipped[:at] + slipped[at + 1 :]
            elif kind == 1:
                slipped = slipped[:at] + rng.choice("aeinrst") + slipped[at:]
            elif kind == 2:
                slipped = slipped[:at] + slipped[at:].replace(" ", "  ", 1)
            else:
                slipped = slipped[:at] + slipped[at : at + 1].swapcase() + slipped[at + 1 :]
    return slipped


def _hunk(rng: random.Random, text: str, start: int, end: int, new: str, slips: bool):
    """Returns (line, before, old, new, after) of a hunk with three context lines and a slightly wrong line number."""
    first, last = text.rfind("\n", 0, start) + 1, text.find("\n", end)
    last = len(text) if last < 0 else last
    above, below = text[:first].split("\n")[:-1], text[last + 1 :].split("\n") if last < len(text) else []
    before, old, after = above[-3:], text[first:last].split("\n"), below[:3]
    if slips:  # the same number of errors, anywhere in the old text that the hunk repeats
        copied = _with_slips(rng, "\n".join([*before, *old, *after])).split("\n")
        if len(copied) == len(before) + len(old) + len(after):
            before, old, after = (
                copied[: len(before)],
                copied[len(before) : len(copied) - len(after)],
                copied[len(copied) - len(after) :],
            )
    changed = (text[first:start] + new + text[end:last]).split("\n")
    return len(above) + rng.randint(-5, 5), before, old, changed, after


def _apply_hunk(
    text: str, line: int, before: list[str], old: list[str], new: list[str], after: list[str]
) -> str | None:
    """Applies a hunk as GNU patch does: at the nearest place where it fits, ignoring up to two outer context lines."""
    lines = text.split("\n")
    for fuzz in range(3):
        head, tail = before[min(fuzz, len(before)) :], after[: max(len(after) - fuzz, 0)]
        wanted = [*head, *old, *tail]
        places = [i for i in range(len(lines) - len(wanted) + 1) if lines[i : i + len(wanted)] == wanted]
        if places:
            at = min(places, key=lambda i: abs(i + len(head) - line)) + len(head)
            return "\n".join([*lines[:at], *new, *lines[at + len(old) :]])
    return None


def read_texts(folder: str | None, limit: int = 400) -> list[str]:
    """Returns long texts of a folder, or concatenated pages of the offline web."""
    if folder is not None:
        files = sorted(Path(folder).rglob("*.txt"))
        texts = (path.read_text(encoding="utf-8", errors="replace") for path in files)
        found = []
        for text in texts:
            if MIN_CHARS <= len(text) <= 200_000 and len(found) < limit:
                # Half unchanged, with wrapped lines; half with one line per paragraph, as in reports.
                found.append(text if len(found) % 2 else re.sub(r"(?<=\S)\n[ ]*(?=\S)", " ", text))
        return found
    from tools_env.offline_web.build import build_offline_web

    with tempfile.TemporaryDirectory() as offline_web:
        build_offline_web(offline_web, seed=0)
        rows = [json.loads(line) for line in (Path(offline_web) / "documents.jsonl").open(encoding="utf-8")]
    pages = [row["text"] for row in rows if row["lang"] == "en"]
    joined = ["\n\n".join(pages[i : i + 15]) for i in range(0, len(pages), 15)]
    return [text for text in joined if len(text) >= MIN_CHARS][:limit]


def report(result: dict) -> str:
    """Returns the results as a Markdown table."""
    saved = 1 - result["tokens"]["patch"] / result["tokens"]["rewrite"]
    rows = [f"tokens of patching below rewriting: {saved:.1%}", "", "| anchor | method | right | refused | wrong |"]
    rows.append("|---|---|---|---|---|")
    for kind, methods in result["outcomes"].items():
        for method, counts in methods.items():
            total = counts.total() or 1
            cells = " | ".join(f"{counts[name] / total:.1%}" for name in ("right", "refused"))
            rows.append(f"| {kind} | {method} | {cells} | {counts['wrong']} of {total} |")
    return "\n".join(rows)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="patch_bench", description=__doc__.split("\n")[0])
    parser.add_argument("--texts", help="folder with *.txt; default: pages of the offline web")
    parser.add_argument("--edits", type=int, default=500)
    parser.add_argument("--seed", type=int, default=0)
    flags = parser.parse_args(argv)
    texts = read_texts(flags.texts)
    if not texts:
        print(
            f"patch_bench: {flags.texts} has no *.txt of {MIN_CHARS} characters; name another folder", file=sys.stderr
        )
        return 2
    print(f"{flags.edits} edits in {len(texts)} texts of {sum(map(len, texts)) // len(texts)} characters on average")
    print(report(run_patch_bench(texts, flags.edits, flags.seed)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
