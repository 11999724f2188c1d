"""Remat, attention backends, the NNX face and the critic change nothing about the decoder; see also
test_transformers."""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from stepdr_jax.models import qwen2, value_head
from stepdr_jax.sharding.placement import Placement


def small(**overrides) -> qwen2.Qwen2Config:
    shape = dict(
        vocab_size=97,
        hidden_size=32,
        num_layers=2,
        num_heads=4,
        num_kv_heads=2,
        head_dim=8,
        intermediate_size=48,
        rope_theta=10_000.0,
        rms_norm_eps=1e-6,
        tie_embeddings=True,
    )
    return qwen2.Qwen2Config(**(shape | overrides))


def random_params(config, seed=0):
    """Initial parameters with large random biases and norms, so that every one of them matters."""
    params = qwen2.init_params(config, jax.random.key(seed))
    leaves, tree = jax.tree.flatten(params)
    keys = jax.random.split(jax.random.key(seed + 1), len(leaves))
    leaves = [leaf + 0.2 * jax.random.normal(k, leaf.shape, leaf.dtype) for leaf, k in zip(leaves, keys, strict=True)]
    return jax.tree.unflatten(tree, leaves)


def packed_example(config):
    """(tokens, positions, segments)[1, 15]: two documents and padding."""
    tokens = np.random.default_rng(1).integers(0, config.vocab_size, (1, 15))
    positions = np.concatenate([np.arange(7), np.arange(5), np.zeros(3, int)])[None]
    segments = np.concatenate([np.full(7, 1), np.full(5, 2), np.zeros(3, int)])[None]
    return tokens, positions, segments


def test_remat_and_blockwise_change_no_gradient():
    config = small()
    params = random_params(config)
    tokens, positions, segments = packed_example(config)

    def loss(params, **options):
        x_BTD = qwen2.hidden_states(params, tokens, positions, segments, config, **options)
        return jnp.sum(jnp.square(x_BTD) * jnp.asarray(segments > 0)[..., None])

    expected = jax.jit(jax.grad(loss))(params)
    for options in (dict(remat="layer"), dict(remat="attention"), dict(placement=Placement(attention="blockwise"))):
        actual = jax.jit(jax.grad(functools.partial(loss, **options)))(params)
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-3, rtol=1e-3), actual, expected)


def test_nnx_module_and_functions_agree():
    config = small()
    params = random_params(config)
    tokens = np.arange(6)[None]
    module = qwen2.Qwen2(config, params=params)
    positions, segments = np.arange(6)[None], np.ones((1, 6), np.int32)
    forward = jax.jit(qwen2.forward, static_argnums=1)
    expected = forward(params, config, tokens, positions, segments)
    np.testing.assert_allclose(module(tokens, positions, segments), expected, atol=1e-5)


def test_a_new_critic_values_everything_at_zero_and_its_head_can_learn():
    config = small()
    actor = random_params(config)
    critic = value_head.init_value_params(actor, config, jax.random.key(0))
    tokens, positions, segments = np.arange(6)[None], np.arange(6)[None], np.ones((1, 6), np.int32)

    def total(critic):
        v_BT = value_head.values(critic, tokens, positions, segments, config)
        return v_BT.sum(), v_BT

    gradient, v_BT = jax.jit(jax.grad(total, has_aux=True))(critic)
    assert not np.any(v_BT)
    assert np.any(gradient["value_kernel"])
