"""Attention over pages: against the kernel's own reference, and against attention over a sequence in one piece."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas.ops.tpu.ragged_paged_attention import ref_ragged_paged_attention

from stepdr_jax.ops import attention, paged_attention

PAGES, PAGE, N, H, K = 12, 4, 2, 4, 8
LENGTHS = (9, 4, 13)  # of which the last T tokens are new
TABLE_BM = np.array([[7, 2, 11, 0], [5, 0, 0, 0], [1, 3, 8, 10]], np.int32)


def written(backend, k_BSNK, v_BSNK):
    """Pages that hold each row's tokens; other pages hold what would be seen if they were read."""
    pages = jax.tree.map(lambda a: a + 9.0, paged_attention.init_pages(backend, PAGES, PAGE, N, K, jnp.float32))
    positions_BS = np.broadcast_to(np.arange(16), (3, 16))
    valid_BS = positions_BS < np.array(LENGTHS)[:, None]
    places = paged_attention.places(TABLE_BM, positions_BS, valid_BS, num_pages=PAGES, page_size=PAGE)
    return paged_attention.write(pages, k_BSNK, v_BSNK, places)


@pytest.mark.parametrize("T", [1, 4])
def test_pages_in_any_place_equal_the_kernels_reference_and_plain_attention(T):
    keys = jax.random.split(jax.random.key(0), 3)
    q_BTHK = jax.random.normal(keys[0], (3, T, H, K))
    k_BSNK, v_BSNK = (jax.random.normal(key, (3, 16, N, K)) for key in keys[1:])
    positions_BT = np.array(LENGTHS)[:, None] - T + np.arange(T)
    got = paged_attention.attend(q_BTHK, written("reference", k_BSNK, v_BSNK), TABLE_BM, positions_BT)
    kernel = ref_ragged_paged_attention(
        q_BTHK.reshape(3 * T, H, K),
        written("ragged", k_BSNK, v_BSNK),
        jnp.array(LENGTHS),
        jnp.array(TABLE_BM),
        jnp.arange(4) * T,
        jnp.array([3]),
        sm_scale=K**-0.5,
    )
    np.testing.assert_allclose(got.reshape(3 * T, H, K), kernel, atol=2e-6)
    for b, length in enumerate(LENGTHS):
        plain = attention.attention(
            q_BTHK[b : b + 1],
            k_BSNK[b : b + 1, :length],
            v_BSNK[b : b + 1, :length],
            query_positions_BT=positions_BT[b : b + 1],
            key_positions_BS=np.arange(length)[None],
            query_segments_BT=np.ones((1, T), np.int32),
            key_segments_BS=np.ones((1, length), np.int32),
            backend="reference",
        )
        np.testing.assert_allclose(got[b : b + 1], plain, atol=2e-6)


def test_a_page_that_holds_a_sequence_needs_no_table():
    keys = jax.random.split(jax.random.key(1), 3)
    pages = {"k": jax.random.normal(keys[0], (3, N, K, 16)), "v": jax.random.normal(keys[1], (3, N, 16, K))}
    q_B1HK, positions_B1 = jax.random.normal(keys[2], (3, 1, H, K)), np.array([[4], [15], [0]])
    with_table = paged_attention.attend(q_B1HK, pages, np.arange(3)[:, None], positions_B1)
    np.testing.assert_array_equal(paged_attention.attend(q_B1HK, pages, None, positions_B1), with_table)


def test_the_kernel_is_chosen_where_it_runs():
    assert paged_attention.choose("tpu", 128) == "ragged"
    assert paged_attention.choose("tpu", 16) == paged_attention.choose("cpu", 128) == "reference"
