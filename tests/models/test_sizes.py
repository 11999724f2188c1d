"""Every size of Qwen2.5 has its published shape and number of parameters."""

import pytest

from stepdr_jax.errors import UserError
from stepdr_jax.models import sizes

# Parameters of the base models: billions on the model cards (all, without embeddings), and in their weight files.
PUBLISHED = {
    "0.5B": (0.49, 0.36, 494_032_768),
    "1.5B": (1.54, 1.31, 1_543_714_304),
    "3B": (3.09, 2.77, 3_085_938_688),
    "7B": (7.61, 6.53, 7_615_616_512),
    "14B": (14.7, 13.1, 14_770_033_664),
    "32B": (32.5, 31.0, 32_763_876_352),
    "72B": (72.7, 70.0, 72_706_203_648),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_parameter_counts_are_the_published_ones(name):
    config = sizes.SIZES[name]
    billions, without_embeddings, exact = PUBLISHED[name]
    assert sizes.parameter_count(config) == exact
    # The cards round loosely: 32.76 became 32.5.
    assert exact / 1e9 == pytest.approx(billions, rel=0.01)
    assert sizes.parameter_count(config, embeddings=False) / 1e9 == pytest.approx(without_embeddings, rel=0.01)


def test_every_published_size_has_a_name():
    assert list(sizes.SIZES) == list(PUBLISHED)


def test_embeddings_are_tied_up_to_3b_and_their_vocabulary_is_padded_as_published():
    for name, config in sizes.SIZES.items():
        small = name in ("0.5B", "1.5B", "3B")
        assert config.tie_embeddings == small
        assert config.vocab_size == (151936 if small else 152064)
        assert config.num_heads * config.head_dim == config.hidden_size
        assert config.rope_theta == 1e6


def test_a_size_is_found_by_name_and_a_wrong_one_lists_them():
    assert sizes.size("7b") is sizes.SIZES["7B"]
    with pytest.raises(UserError, match="0.5B, 1.5B, 3B, 7B, 14B, 32B, 72B.*'33B'"):
        sizes.size("33B")
