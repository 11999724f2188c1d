"""The tokenizer of a run: the config's file, or one trained on the corpus as the model will read it."""

import hashlib
from collections.abc import Iterator
from pathlib import Path

from stepdr_jax.errors import UserError
from stepdr_jax.files import read_jsonl
from stepdr_jax.tokens.tokenizer import Tokenizer


def ensure_tokenizer(config) -> Tokenizer:
    """Returns the tokenizer in run_dir/tokenizer, made first if absent: copied from `tokenizer.path`, or trained.

    An existing one is kept although the corpus may have changed, since checkpoints depend on it. Raises UserError when
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
    tokenizer = chosen or Tokenizer.train(corpus_texts(Path(config.run_dir) / "corpus"), config.tokenizer.vocab_size)
    tokenizer.save(path)
    return tokenizer


def corpus_texts(corpus: Path, limit: int = 4_000_000) -> list[str]:
    """Returns distinct texts of the corpus: reading rows, documents, and messages inside their chat frame.

    Distinct, because copies of a page would spend merges on its citation ids; framed, so that the merges cover the
    format that every episode repeats. Above `limit` characters (seconds of training) a fixed random part is returned.
    """
    distinct = list(dict.fromkeys(_all_texts(corpus)))
    size = sum(map(len, distinct))
    if size <= limit:
        return distinct
    threshold = int(limit / size * 2**64)
    return [text for text in distinct if _draw(text) < threshold]


def _draw(text: str) -> int:
    """A number in [0, 2^64) that depends on the text alone."""
    return int.from_bytes(hashlib.blake2b(text.encode("utf-8", "replace"), digest_size=8).digest())


def _all_texts(corpus: Path) -> Iterator[str]:
    for row in read_jsonl(corpus / "reading.jsonl"):
        yield from (row[field] for field in ("text", "prompt", "completion") if field in row)
    for row in read_jsonl(corpus / "trajectories.jsonl"):
        for message in row["messages"]:
            tool = message["role"] == "tool"
            text = f"<tool_response>\n{message['content']}\n</tool_response>" if tool else message["content"]
            yield f"{'user' if tool else message['role']}\n{text}"
    if (corpus / "documents.jsonl").exists():
        for row in read_jsonl(corpus / "documents.jsonl"):
            yield f"{row['title']}\n{row['text']}"
