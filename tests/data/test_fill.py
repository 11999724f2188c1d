"""Facts about packing at the sequence lengths of the recipe, on lengths of real articles and real trajectories."""

import json
import tarfile
from pathlib import Path

import numpy as np
import pytest

from stepdr_jax.data import packing, sources
from stepdr_jax.records import Trajectory
from stepdr_jax.tokens import chat
from stepdr_jax.tokens.tokenizer import Tokenizer

DATA = Path(__file__).parents[2].parent / "shared" / "data"
FULL = 0.97


def need(name: str) -> Path:
    path = DATA / name
    if not path.exists():
        pytest.skip(f"../shared/data/{name} is absent")
    return path


def fill(lengths: list[int], seq_len: int) -> float:
    pieces = []
    for length in lengths:
        nothing = np.zeros(length, np.int8)
        pieces += [len(tokens) for tokens, _ in packing.split_windows(nothing, nothing.astype(bool), seq_len)]
    return sum(pieces) / (len(packing.pack_best_fit(pieces, seq_len)) * seq_len)


@pytest.fixture(scope="module")
def tok() -> Tokenizer:
    return Tokenizer.load(need("qwen_tokenizer/tokenizer.json"))


@pytest.mark.parametrize("seq_len", [32_768, 131_072])
def test_sequences_of_real_articles_are_more_than_97_percent_full(seq_len):
    with tarfile.open(need("wikispeedia/plaintext_articles.tar.xz")) as archive:
        lengths = [
            max(2, member.size // 4) for member in archive if member.name.endswith(".txt")
        ]  # 4 bytes a token in English
    assert len(lengths) > 4000
    assert fill(lengths, seq_len) > FULL


@pytest.mark.parametrize("seq_len", [32_768, 131_072])
def test_sequences_of_real_trajectories_are_more_than_97_percent_full(seq_len, tok):
    lengths = []
    for path in sorted(need("adp_samples").glob("*_std.json")):
        source = sources.DataSource("adp", "adp_json", (path,), "c")
        for _, row, _ in source.scan(path, (0, -1)):
            lengths.append(len(chat.trajectory_tokens(tok, Trajectory.model_validate(row["trajectory"]))))
    drawn = np.random.default_rng(0).choice(lengths, 4000).tolist()  # the sample is small: as many as a pool would have
    assert fill(drawn, seq_len) > FULL


def test_a_trajectory_longer_than_a_row_makes_windows_that_learn_every_target_once():
    steps = [
        dict(class_="text_observation", source="user", content="Go on."),
        dict(class_="message_action", content="x " * 300),
    ]
    row = next(iter(_rows(steps * 40)))
    tok = Tokenizer.train(["Go on. x x x user assistant"], 300)
    arrays = chat.trajectory_tokens(tok, Trajectory.model_validate(row["trajectory"])).arrays()
    seq_len = 1024
    pieces = packing.split_windows(arrays["tokens"], arrays["sampled"], seq_len)
    assert len(pieces) > 10 and all(len(tokens) <= seq_len for tokens, _ in pieces)
    assert sum(int(mask.sum()) for _, mask in pieces) == int(arrays["sampled"].sum())


def _rows(steps: list[dict]):
    yield sources.FORMATS["adp"].row(json.dumps(dict(id="t", content=steps, details={})).encode())
