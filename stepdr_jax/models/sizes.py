"""The published shapes of Qwen2.5, from 0.5B to 72B (arXiv 2412.15115, table 1, and the config.json of each base
model).

Activations are bfloat16 and parameters float32, as in training; `dataclasses.replace` changes that, or stretches the
context by YaRN. The vocabulary is the padded one of the embedding: 151,665 ids are in use.
"""

import math

import jax

from stepdr_jax.errors import UserError
from stepdr_jax.models.qwen2 import Qwen2Config, param_shapes


def _size(hidden, layers, heads, kv_heads, intermediate, *, head_dim=128, tied=False, eps=1e-6) -> Qwen2Config:
    return Qwen2Config(
        vocab_size=151936 if tied else 152064,
        hidden_size=hidden,
        num_layers=layers,
        num_heads=heads,
        num_kv_heads=kv_heads,
        head_dim=head_dim,
        intermediate_size=intermediate,
        rope_theta=1e6,
        rms_norm_eps=eps,
        tie_embeddings=tied,
        dtype="bfloat16",
        param_dtype="float32",
    )


# eps is that of the base models: from 14B on it is 1e-5 there and 1e-6 in the instruction-tuned ones.
SIZES = {
    "0.5B": _size(896, 24, 14, 2, 4864, head_dim=64, tied=True),
    "1.5B": _size(1536, 28, 12, 2, 8960, tied=True),
    "3B": _size(2048, 36, 16, 2, 11008, tied=True),
    "7B": _size(3584, 28, 28, 4, 18944),
    "14B": _size(5120, 48, 40, 8, 13824, eps=1e-5),
    "32B": _size(5120, 64, 40, 8, 27648, eps=1e-5),
    "72B": _size(8192, 80, 64, 8, 29568, eps=1e-5),
}


def size(name: str) -> Qwen2Config:
    """The config of a size by its name in SIZES, in either case. Raises UserError that lists the names."""
    wanted = name.upper()
    if wanted not in SIZES:
        raise UserError(f"expected a size of Qwen2.5 ({', '.join(SIZES)}), got {name!r}")
    return SIZES[wanted]


def parameter_count(config: Qwen2Config, *, embeddings: bool = True) -> int:
    """Parameters of a model, with or without embedding and unembedding; allocates nothing."""
    shapes = param_shapes(config)
    counted = [shapes["layers"], shapes["final_norm"]]
    if embeddings:
        counted += [shapes["embedding"], shapes.get("unembedding", ())]
    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(counted))
