"""The Qwen2.5 decoder as pure functions on a parameter tree, shared by trainer and sampler, and its NNX wrapper.

Parameters are a nested dict; every leaf under "layers" has a leading layer axis from initialization to disk:

    embedding [V, D]                 unembedding [V, D] (absent when embeddings are tied)
    final_norm [D]
    layers: attention_norm [L, D]    q_kernel [L, D, H*K]   q_bias [L, H*K]    k_*, v_* [L, D, N*K] [L, N*K]
            output_kernel [L, H*K, D]
            mlp_norm [L, D]          gate_kernel, up_kernel [L, D, F]          down_kernel [L, F, D]

Shape suffixes: B sequences, T tokens (of queries), H query heads, N key-value heads, K head dimension, D model width,
V vocabulary, k = K / 2.
"""

import dataclasses

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name

from stepdr_jax.ops.dense import dense
from stepdr_jax.ops.rope import apply_rope, rope_tables
from stepdr_jax.sharding.placement import WHOLE, Placement

_POLICIES = jax.checkpoint_policies
# What a layer keeps for the backward pass; all else is computed again. `attention` spares the second pass of the
# attention kernel (and of its ring); `offload` keeps the layer's input in the host's memory.
REMAT = {
    "none": None,
    "layer": _POLICIES.nothing_saveable,
    "attention": _POLICIES.save_only_these_names("attention_out", "attention_lse"),
    "offload": _POLICIES.save_and_offload_only_these_names(
        names_which_can_be_saved=[],
        names_which_can_be_offloaded=["layer_input"],
        offload_src="device",
        offload_dst="pinned_host",
    ),
}
UNROLLED_LAYERS = 4  # up to here layers are unrolled: stacking what the scan saves costs a tenth of a tiny model's step


@dataclasses.dataclass(frozen=True)
class Qwen2Config:
    """Shape and numerics of a decoder; hashable, so it can be a static argument of jit.

    dtype is the type of activations and matrix products, param_dtype that of stored parameters; norms, rotary angles,
    attention scores and the vocabulary loss are float32 whatever they are.
    """

    vocab_size: int
    hidden_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    intermediate_size: int
    rope_theta: float
    rms_norm_eps: float
    tie_embeddings: bool
    dtype: str = "float32"
    param_dtype: str = "float32"
    yarn_factor: float = 1.0  # above 1, rotary angles are stretched by YaRN to original_context * yarn_factor tokens
    original_context: int = 32768  # Qwen2.5's trained length, which YaRN starts from

    def __post_init__(self):
        if self.num_heads % self.num_kv_heads:
            raise ValueError(
                f"expected num_heads to be a multiple of num_kv_heads, got {self.num_heads} and {self.num_kv_heads}"
            )
        if self.yarn_factor < 1:
            raise ValueError(f"expected yarn_factor of at least 1, got {self.yarn_factor}")
        if self.head_dim % 2:
            raise ValueError(f"expected an even head_dim for rotary positions, got {self.head_dim}")

    @classmethod
    def from_config(cls, model, vocab_size: int) -> "Qwen2Config":
        """Builds from `config.model` (an ml_collections.ConfigDict) and the tokenizer's size."""
        return cls(vocab_size=vocab_size, **dict(model))


def param_shapes(config: Qwen2Config) -> dict:
    """The parameter tree as jax.ShapeDtypeStruct leaves: the one declaration that initialization and loading follow."""
    c = config
    L, D, F, V = c.num_layers, c.hidden_size, c.intermediate_size, c.vocab_size
    heads, kv = c.num_heads * c.head_dim, c.num_kv_heads * c.head_dim
    shapes = {
        "embedding": (V, D),
        "final_norm": (D,),
        "layers": {
            "attention_norm": (L, D),
            "q_kernel": (L, D, heads),
            "q_bias": (L, heads),
            "k_kernel": (L, D, kv),
            "k_bias": (L, kv),
            "v_kernel": (L, D, kv),
            "v_bias": (L, kv),
            "output_kernel": (L, heads, D),
            "mlp_norm": (L, D),
            "gate_kernel": (L, D, F),
            "up_kernel": (L, D, F),
            "down_kernel": (L, F, D),
        },
    }
    if not c.tie_embeddings:
        shapes["unembedding"] = (V, D)
    dtype = jnp.dtype(c.param_dtype)
    return jax.tree.map(lambda s: jax.ShapeDtypeStruct(s, dtype), shapes, is_leaf=lambda s: isinstance(s, tuple))


