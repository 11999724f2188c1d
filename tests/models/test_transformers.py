"""Logits and gradients equal those of transformers' Qwen2 over the family, and weights survive a visit there bit for
bit."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from stepdr_jax.models import hf, qwen2

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

DOCUMENTS = (11, 6, 4, 19)  # tokens; ours has the first three in one row, theirs each in a padded row of its own
ROW = 24


def their_model(*, seed=0, yarn=0.0, **shape):
    """A Qwen2 with weights so large that every one of them matters."""
    rope = {"rope_type": "default", "rope_theta": 1e4}
    if yarn:
        rope |= {"rope_type": "yarn", "factor": yarn, "original_max_position_embeddings": 8}
    settings = dict(vocab_size=97, hidden_size=32, num_hidden_layers=2, intermediate_size=44, rope_parameters=rope)
    torch.manual_seed(seed)
    model = transformers.Qwen2ForCausalLM(transformers.Qwen2Config(**(settings | shape))).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.normal_(1.0 if name.endswith("norm.weight") else 0.0, 0.15)
    return model


def documents():
    rng = np.random.default_rng(0)
    return [rng.integers(0, 97, length) for length in DOCUMENTS]


def packed():
    """(tokens, positions, segments)[2, ROW]: three documents and padding, then one document and padding."""
    tokens, positions, segments = np.zeros((3, 2, ROW), np.int32)
    start = 0
    for number, ids in enumerate(documents()[:3], 1):
        here = slice(start, start + len(ids))
        tokens[0, here], positions[0, here], segments[0, here] = ids, np.arange(len(ids)), number
        start += len(ids)
    last = documents()[3]
    here = slice(0, len(last))
    tokens[1, here], positions[1, here], segments[1, here] = last, np.arange(len(last)), 1
    return tokens, positions, segments


def their_logits_and_gradient(model, directory):
    """Logits of each document and the gradient of the summed next-token loss, in our tree."""
    longest = max(DOCUMENTS)
    ids = np.stack([np.pad(tokens, (0, longest - len(tokens))) for tokens in documents()])
    mask = np.stack([np.arange(longest) < length for length in DOCUMENTS]).astype(int)
    labels = torch.from_numpy(np.where(mask, ids, -100))
    logits = model(input_ids=torch.from_numpy(ids), attention_mask=torch.from_numpy(mask)).logits
    loss = torch.nn.functional.cross_entropy(
        logits[:, :-1].reshape(-1, logits.shape[-1]), labels[:, 1:].reshape(-1), reduction="sum"
    )
    loss.backward()
    with torch.no_grad():  # the gradient in the place of the weights reads as a checkpoint
        for parameter in model.parameters():
            parameter.copy_(parameter.grad)
    model.save_pretrained(directory)
    return [logits[i, :length].detach().numpy() for i, length in enumerate(DOCUMENTS)], hf.load(directory)[1]


def our_logits_and_gradient(config, params):
    tokens, positions, segments = packed()
    follows = (segments[:, 1:] == segments[:, :-1]) & (segments[:, 1:] > 0)

    def loss(params):
        logits_BTV = qwen2.forward(params, config, tokens, positions, segments)
        logprobs = jax.nn.log_softmax(logits_BTV[:, :-1])
        chosen = jnp.take_along_axis(logprobs, tokens[:, 1:, None], axis=-1)[..., 0]
        return -jnp.sum(chosen * follows), logits_BTV

    (_, logits_BTV), gradient = jax.jit(jax.value_and_grad(loss, has_aux=True))(params)
    assert np.isfinite(logits_BTV).all()
    per_document = [np.asarray(logits_BTV[0][segments[0] == number]) for number in (1, 2, 3)]
    return [*per_document, np.asarray(logits_BTV[1][segments[1] == 1])], gradient


@pytest.mark.parametrize(
    "shape",
    [
        dict(num_attention_heads=7, num_key_value_heads=7, hidden_size=56, tie_word_embeddings=True),
        dict(num_attention_heads=6, num_key_value_heads=3, head_dim=8, tie_word_embeddings=False, yarn=4.0),
        dict(num_attention_heads=9, num_key_value_heads=3, head_dim=4, tie_word_embeddings=True, yarn=2.5),
        dict(num_attention_heads=4, num_key_value_heads=1, tie_word_embeddings=False, num_hidden_layers=1),
        dict(num_attention_heads=5, num_key_value_heads=1, head_dim=16, tie_word_embeddings=False),
        dict(num_attention_heads=6, num_key_value_heads=1, head_dim=8, tie_word_embeddings=True, num_hidden_layers=1),
        dict(num_attention_heads=14, num_key_value_heads=2, hidden_size=56, tie_word_embeddings=True, yarn=4.0),
        dict(num_attention_heads=8, num_key_value_heads=1, tie_word_embeddings=False, num_hidden_layers=5),
    ],
    ids=lambda shape: (
        f"{shape['num_attention_heads']}-heads-{shape['num_key_value_heads']}-kv"
        + ("-tied" if shape["tie_word_embeddings"] else "")
        + ("-yarn" if shape.get("yarn") else "")
    ),
)
def test_logits_and_gradients_equal_transformers(shape, tmp_path):
    model = their_model(**shape)
    model.save_pretrained(tmp_path / "weights")
    config, params = hf.load(tmp_path / "weights")
    ours, our_gradient = our_logits_and_gradient(config, params)
    theirs, their_gradient = their_logits_and_gradient(model, tmp_path / "gradient")
    for actual, expected in zip(ours, theirs, strict=True):
        np.testing.assert_allclose(actual, expected, atol=1e-4, rtol=1e-4)
    for (path, actual), expected in zip(
        jax.tree_util.tree_leaves_with_path(our_gradient), jax.tree.leaves(their_gradient), strict=True
    ):
        assert np.abs(expected).max() > 0.01, path  # nothing is compared with zeros
        np.testing.assert_allclose(actual, expected, atol=1e-4, rtol=1e-4, err_msg=jax.tree_util.keystr(path))


@pytest.mark.parametrize(
    ("dtype", "tied"), [("float32", False), ("bfloat16", True)], ids=["float32-untied", "bfloat16-tied"]
)
def test_weights_come_back_from_transformers_bit_for_bit(dtype, tied, tmp_path):
    config = qwen2.Qwen2Config(
        vocab_size=61,
        hidden_size=30,
        num_layers=3,
        num_heads=5,
        num_kv_heads=1,
        head_dim=6,
        intermediate_size=40,
        rope_theta=1e6,
        rms_norm_eps=1e-5,
        tie_embeddings=tied,
        dtype=dtype,
        param_dtype=dtype,
        yarn_factor=4.0,
        original_context=64,
    )
    params = qwen2.init_params(config, jax.random.key(0))
    hf.save(config, params, tmp_path / "ours", max_shard_bytes=10_000)
    assert len(list((tmp_path / "ours").glob("*.safetensors"))) > 2
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "ours", dtype="auto")
    assert str(model.dtype) == f"torch.{dtype}"
    model.save_pretrained(tmp_path / "theirs")
    back_config, back = hf.load(tmp_path / "theirs")
    assert back_config == config
    for actual, expected in zip(jax.tree.leaves(back), jax.tree.leaves(params), strict=True):
        assert actual.dtype == expected.dtype
        np.testing.assert_array_equal(actual, expected)
