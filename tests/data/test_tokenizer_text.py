"""Facts about how a run gets its tokenizer."""

import re

import pytest
from ml_collections import ConfigDict

from stepdr_jax import files
from stepdr_jax.data.tokenizer_text import corpus_texts, ensure_tokenizer
from stepdr_jax.errors import UserError
from stepdr_jax.tokens.tokenizer import Tokenizer


@pytest.fixture
def config(tmp_path) -> ConfigDict:
    rows = [dict(text=f"The capital of land {i % 7} is town {i % 7}.") for i in range(50)]
    messages = [
        dict(role="user", content="Where?"),
        dict(role="tool", content="There."),
        dict(role="assistant", content=""),
    ]
    files.write_jsonl(tmp_path / "corpus" / "synthetic_documents.jsonl", [*rows, dict(prompt="Q", completion="A")])
    files.write_jsonl(tmp_path / "corpus" / "trajectories.jsonl", [dict(messages=messages)])
    files.write_jsonl(tmp_path / "corpus" / "documents.jsonl", [dict(title="Land", text="Page.")])
    return ConfigDict(dict(run_dir=str(tmp_path), tokenizer=dict(path="", vocab_size=300), data=dict(sources={})))


def test_every_text_is_there_in_its_frame(config, tmp_path):
    texts = corpus_texts(tmp_path / "corpus")
    assert len(texts) == 50 + 2 + 3 + 1
    assert "user\n<tool_response>\nThere.\n</tool_response>" in texts and "Land\nPage." in texts


def test_citation_ids_are_drawn_anew_at_each_place(tmp_path):
    rows = [dict(text="See \\cite{web_bakotefi}, web_bakotefi.")] * 2
    files.write_jsonl(tmp_path / "synthetic_documents.jsonl", rows)
    files.write_jsonl(tmp_path / "trajectories.jsonl", [])
    found = re.findall(r"web_(?:[bdfghjklmnprstvz][aeiou]){4}\b", " ".join(corpus_texts(tmp_path)))
    assert len(set(found)) == 4


def test_a_large_corpus_gives_a_fixed_part(tmp_path):
    files.write_jsonl(tmp_path / "synthetic_documents.jsonl", [dict(text=f"text number {i}") for i in range(2000)])
    files.write_jsonl(tmp_path / "trajectories.jsonl", [])
    part = corpus_texts(tmp_path, limit=10_000)
    assert part == corpus_texts(tmp_path, limit=10_000)
    assert 8_000 < sum(map(len, part)) < 12_000


def test_the_tokenizer_is_trained_once_and_kept(config, tmp_path):
    first = ensure_tokenizer(config).fingerprint()
    files.write_jsonl(tmp_path / "corpus" / "synthetic_documents.jsonl", [dict(text="Other words, other words.")])
    assert ensure_tokenizer(config).fingerprint() == first


def test_a_given_tokenizer_is_used_and_cannot_be_swapped_later(config, tmp_path):
    given = Tokenizer.train(["abc abc abcd abcd"], 290)
    given.save(tmp_path / "mine.json")
    config.tokenizer.path = str(tmp_path / "mine.json")
    assert ensure_tokenizer(config).fingerprint() == given.fingerprint()
    Tokenizer.train(["xyz xyz xyzw xyzw"], 290).save(tmp_path / "mine.json")
    with pytest.raises(UserError, match="clear tokenizer.path, or use a new run_dir"):
        ensure_tokenizer(config)


def test_no_corpus_names_the_stage_to_run(tmp_path):
    config = ConfigDict(dict(run_dir=str(tmp_path), tokenizer=dict(path="", vocab_size=300), data=dict(sources={})))
    with pytest.raises(UserError, match=r"synthetic_documents\.jsonl does not exist"):
        ensure_tokenizer(config)


def test_sources_of_ones_own_are_read_without_a_corpus(tmp_path):
    files.write_jsonl(tmp_path / "mine.jsonl", [dict(text=f"Zeppelin {i % 3} flies.") for i in range(40)])
    entry = dict(format="jsonl", path=str(tmp_path / "*.jsonl"), component="c")
    config = ConfigDict(dict(run_dir=str(tmp_path / "run"), tokenizer=dict(path="", vocab_size=300), data={}))
    config.data.sources = ConfigDict(dict(mine=entry))
    tokenizer = ensure_tokenizer(config)
    assert len(tokenizer.encode("Zeppelin")) <= 2  # its merges were learned from the rows
