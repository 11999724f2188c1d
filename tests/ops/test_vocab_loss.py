"""The chunked statistics equal the plain softmax, gradients included, at every chunk size."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from stepdr_jax.ops.vocab_loss import Head, token_stats


def example(N=10, D=6, V=24):
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.normal(size=(N, D)), jnp.float32)
    w = jnp.asarray(rng.normal(size=(V, D)), jnp.float32)
    return x, w, jnp.asarray(rng.integers(0, V, N), jnp.int32)


def plain(x, w, targets, temperature):
    logits = x @ w.T / temperature
    logp = jax.nn.log_softmax(logits)
    logprob = jnp.take_along_axis(logp, targets[:, None], axis=-1)[:, 0]
    return logprob, -jnp.sum(jnp.exp(logp) * logp, axis=-1), jax.nn.logsumexp(logits, axis=-1)


@pytest.mark.parametrize("chunk", [1, 4, 10, 64])
@pytest.mark.parametrize(("temperature", "tiles"), [(1.0, 1), (0.7, 1), (0.7, 3)])
def test_values_and_gradients_equal_plain_softmax(chunk, temperature, tiles):
    x, w, targets = example()

    def loss(x, w, function):
        logprob, entropy, logz = function(x, w)
        return jnp.sum(jnp.sin(logprob) + 0.5 * jnp.cos(entropy) + 0.1 * logz**2)

    def ours(x, w):
        return token_stats(x, w, targets, chunk=chunk, temperature=temperature, head=Head(tiles=tiles))

    def theirs(x, w):
        return plain(x, w, targets, temperature)

    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-5), ours(x, w), theirs(x, w))
    gradient = jax.jit(jax.grad(loss, (0, 1)), static_argnums=2)
    actual, expected = gradient(x, w, ours), gradient(x, w, theirs)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-4, rtol=1e-4), actual, expected)


def test_large_logits_stay_finite():
    x, w, targets = example()
    for part in token_stats(1e4 * x, w, targets, chunk=4):
        assert np.isfinite(part).all()


def test_no_array_of_tokens_by_vocabulary_exists_beyond_a_chunk():
    N, V, chunk = 64, 1000, 8
    x, w, targets = jnp.zeros((N, 4)), jnp.zeros((V, 4)), jnp.zeros((N,), jnp.int32)

    def loss(x, w):
        return token_stats(x, w, targets, chunk=chunk)[0].sum()

    compiled = jax.jit(jax.grad(loss, (0, 1))).lower(x, w).compile()
    assert compiled.memory_analysis().temp_size_in_bytes < N * V * 4


def test_bfloat16_inputs_give_float32_statistics():
    x, w, targets = example()
    parts = token_stats(x.astype(jnp.bfloat16), w.astype(jnp.bfloat16), targets, chunk=4)
    assert {p.dtype for p in parts} == {jnp.dtype("float32")}
    np.testing.assert_allclose(parts[0], plain(x, w, targets, 1.0)[0], atol=0.2)
