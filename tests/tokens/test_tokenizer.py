"""Facts about the tokenizer: Qwen2.5's ids, training, and control ids that no text can reach."""

from pathlib import Path

import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st

from stepdr_jax.errors import UserError
from stepdr_jax.tokens.tokenizer import ADDED, Tokenizer

QWEN = Path(__file__).parents[3] / "shared" / "data" / "qwen_tokenizer" / "tokenizer.json"
TEXTS = [
    "The capital of Austria is Vienna. \\cite{web_bakotefi}",
    "奥地利的首都是维也纳。",
    '{"name": "batch_web_surfer", "arguments": {"queries": ["capital of Austria"]}}',
    "naïve café 1234 \r\n\n\t x",
] * 3


@pytest.fixture(scope="module")
def small() -> Tokenizer:
    return Tokenizer.train(TEXTS, 400)


@pytest.fixture(scope="module")
def qwen() -> Tokenizer:
    if not QWEN.exists():
        pytest.skip(f"no Qwen2.5 tokenizer at {QWEN}")
    return Tokenizer.load(QWEN)


def test_qwen_file_keeps_its_published_ids(qwen):
    assert qwen.vocab_size == 151_665
    assert (qwen.endoftext, qwen.im_start, qwen.im_end) == (151_643, 151_644, 151_645)
    assert (qwen.tool_call_start, qwen.tool_call_end) == (151_657, 151_658)
    assert [qwen.control[text] for text in ADDED] == list(range(151_643, 151_665))
    assert qwen.encode("\n") == [198]
    assert qwen.encode("system\nYou are") == [8948, 198, 2610, 525]
    assert qwen.encode("assistant\n") == [77091, 198]


def test_a_trained_tokenizer_splits_text_as_qwen_does(qwen, small):
    theirs = tokenizers.Tokenizer.from_file(str(QWEN)).pre_tokenizer
    for text in [*TEXTS, "I'LL pay 12.5 €, 你好world!!\n\n  ok   \n", "a  b\r\n\r\nc\u00a0d"]:
        assert small._bpe.pre_tokenizer.pre_tokenize_str(text) == theirs.pre_tokenize_str(text)


def test_control_tokens_follow_the_vocabulary_in_qwens_order(small):
    assert small.vocab_size <= 400
    assert [small.control[text] for text in ADDED] == list(range(small.vocab_size - len(ADDED), small.vocab_size))


def test_enough_text_fills_the_vocabulary_exactly():
    assert Tokenizer.train([Path(__file__).read_text()], 300).vocab_size == 300


def test_a_repeated_phrase_without_spaces_stays_in_parts():
    phrase = "布达佩斯的首都是布达佩斯"
    tok = Tokenizer.train([phrase] * 50, 400)
    pieces = [len(tok._bytes_of[id_]) for id_ in tok.encode(phrase)]
    assert sum(pieces) == 36 and 6 <= max(pieces) <= 12


def test_training_twice_gives_the_same_tokenizer(small):
    assert Tokenizer.train(iter(TEXTS), 400).fingerprint() == small.fingerprint()
    assert Tokenizer.train([*TEXTS, "zebra zebra zebra"] * 2, 400).fingerprint() != small.fingerprint()


def test_save_and_load_keep_every_id(tmp_path, small):
    small.save(tmp_path / "tokenizer.json")
    again = Tokenizer.load(tmp_path / "tokenizer.json")
    assert again.fingerprint() == small.fingerprint()
    assert [again.encode(text) for text in TEXTS] == [small.encode(text) for text in TEXTS]
    reference = tokenizers.Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    assert reference.encode("<|im_start|>user").ids == [small.im_start, *small.encode("user")]


@settings(deadline=None, max_examples=100)
@given(st.lists(st.sampled_from([*ADDED, " ", "a", "奥", "\n", "<", "\u0301", "🦊"]) | st.text(max_size=5), max_size=8))
def test_no_text_becomes_a_control_id_and_text_survives_the_round_trip(small, parts):
    text = "".join(parts)
    ids = small.encode(text)
    assert not set(ids) & set(small.control.values())
    assert small.decode(ids) == small._bpe.normalizer.normalize_str(text)


def test_decode_shows_tool_tags_and_hides_special_tokens(small):
    ids = [small.tool_call_start, *small.encode("x"), small.tool_call_end, small.im_end]
    assert small.decode(ids) == "<tool_call>x</tool_call>"
    assert small.decode(ids, special=True) == "<tool_call>x</tool_call><|im_end|>"


def test_decode_replaces_broken_bytes_and_unknown_ids(small):
    broken = small.encode("奥地")[:1] if len(small.encode("奥")) > 1 else [small._bpe.token_to_id("å")]
    assert "\ufffd" in small.decode(broken)
    assert small.decode([10**6]) == "\ufffd"


def test_half_a_surrogate_pair_is_encoded_as_a_replacement(small):
    assert small.decode(small.encode("a\ud800b")) == "a\ufffdb"


def test_wrong_inputs_name_the_fix(tmp_path):
    with pytest.raises(UserError, match="vocab_size >= 278"):
        Tokenizer.train(TEXTS, 100)
    with pytest.raises(UserError, match="does not exist"):
        Tokenizer.load(tmp_path / "none.json")
    (tmp_path / "other.json").write_text('{"model": {"type": "WordPiece"}}')
    with pytest.raises(UserError, match="BPE"):
        Tokenizer.load(tmp_path / "other.json")
