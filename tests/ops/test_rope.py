"""Rotary angles equal those of transformers' Qwen2, plain and stretched by YaRN."""

import jax.numpy as jnp
import numpy as np
import pytest

from stepdr_jax.ops import rope


def theirs(positions, head_dim, theta, factor, original_context):
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    parameters = {"rope_type": "default", "rope_theta": theta}
    if factor > 1:
        parameters |= {"rope_type": "yarn", "factor": factor, "original_max_position_embeddings": original_context}
    config = transformers.Qwen2Config(
        hidden_size=2 * head_dim,
        num_attention_heads=2,
        head_dim=head_dim,
        max_position_embeddings=int(factor * original_context),
        rope_parameters=parameters,
    )
    embedding = transformers.models.qwen2.modeling_qwen2.Qwen2RotaryEmbedding(config)
    cos, sin = embedding(torch.zeros(1), torch.from_numpy(positions))
    return cos[..., : head_dim // 2].numpy(), sin[..., : head_dim // 2].numpy()


@pytest.mark.parametrize(
    "head_dim, theta, factor, original_context",
    [
        (128, 1e6, 1.0, 32768),
        (128, 1e6, 4.0, 32768),  # Qwen2.5's own setting for 131,072 tokens
        (64, 1e6, 4.0, 32768),
        (16, 1e4, 2.0, 256),
        (8, 1e4, 40.0, 4),  # no pair turns even once in the original context
    ],
)
def test_tables_equal_transformers(head_dim, theta, factor, original_context):
    positions = np.array([[0, 1, 2, 63, 500, 1999]])
    actual = rope.rope_tables(
        jnp.asarray(positions), head_dim, theta, yarn_factor=factor, original_context=original_context
    )
    for ours, expected in zip(actual, theirs(positions, head_dim, theta, factor, original_context), strict=True):
        # A rate is rounded to float32 there and here: at most one unit, times the position.
        np.testing.assert_allclose(ours, expected, atol=2e-7 * positions.max(), rtol=0)


def test_yarn_at_its_far_end_stays_within_the_angles_of_training():
    """Pairs that turn less than once in the original context reach the same angle at the end of the stretched one."""
    original, factor, head_dim, theta = 32768, 4.0, 128, 1e6

    def at(position, **options):
        return rope.rope_tables(jnp.asarray([[position]]), head_dim, theta, **options)

    cos, sin = at(original)
    stretched_cos, stretched_sin = at(int(original * factor), yarn_factor=factor, original_context=original)
    slow = np.arange(head_dim // 2) >= 40  # theta^(-40/64) * 32768 = 5.8 radians
    amplitude = 1.138629436111989  # 0.1 ln 4 + 1
    np.testing.assert_allclose(stretched_cos[..., slow], amplitude * cos[..., slow], atol=1e-4)
    np.testing.assert_allclose(stretched_sin[..., slow], amplitude * sin[..., slow], atol=1e-4)
