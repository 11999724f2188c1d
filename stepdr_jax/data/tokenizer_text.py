"""The tokenizer of a run: the config's file, or one trained on the corpus as the model will read it."""

import random
import re
from collections.abc import Iterable, Iterator
from pathlib import Path

from stepdr_jax.data import sources
from stepdr_jax.errors import UserError
from stepdr_jax.files import read_jsonl
from stepdr_jax.tokens.tokenizer import Tokenizer

PART_BYTES, MAX_TEXT = 1 << 22, 100_000  # read at a time; characters of a text that are used
CITATION_ID = re.compile(r"\bweb_[a-z]{8}\b")


def ensure_tokenizer(config) -> Tokenizer:
    """Returns the tokenizer in run_dir/tokenizer, made first if absent: copied from `tokenizer.path`, or trained.

    An existing one is kept even if the corpus has changed, since checkpoints depend on it. Raises UserError when
    `tokenizer.path` names another tokenizer than the one in use, or when there is no corpus to train on.
    """
    path = Path(config.run_dir) / "tokenizer" / "tokenizer.json"
    chosen = Tokenizer.load(config.tokenizer.path) if config.tokenizer.path else None
    if path.exists():
        tokenizer = Tokenizer.load(path)
        if chosen and chosen.fingerprint() != tokenizer.fingerprint():
            raise UserError(
                f"expected tokenizer.path={config.tokenizer.path} to be the tokenizer in use, but {path} is another; "
                f"clear tokenizer.path, or use a new run_dir (checkpoints in this one depend on its tokenizer)"
            )
        return tokenizer
    tokenizer = chosen or Tokenizer.train(
        corpus_texts(Path(config.run_dir) / "corpus", own=source_texts(config)), config.tokenizer.vocab_size
    )
    tokenizer.save(path)
    return tokenizer


def source_texts(config, limit: int = 2_000_000) -> list[str]:
    """Returns the first `limit` characters of every source in config.data.sources, row by row."""
    texts = []
    for source in sources.list_sources(config):
        if source.name in config.data.sources:
            texts += _first_texts(source, limit)
    return texts


def _first_texts(source: sources.DataSource, limit: int) -> list[str]:
    texts, size = [], 0
    for path in source.files:
        for part in source.parts(path, PART_BYTES):
            for _, row, _ in source.scan(path, part):
                if size >= limit:
                    return texts
                if isinstance(row, dict):
                    texts.append(sources.row_text(row)[:MAX_TEXT])
                    size += len(texts[-1])
    return texts


def corpus_texts(corpus: Path, limit: int = 4_000_000, own: Iterable[str] = ()) -> list[str]:
    """Returns the texts of the corpus as often as they occur: synthetic documents, web documents, and messages in the
    chat format.

    `own` are further texts, from `config.data.sources`; with them the corpus may be absent.

    The control text of the chat format and system prompts are part of every episode, so merges should cover them
    first. Each citation id is replaced by a random one, so that merges learn its syllables and not the ids of popular
    passages. Above `limit` characters a random part is returned. The same corpus gives the same texts.
    """
    rng = random.Random(0)
    own = list(own)
    texts = own + (list(_all_texts(corpus)) if not own or (corpus / "synthetic_documents.jsonl").exists() else [])
    share = limit / max(sum(map(len, texts)), 1)
    kept = [text for text in texts if share >= 1 or rng.random() < share]
    return [CITATION_ID.sub(lambda match: _citation_id(rng), text) for text in kept]


def _citation_id(rng: random.Random) -> str:
    return "web_" + "".join(rng.choice("bdfghjklmnprstvz") + rng.choice("aeiou") for _ in range(4))


def _all_texts(corpus: Path) -> Iterator[str]:
    for row in read_jsonl(corpus / "synthetic_documents.jsonl"):
        yield from (row[field] for field in ("text", "prompt", "completion") if field in row)
    for row in read_jsonl(corpus / "trajectories.jsonl"):
        for message in row["messages"]:
            tool = message["role"] == "tool"
            text = f"<tool_response>\n{message['content']}\n</tool_response>" if tool else message["content"]
            yield f"{'user' if tool else message['role']}\n{text}"
    if (corpus / "documents.jsonl").exists():
        for row in read_jsonl(corpus / "documents.jsonl"):
            yield f"{row['title']}\n{row['text']}"
