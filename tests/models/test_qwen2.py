"""The decoder equals Hugging Face's Qwen2 and does not leak between packed segments or cached rows."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from stepdr_jax.models import hf, qwen2, value_head
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


def logits(params, tokens, config, positions=None, segments=None):
    B, T = tokens.shape
    positions = np.broadcast_to(np.arange(T), (B, T)) if positions is None else positions
    segments = np.ones((B, T), np.int32) if segments is None else segments
    forward = jax.jit(qwen2.hidden_states, static_argnums=4)
    x_BTD = forward(params, np.asarray(tokens), np.asarray(positions), np.asarray(segments), config)
    return np.asarray(x_BTD @ qwen2.unembedding(params, config))


def hf_logits(params, tokens, config):
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    model = transformers.Qwen2ForCausalLM(
        transformers.Qwen2Config(
            vocab_size=config.vocab_size,
            hidden_size=config.hidden_size,
            num_hidden_layers=config.num_layers,
            num_attention_heads=config.num_heads,
            num_key_value_heads=config.num_kv_heads,
            head_dim=config.head_dim,
            intermediate_size=config.intermediate_size,
            rope_theta=config.rope_theta,
            rope_parameters={"rope_type": "default", "rope_theta": config.rope_theta},
            rms_norm_eps=config.rms_norm_eps,
            tie_word_embeddings=config.tie_embeddings,
        )
    ).eval()
    state = {name: torch.from_numpy(array.copy()) for name, array in hf.to_hf(params, config).items()}
    missing, unexpected = model.load_state_dict(state, strict=False)
    assert not unexpected
    assert set(missing) <= ({"lm_head.weight"} if config.tie_embeddings else set())
    with torch.no_grad():
        return model(torch.from_numpy(np.asarray(tokens, np.int64))).logits.numpy()


@pytest.mark.parametrize(
    "overrides",
    [
        dict(num_heads=4, num_kv_heads=4),
        dict(num_heads=4, num_kv_heads=2, tie_embeddings=False),
        dict(num_heads=6, num_kv_heads=2, head_dim=16, rope_theta=1e6, rms_norm_eps=1e-5),
    ],
    ids=["mha", "gqa2-untied", "gqa3-wide-heads-theta1e6"],
)
def test_logits_equal_transformers(overrides):
    config = small(**overrides)
    params = random_params(config)
    tokens = np.random.default_rng(0).integers(0, config.vocab_size, (2, 19))
    np.testing.assert_allclose(logits(params, tokens, config), hf_logits(params, tokens, config), atol=1e-4, rtol=1e-4)


def packed_example(config):
    """Two documents and padding in one row, and the documents alone."""
    rng = np.random.default_rng(1)
    first, second = rng.integers(0, config.vocab_size, 7), rng.integers(0, config.vocab_size, 5)
    tokens = np.concatenate([first, second, np.zeros(3, int)])[None]
    positions = np.concatenate([np.arange(7), np.arange(5), np.zeros(3, int)])[None]
    segments = np.concatenate([np.full(7, 1), np.full(5, 2), np.zeros(3, int)])[None]
    return first[None], second[None], tokens, positions, segments


def test_a_packed_row_equals_its_documents_alone_in_transformers():
    config = small()
    params = random_params(config)
    first, second, tokens, positions, segments = packed_example(config)
    packed = logits(params, tokens, config, positions, segments)
    np.testing.assert_allclose(packed[:, :7], hf_logits(params, first, config), atol=1e-4, rtol=1e-4)
    np.testing.assert_allclose(packed[:, 7:12], hf_logits(params, second, config), atol=1e-4, rtol=1e-4)
    assert np.isfinite(packed).all()


def test_remat_and_blockwise_change_no_gradient():
    config = small()
    params = random_params(config)
    _, _, tokens, positions, segments = packed_example(config)

    def loss(params, **options):
        x_BTD = qwen2.hidden_states(params, tokens, positions, segments, config, **options)
        return jnp.sum(jnp.square(x_BTD) * jnp.asarray(segments > 0)[..., None])

    expected = jax.jit(jax.grad(loss))(params)
    for options in (dict(remat="layer"), dict(remat="attention"), dict(placement=Placement(attention="blockwise"))):
        actual = jax.jit(jax.grad(functools.partial(loss, **options)))(params)
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-3, rtol=1e-3), actual, expected)


def test_hf_tensors_round_trip():
    config = small(tie_embeddings=False)
    params = random_params(config)
    back = hf.from_hf(hf.to_hf(params, config), config)
    jax.tree.map(np.testing.assert_array_equal, back, params)


def test_nnx_module_and_functions_agree():
    config = small()
    params = random_params(config)
    tokens = np.arange(6)[None]
    module = qwen2.Qwen2(config, params=params)
    positions, segments = np.arange(6)[None], np.ones((1, 6), np.int32)
    np.testing.assert_allclose(module(tokens, positions, segments), logits(params, tokens, config), atol=1e-5)


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
