"""All attention backends agree, in values and gradients, on packed rows with padding."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from stepdr_jax.ops import attention as module
from stepdr_jax.ops.attention import attention


def packed(T, heads, kv_heads, seed=0):
    rng = np.random.default_rng(seed)
    q, k, v = (jnp.asarray(rng.normal(size=(2, T, n, 8)), jnp.float32) for n in (heads, kv_heads, kv_heads))
    segments = np.zeros((2, T), np.int32)
    positions = np.zeros((2, T), np.int32)
    for row, lengths in enumerate([(T // 2, T // 4), (T // 3, T - T // 3)]):
        at = 0
        for number, length in enumerate(lengths, 1):
            segments[row, at : at + length] = number
            positions[row, at : at + length] = np.arange(length)
            at += length
    return q, k, v, jnp.asarray(positions), jnp.asarray(segments)


def run(q, k, v, positions, segments, **options):
    return attention(
        q,
        k,
        v,
        query_positions_BT=positions,
        key_positions_BS=positions,
        query_segments_BT=segments,
        key_segments_BS=segments,
        **options,
    )


def dense(q, k, v, positions, segments):
    """Written again, one row and one head at a time, in numpy."""
    q, k, v, positions, segments = map(np.asarray, (q, k, v, positions, segments))
    out = np.zeros(q.shape)
    group = q.shape[2] // k.shape[2]
    for b in range(q.shape[0]):
        for h in range(q.shape[2]):
            scores = q[b, :, h] @ k[b, :, h // group].T / np.sqrt(q.shape[-1])
            allowed = (segments[b][:, None] == segments[b][None]) & (positions[b][:, None] >= positions[b][None])
            weights = np.where(allowed, np.exp(scores), 0.0)
            out[b, :, h] = weights / weights.sum(-1, keepdims=True) @ v[b, :, h // group]
    return out


@pytest.mark.parametrize("heads, kv_heads", [(4, 4), (4, 2), (3, 1)])
def test_reference_equals_numpy(heads, kv_heads):
    example = packed(24, heads, kv_heads)
    np.testing.assert_allclose(run(*example, backend="reference"), dense(*example), atol=1e-5)


@pytest.mark.parametrize(
    "T, options",
    [
        (24, dict(backend="prefix", in_order=True)),
        (150, dict(backend="prefix", in_order=True)),
        (24, dict(backend="blockwise", block=8)),
        (29, dict(backend="blockwise", block=8)),
        (24, dict(backend="blockwise", block=8, in_order=True)),
        (29, dict(backend="blockwise", block=8, in_order=True)),
    ],
    ids=[
        "prefix-one-tile",
        "prefix-ragged",
        "blockwise",
        "blockwise-ragged",
        "blockwise-rows",
        "blockwise-rows-ragged",
    ],
)
def test_backends_equal_reference_in_values_and_gradients(T, options):
    q, k, v, positions, segments = packed(T, 4, 2)
    real = np.asarray(segments > 0)[..., None, None]

    def loss(q, k, v, **options):
        return jnp.sum(jnp.sin(run(q, k, v, positions, segments, **options)) * real)

    def differentiate(**options):
        return jax.jit(jax.value_and_grad(functools.partial(loss, **options), (0, 1, 2)))(q, k, v)

    expected, actual = differentiate(backend="reference"), differentiate(**options)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-5, rtol=1e-4), actual, expected)


def test_blockwise_follows_positions_not_row_order():
    q, k, v, positions, segments = packed(32, 4, 2)
    expected = run(q, k, v, positions, segments, backend="reference")
    shuffle = np.random.default_rng(3).permutation(32)
    shuffled = run(*(a[:, shuffle] for a in (q, k, v, positions, segments)), backend="blockwise", block=8)
    np.testing.assert_allclose(shuffled, expected[:, shuffle], atol=1e-5)


@pytest.mark.parametrize(
    "message, options",
    [
        ("prefix, got in_order=False", dict(backend="prefix")),
        ("splash, got in_order=False", dict(backend="splash")),
        ("multiples of 128 tokens .* got 8", dict(backend="splash", in_order=True)),
        ("expected a GPU for attention backend cudnn, got cpu", dict(backend="cudnn")),
        ("expected attention backend auto, reference", dict(backend="flash")),
    ],
)
def test_backends_refuse_what_they_cannot_do(message, options):
    with pytest.raises(ValueError, match=message):
        run(*packed(8, 4, 2), **options)


def test_backend_that_auto_takes(monkeypatch):
    """By device, order and length."""

    def chosen(device, length, in_order=True, dtype=jnp.bfloat16):
        monkeypatch.setattr(module, "platform", lambda: device)
        x = jax.ShapeDtypeStruct((1, length, 4, 64), dtype)
        return module._choose(x, x, in_order)

    assert [chosen("cpu", n) for n in (256, 2048)] == ["prefix", "blockwise"]
    assert [chosen("cpu", n, in_order=False) for n in (256, 2048)] == ["reference", "blockwise"]
    assert [chosen("tpu", n) for n in (256, 2048, 2050)] == ["splash", "splash", "blockwise"]
    assert [chosen("gpu", n) for n in (2048, 32768)] == ["cudnn", "blockwise"]
    assert chosen("gpu", 2048, dtype=jnp.float32) == "blockwise"


@pytest.mark.parametrize("options", [dict(backend="blockwise"), dict(backend="blockwise", in_order=True)])
def test_remat_policy_that_keeps_the_output_spares_the_second_forward_pass(options):
    q, k, v, positions, segments = packed(16, 4, 2)

    def loops(names):
        policy = jax.checkpoint_policies.save_only_these_names(*names)
        layer = jax.checkpoint(lambda q: jnp.sin(run(jnp.sin(q), k, v, positions, segments, **options)), policy=policy)
        return jax.jit(jax.value_and_grad(lambda q: jnp.sum(layer(q)))).lower(q).as_text().count("stablehlo.while")

    forward = 2  # over tiles of queries, over tiles of keys
    assert loops(["attention_out", "attention_lse"]) == loops([]) - forward
