"""Names and shapes of Hugging Face Qwen2 checkpoints, mapped to our parameter tree and back.

A kernel is stored [out, in] there and [in, out] here; layers are separate tensors there and one stacked array here.
"""

from collections.abc import Mapping

import numpy as np

from stepdr_jax.errors import UserError
from stepdr_jax.models.qwen2 import Qwen2Config

# our leaf under "layers" -> (name inside `model.layers.<i>.`, transposed)
LAYER_NAMES = {
    "attention_norm": ("input_layernorm.weight", False),
    "q_kernel": ("self_attn.q_proj.weight", True),
    "q_bias": ("self_attn.q_proj.bias", False),
    "k_kernel": ("self_attn.k_proj.weight", True),
    "k_bias": ("self_attn.k_proj.bias", False),
    "v_kernel": ("self_attn.v_proj.weight", True),
    "v_bias": ("self_attn.v_proj.bias", False),
    "output_kernel": ("self_attn.o_proj.weight", True),
    "mlp_norm": ("post_attention_layernorm.weight", False),
    "gate_kernel": ("mlp.gate_proj.weight", True),
    "up_kernel": ("mlp.up_proj.weight", True),
    "down_kernel": ("mlp.down_proj.weight", True),
}
TOP_NAMES = {
    "embedding": ("model.embed_tokens.weight", False),
    "final_norm": ("model.norm.weight", False),
    "unembedding": ("lm_head.weight", True),
}


def from_hf(tensors: Mapping[str, np.ndarray], config: Qwen2Config) -> dict:
    """Stacks a Qwen2 state dict into our tree (numpy, config.param_dtype). A missing tensor is a UserError naming it."""

    def take(name, transposed):
        if name not in tensors:
            raise UserError(f"expected tensor {name} in the checkpoint, got none; is it a Qwen2 or Qwen2.5 checkpoint?")
        array = np.asarray(tensors[name])
        return array.T if transposed else array

    def layer(name, transposed):
        return np.stack([take(f"model.layers.{i}.{name}", transposed) for i in range(config.num_layers)])

    top = [name for name in TOP_NAMES if name != "unembedding" or not config.tie_embeddings]
    params = {name: np.array(take(*TOP_NAMES[name])) for name in top}
    params["layers"] = {ours: layer(*theirs) for ours, theirs in LAYER_NAMES.items()}
    return _cast(params, config.param_dtype)


def to_hf(params: dict, config: Qwen2Config) -> dict[str, np.ndarray]:
    """The inverse of `from_hf`: contiguous arrays under Hugging Face names."""
    tensors = {}
    for ours, (name, transposed) in TOP_NAMES.items():
        if ours in params:
            array = np.asarray(params[ours])
            tensors[name] = np.ascontiguousarray(array.T if transposed else array)
    for ours, (name, transposed) in LAYER_NAMES.items():
        stacked = np.asarray(params["layers"][ours])
        for i in range(config.num_layers):
            tensors[f"model.layers.{i}.{name}"] = np.ascontiguousarray(stacked[i].T if transposed else stacked[i])
    return tensors


def _cast(tree, dtype):
    if isinstance(tree, dict):
        return {name: _cast(leaf, dtype) for name, leaf in tree.items()}
    return tree.astype(dtype)
