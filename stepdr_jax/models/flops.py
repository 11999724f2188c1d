"""What training costs in arithmetic: FLOPs that the mathematics asks for, and the peak of the devices that do it."""

import jax

from stepdr_jax.models.qwen2 import Qwen2Config
from stepdr_jax.sharding import hardware


def layer_parameters(model: Qwen2Config) -> int:
    """Of the kernels of one layer."""
    D, K = model.hidden_size, model.head_dim
    return D * K * (2 * model.num_heads + 2 * model.num_kv_heads) + 3 * D * model.intermediate_size


def training_flops(model: Qwen2Config, *, tokens: float, pairs: float) -> float:
    """FLOPs of forward and backward: 6 per kernel parameter and token, 12 per head dimension, layer and pair.

    The embedding is a look-up and recomputation is not counted, as in PaLM's definition of MFU (arXiv 2204.02311,
    appendix B); attention counts only pairs that the causal mask and the segments let through.

    Args:
        tokens: that are not padding.
        pairs: (query, key) pairs inside segments: the sum over tokens of their position + 1.
    """
    kernels = model.num_layers * layer_parameters(model) + model.hidden_size * model.vocab_size
    return 6 * kernels * tokens + 12 * model.num_heads * model.head_dim * model.num_layers * pairs


def peak_flops(devices: list[jax.Device]) -> float | None:
    """Peak bfloat16 FLOP/s of all devices together; None where the kind of device is not known (CPUs)."""
    peak = hardware.peak_flops(devices[0].device_kind)
    return None if peak is None else peak * len(devices)