def init_params(config: Qwen2Config, key: jax.Array) -> dict:
    """Random parameters: norms one, biases zero, the rest normal with deviation 0.02 (Qwen2's initializer_range).

    Projections that write to the residual stream are divided by sqrt(2 L), so its size does not grow with depth. Those
    of queries and keys have a deviation of at least 0.5 / sqrt(D): with 0.02 a narrow model's attention starts uniform
    and, by the seed's luck, may stay so for a thousand steps (docs/benchmarks.md).
    """
    leaves, tree = jax.tree_util.tree_flatten_with_path(param_shapes(config))
    keys = jax.random.split(key, len(leaves))

    def leaf(path, shape, key):
        name = path[-1].key
        if name.endswith("norm"):
            return jnp.ones(shape.shape, shape.dtype)
        if name.endswith("bias"):
            return jnp.zeros(shape.shape, shape.dtype)
        scale = 0.02
        if name in ("output_kernel", "down_kernel"):
            scale /= (2 * config.num_layers) ** 0.5
        if name in ("q_kernel", "k_kernel"):
            scale = max(scale, 0.5 / config.hidden_size**0.5)
        return (scale * jax.random.normal(key, shape.shape, jnp.float32)).astype(shape.dtype)

    return jax.tree.unflatten(tree, [leaf(path, shape, k) for (path, shape), k in zip(leaves, keys, strict=True)])


def unembedding(params: dict) -> jax.Array:
    """w_VD: logits are hidden states @ w_VD.T; the embedding itself where they are tied."""
    return params.get("unembedding", params["embedding"])


def forward(
    params: dict, config: Qwen2Config, tokens_BT: jax.Array, positions_BT: jax.Array, segment_ids_BT: jax.Array
) -> jax.Array:
    """float32 logits_BTV of packed rows. Holds all of them at once: for inspection and tests, not for training."""
    x_BTD = hidden_states(params, tokens_BT, positions_BT, segment_ids_BT, config)
    w_VD = unembedding(params).astype(x_BTD.dtype)
    return jnp.einsum("BTD,VD->BTV", x_BTD, w_VD, preferred_element_type=jnp.float32)


def hidden_states(
    params: dict,
    tokens_BT: jax.Array,
    positions_BT: jax.Array,
    segment_ids_BT: jax.Array,
    config: Qwen2Config,
    *,
    placement: Placement = WHOLE,
    remat: str = "none",
) -> jax.Array:
    """Final hidden states x_BTD (after the last norm) of packed rows.

    Args:
        params: tree of `param_shapes`; under shard_map this device's parts, as `placement` describes them.
        tokens_BT: int32 ids.
        positions_BT: int32 positions inside each segment.
        segment_ids_BT: int32; tokens attend causally within their segment, 0 is padding.
        config: model shape.
        placement: this device's part; the default computes the whole.
        remat: what is kept of each layer for the backward pass, one of REMAT.
    """
    dtype = jnp.dtype(config.dtype)
    cos_BTk, sin_BTk = rotary(positions_BT, config)
    x_BTD = placement.embed(params["embedding"], tokens_BT, dtype)

    def layer(x_BTD, w):
        x_BTD = checkpoint_name(x_BTD, "layer_input")
        w = placement.layer(w, dtype)
        q_BTHK, k_BTNK, v_BTNK = project_qkv(x_BTD, w, cos_BTk, sin_BTk, config, placement)
        o_BTHK = placement.attend(q_BTHK, k_BTNK, v_BTNK, positions_BT, segment_ids_BT)
        x_BTD = x_BTD + attention_output(o_BTHK, w, placement)
        return x_BTD + mlp(x_BTD, w, config, placement), None

    body = layer if remat == "none" else jax.checkpoint(layer, policy=REMAT[remat], prevent_cse=False)
    x_BTD, _ = jax.lax.scan(body, x_BTD, params["layers"], unroll=config.num_layers <= UNROLLED_LAYERS)
    return rms_norm(x_BTD, params["final_norm"], config.rms_norm_eps)


