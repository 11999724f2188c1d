"""The product with its own gradient equals the derived one."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from stepdr_jax.ops.dense import dense


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_values_and_gradients_equal_the_derived_rule(dtype):
    x = jax.random.normal(jax.random.key(0), (2, 5, 6)).astype(dtype)
    kernel = jax.random.normal(jax.random.key(1), (6, 7))

    def plain(x, kernel):
        return x @ kernel.astype(x.dtype)

    def loss(function):
        return lambda x, kernel: jnp.sum(jnp.sin(function(x, kernel).astype(jnp.float32)))

    close = 1e-5 if dtype == "float32" else 5e-2
    np.testing.assert_allclose(dense(x, kernel), plain(x, kernel), atol=close)
    actual, expected = (jax.grad(loss(f), (0, 1))(x, kernel) for f in (dense, plain))
    for ours, theirs in zip(actual, expected, strict=True):
        assert ours.dtype == theirs.dtype
        np.testing.assert_allclose(ours.astype(jnp.float32), theirs.astype(jnp.float32), atol=close)
