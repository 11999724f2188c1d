"""Facts about the token log."""

import numpy as np
import pytest

from stepdr_jax.tokens.log import TEACHER, TokenLog


def test_the_log_keeps_what_was_sampled_apart_from_what_was_given():
    log = TokenLog()
    log.observed([5, 6])
    log.sampled([7, 8], [-0.5, -1.5], version=3)
    log.observed([9])
    log.supervised([4])
    arrays = log.arrays()
    assert log.tokens == (5, 6, 7, 8, 9, 4) and len(log) == 6 and log.sampled_count == 3
    assert log.spans() == [(0, 2, False), (2, 4, True), (4, 5, False), (5, 6, True)]
    assert arrays["sampled"].tolist() == [False, False, True, True, False, True]
    assert arrays["logprobs"].tolist() == [0, 0, -0.5, -1.5, 0, 0]
    assert arrays["version"].tolist() == [0, 0, 3, 3, 0, TEACHER]
    assert [arrays[k].dtype for k in ("tokens", "sampled", "logprobs", "version")] == [
        np.int32,
        bool,
        np.float32,
        np.int32,
    ]


def test_what_is_in_the_log_cannot_be_changed_from_outside():
    log = TokenLog()
    log.observed([1, 2])
    log.arrays()["tokens"][0] = 9
    assert log.tokens == (1, 2)


def test_an_empty_log_has_empty_arrays():
    assert TokenLog().spans() == [] and TokenLog().arrays()["tokens"].shape == (0,)


def test_every_sampled_id_needs_its_logprob():
    with pytest.raises(ValueError, match="one logprob per id"):
        TokenLog().sampled([1, 2], [-0.1], version=0)