def rotary(positions_BT: jax.Array, config: Qwen2Config) -> tuple[jax.Array, jax.Array]:
    """(cos, sin) of the rotary angles, float32[B, T, K/2] each; computed once for all layers."""
    return rope_tables(
        positions_BT,
        config.head_dim,
        config.rope_theta,
        yarn_factor=config.yarn_factor,
        original_context=config.original_context,
    )


def project_qkv(x_BTD, w, cos_BTk, sin_BTk, config, placement: Placement = WHOLE):
    """Normed, projected and rotated (q_BTHK, k_BTNK, v_BTNK) of one layer, whose gathered parameters are `w`."""
    B, T, _ = x_BTD.shape
    h_BTD = placement.enter(rms_norm(x_BTD, w["attention_norm"], config.rms_norm_eps))

    def project(name):  # to the heads that are here
        projected = dense(h_BTD, w[f"{name}_kernel"]) + w[f"{name}_bias"].astype(h_BTD.dtype)
        return projected.reshape(B, T, -1, config.head_dim)

    return apply_rope(project("q"), cos_BTk, sin_BTk), apply_rope(project("k"), cos_BTk, sin_BTk), project("v")


def attention_output(o_BTHK, w, placement: Placement = WHOLE):
    """What attention adds to the residual stream."""
    return placement.leave(dense(o_BTHK.reshape(*o_BTHK.shape[:2], -1), w["output_kernel"]))


def mlp(x_BTD, w, config, placement: Placement = WHOLE):
    """What the gated MLP adds to the residual stream."""
    h_BTD = placement.enter(rms_norm(x_BTD, w["mlp_norm"], config.rms_norm_eps))
    return placement.leave(
        dense(jax.nn.silu(dense(h_BTD, w["gate_kernel"])) * dense(h_BTD, w["up_kernel"]), w["down_kernel"])
    )


def rms_norm(x, scale, eps):
    """x / rms(x) * scale over the last axis, in float32; the result has x's dtype."""
    x32 = x.astype(jnp.float32)
    normal = x32 * jax.lax.rsqrt(jnp.mean(x32 * x32, axis=-1, keepdims=True) + eps)
    return (normal * scale.astype(jnp.float32)).astype(x.dtype)


class Qwen2(nnx.Module):
    """NNX wrapper of the functions above: holds the same tree as nnx.Param leaves."""

    def __init__(self, config: Qwen2Config, *, rngs: nnx.Rngs | None = None, params: dict | None = None):
        """Takes `params` as given, or initializes them from rngs.params()."""
        if params is None:
            if rngs is None:
                raise ValueError("expected rngs or params, got neither")
            params = init_params(config, rngs.params())
        self.config = config
        self.params = nnx.data(jax.tree.map(nnx.Param, params))

    def tree(self) -> dict:
        """The plain parameter tree, for the pure functions."""
        return jax.tree.map(lambda p: p[...], self.params, is_leaf=lambda p: isinstance(p, nnx.Param))

    def __call__(self, tokens_BT: jax.Array, positions_BT: jax.Array, segment_ids_BT: jax.Array) -> jax.Array:
        """float32 logits_BTV; see `forward`."""
        return forward(self.tree(), self.config, tokens_BT, positions_BT, segment_ids_BT)
