"""Facts about packing."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from stepdr_jax.data import packing


@settings(deadline=None)
@given(st.lists(st.integers(1, 50), max_size=60))
def test_every_example_is_in_one_bin_and_no_bin_overflows(lengths):
    bins = packing.pack_best_fit(lengths, 50)
    assert sorted(index for bin_ in bins for index in bin_) == list(range(len(lengths)))
    assert all(sum(lengths[index] for index in bin_) <= 50 for bin_ in bins)


def test_sequences_of_mixed_lengths_are_more_than_95_percent_full():
    lengths = np.random.default_rng(0).lognormal(4, 0.8, 3000).clip(8, 256).astype(int).tolist()
    assert sum(lengths) / (len(packing.pack_best_fit(lengths, 256)) * 256) > 0.95


def test_lengths_that_cannot_fit_are_refused():
    with pytest.raises(ValueError, match=r"1\.\.8"):
        packing.pack_best_fit([9], 8)
    with pytest.raises(ValueError, match=r"1\.\.8"):
        packing.pack_best_fit([3, 0], 8)


@settings(deadline=None)
@given(st.lists(st.booleans(), min_size=1, max_size=40), st.integers(2, 12))
def test_windows_predict_every_target_exactly_once(mask, seq_len):
    tokens = np.arange(len(mask), dtype=np.int32)
    predicted = []
    for window_tokens, window_mask in packing.split_windows(tokens, np.asarray(mask), seq_len):
        assert len(window_tokens) <= seq_len and not window_mask[0]
        predicted += window_tokens[window_mask].tolist()
    assert predicted == [index for index in range(1, len(mask)) if mask[index]]


def test_a_sequence_survives_its_form_on_disk():
    examples = [
        (np.asarray([7, 8, 9], np.int32), np.asarray([False, True, True]), 4),
        (np.asarray([151_664, 5], np.int32), np.asarray([False, False])),
    ]
    row = packing.sequence_from_bytes(packing.sequence_bytes(examples, 8), 8)
    assert row["tokens"].tolist() == [7, 8, 9, 151_664, 5, 0, 0, 0]
    assert row["segment_ids"].tolist() == [1, 1, 1, 2, 2, 0, 0, 0]
    assert row["positions"].tolist() == [0, 1, 2, 0, 1, 0, 0, 0]
    assert row["loss_mask"].tolist() == [False, True, True] + [False] * 5
    assert row["capability"].tolist() == [4, 4, 4] + [0] * 5
    assert {key: value.dtype for key, value in row.items()} == dict(
        tokens=np.int32, loss_mask=bool, segment_ids=np.int32, positions=np.int32, capability=np.int32
    )


def test_a_full_sequence_of_one_example_has_no_padding():
    row = packing.sequence_from_bytes(
        packing.sequence_bytes([(np.arange(1, 5, dtype=np.int32), np.ones(4, bool))], 4), 4
    )
    assert row["positions"].tolist() == [0, 1, 2, 3] and row["segment_ids"].tolist() == [1] * 4


def test_a_sequence_of_another_size_is_refused():
    with pytest.raises(ValueError, match="expected a sequence of 56 bytes"):
        packing.sequence_from_bytes(b"123", 8)
