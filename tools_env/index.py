"""Indexes documents for the tool host: folders, Wikipedia dumps, JSONL and archives of texts.

python -m tools_env.index --out=DIR SOURCE...
python -m tools_env.server --offline_web=DIR

Repeat the command to update the index: unchanged documents are skipped, changed ones replaced, and missing ones
removed. It may be killed at any moment; the same command continues.
"""

import argparse
import asyncio
import collections
import json
import logging
import sys
import time
from pathlib import Path
from urllib.parse import urlsplit

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

from tools_env.errors import ToolError, ToolHostError, Unavailable
from tools_env.search import choose, opensearch, store
from tools_env.search import index as embedded
from tools_env.search.sources import IndexSource, document_candidates, parse_source
from tools_env.search.wikitext import LICENSE

EXAMPLE = """example:
  python -m tools_env.index --out=search ~/notes,site=notes.example,authority=2 enwiki-latest-pages-articles.xml.bz2
  python -m tools_env.server --offline_web=search

Sources: a folder (md, txt, html, pdf), a MediaWiki dump (.xml, .xml.bz2), .jsonl (an object with url, title, text a
line; id, lang, authority, published_at if known), .tar(.gz, .xz, .bz2) of such files. ,site=HOST is the host of
documents without an address; ,authority=0|1|2 is unreliable, ordinary or authoritative (default 1)."""
COMMIT_SECONDS = 10.0
SHOWN_FAILURES = 10

logger = logging.getLogger(__name__)


def update_index(
    out: Path, sources: list[IndexSource], *, vectors: str = "none", options: str = "", console: Console
) -> dict[str, int]:
    """Updates the index in `out` from the sources.

    Args:
      vectors: "none", "lsa" (offline) or "endpoint" (embeddings_url and so on in `options`).
      options: JSON object, as the host's search_options.

    Returns the numbers of documents (added, changed, unchanged, removed, unreadable) and of passages.
    Raises ToolHostError.
    """
    if (out / "documents.jsonl").exists():
        raise ToolHostError(f"{out} is an offline web, whose index is built from its documents; name another directory")
    embedder = (
        choose.make_embedder(choose.read_search_options("embedded", options), 120.0) if vectors == "endpoint" else None
    )
    if vectors == "endpoint" and embedder is None:
        raise ToolHostError("--vectors=endpoint needs embeddings_url, _model and _dimensions in --search_options")
    writer = store.Writer(out / "index")
    count: dict[str, int] = collections.Counter()
    try:
        with _progress(console) as bar:
            task = bar.add_task("documents", total=None)
            committed, sites = time.monotonic(), {}
            for source in sources:
                bar.update(task, description=source.path.name[:40])
                for candidate in document_candidates(source):
                    bar.advance(task)
                    _one(writer, candidate, sites, count, console)
                    if time.monotonic() - committed > COMMIT_SECONDS:
                        _commit(writer, out, sites)
                        committed = time.monotonic()
                if str(source.path).endswith((".xml", ".xml.bz2")):
                    (out / "LICENSE").write_text(LICENSE + "\n")
            count["removed"] = writer.remove_unseen()
            _commit(writer, out, sites)
        count["documents"] = writer.documents()
    finally:
        writer.close()
    if not count["documents"]:
        raise ToolHostError("the sources have no document that can be indexed; name other sources")
    if vectors != "none":
        with _progress(console) as bar:
            task = bar.add_task("vectors", total=writer.passages)
            embedded.build_vectors(out / "index", embedder, lambda done: bar.update(task, completed=done))
    count["passages"] = len(store.alive(out / "index"))
    return count


def _one(writer: store.Writer, candidate, sites: dict[str, int], count: dict[str, int], console: Console) -> None:
    if writer.known(candidate.id, candidate.fingerprint):
        count["unchanged"] += 1
        return
    try:
        row = candidate.read()
    except ToolHostError as error:
        count["unreadable"] += 1
        if count["unreadable"] <= SHOWN_FAILURES:
            console.print(f"left out: {error}", markup=False, highlight=False, soft_wrap=True)
        return
    host = urlsplit(row["url"]).hostname
    sites[host] = max(sites.get(host, 0), row["authority"])
    changed = writer.has(candidate.id)
    writer.add(row, candidate.fingerprint)
    count["changed" if changed else "added"] += 1


def _commit(writer: store.Writer, out: Path, sites: dict[str, int]) -> None:
    """Commits. Writes the table of sites first: pages of a site that is not in it could not be opened."""
    path = out / "sites.json"
    hosts = json.loads(path.read_text())["hosts"] if path.exists() else {}
    hosts |= {host: {"authority": authority} for host, authority in sites.items()}
    store.write_atomically(path, json.dumps({"hosts": hosts}, ensure_ascii=False, indent=1).encode() + b"\n")
    writer.commit()


def _progress(console: Console) -> Progress:
    columns = [
        SpinnerColumn(),
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
    ]
    return Progress(*columns, console=console, transient=not console.is_terminal)


async def _push(out: Path, options: str, console: Console) -> int:
    chosen = choose.read_search_options("opensearch", options)
    remote, embedder = choose.make_cluster_client(chosen, 300.0), choose.make_embedder(chosen, 120.0)
    passages, alive = store.Passages(out / "index"), store.alive(out / "index")
    rows = ((passages[int(i)], passages.language(int(i))) for i in alive)
    try:
        with _progress(console) as bar:
            task = bar.add_task("to the cluster", total=len(alive))
            report = lambda done: bar.update(task, completed=done)  # noqa: E731
            return await opensearch.push_passages(remote, str(chosen["index"]), rows, embedder, report)
    except (ToolError, Unavailable) as error:
        raise ToolHostError(f"{error}; fix that and repeat the command") from None
    finally:
        await remote.close()
        if embedder:
            await embedder.close()


def main(argv: list[str] | None = None) -> int:
    """Runs the command line.

    Exit status 2: nothing was done, the message says why; 1: some documents could not be read.
    """
    parser = argparse.ArgumentParser(
        prog="python -m tools_env.index",
        description=__doc__,
        epilog=EXAMPLE,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("sources", nargs="+", metavar="SOURCE", help="PATH[,site=HOST][,authority=0|1|2]")
    parser.add_argument(
        "--out", required=True, type=Path, help="directory of the index; a host serves it with --offline_web"
    )
    parser.add_argument(
        "--vectors",
        choices=("none", "lsa", "endpoint"),
        default="none",
        help="also compute vectors, for search_ranking dense and hybrid: offline (lsa) or by an embedding endpoint",
    )
    parser.add_argument("--search_options", default="", help="JSON object with embeddings_url and so on")
    parser.add_argument("--opensearch", default="", help="JSON object of options; also updates that OpenSearch index")
    flags = parser.parse_args(argv)
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s %(name)s: %(message)s")
    console = Console(stderr=True)
    try:
        sources = [parse_source(argument) for argument in flags.sources]
        count = update_index(flags.out, sources, vectors=flags.vectors, options=flags.search_options, console=console)
        if flags.opensearch:
            asyncio.run(_push(flags.out, flags.opensearch, console))
    except ToolHostError as error:
        print(f"index: {error}", file=sys.stderr)
        return 2
    kinds = ("added", "changed", "unchanged", "removed", "unreadable")
    told = ", ".join(f"{count[kind]} {kind}" for kind in kinds)
    print(f"{count['documents']} documents, {count['passages']} passages in {flags.out} ({told})")
    return 1 if count["unreadable"] else 0


if __name__ == "__main__":
    sys.exit(main())
