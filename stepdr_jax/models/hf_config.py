"""config.json of Hugging Face's Qwen2, read into a Qwen2Config and written from one.

Versions of transformers before 5 write rope_theta and rope_scaling, later ones rope_parameters; both are read, and the
older form, which every version reads, is written.
"""

import json
import math
from pathlib import Path
from typing import Any

from stepdr_jax.models.qwen2 import Qwen2Config

FILE = "config.json"
_SHAPE = {
    "vocab_size": "vocab_size",
    "hidden_size": "hidden_size",
    "num_layers": "num_hidden_layers",
    "num_heads": "num_attention_heads",
    "intermediate_size": "intermediate_size",
}
# YaRN has more parameters than we have; each must be absent or what transformers assumes for Qwen2.5.
_YARN_DEFAULTS = {"beta_fast": 32, "beta_slow": 1, "mscale": None, "mscale_all_dim": None, "truncate": True}


def read_config(directory: Path) -> tuple[Qwen2Config | None, list[str]]:
    """(config in float32, what is wrong with config.json); the config is None when anything is."""
    try:
        their = json.loads((directory / FILE).read_text())
    except FileNotFoundError:
        return None, [f"{FILE} is missing"]
    except (OSError, ValueError) as error:
        return None, [f"{FILE} is not readable JSON ({error})"]
    if not isinstance(their, dict):
        return None, [f"{FILE} is not a JSON object"]
    if their.get("model_type") != "qwen2":
        return None, [f"{FILE}: expected model_type qwen2 (Qwen2 and Qwen2.5), got {their.get('model_type')!r}"]
    problems: list[str] = []
    shape = {ours: _positive(their, name, problems) for ours, name in _SHAPE.items()}
    kv_heads = _positive(their, "num_key_value_heads", problems, default=shape["num_heads"])
    head_dim = _positive(their, "head_dim", problems, default=_head_dim(shape, their, problems))
    eps = _positive(their, "rms_norm_eps", problems, kind=float)
    rope = _rope(their, problems)
    problems += _unsupported(their)
    if problems:
        return None, [f"{FILE}: {problem}" for problem in problems]
    try:
        config = Qwen2Config(
            **shape,
            **rope,
            num_kv_heads=kv_heads,
            head_dim=head_dim,
            rms_norm_eps=eps,
            tie_embeddings=bool(their.get("tie_word_embeddings", False)),
        )
    except ValueError as error:
        return None, [f"{FILE}: {error}"]
    return config, []


def write_config(config: Qwen2Config, *, dtype: str, max_position_embeddings: int | None = None) -> dict[str, Any]:
    """The content of config.json.

    Args:
        config: model shape.
        dtype: of the weights beside it.
        max_position_embeddings: longest sequence to declare; default the one that YaRN reaches, or original_context.
    """
    longest = max_position_embeddings or round(config.original_context * config.yarn_factor)
    yarn = {
        "type": "yarn",
        "rope_type": "yarn",
        "factor": config.yarn_factor,
        "original_max_position_embeddings": config.original_context,
    }
    return {
        "architectures": ["Qwen2ForCausalLM"],
        "model_type": "qwen2",
        **{theirs: getattr(config, ours) for ours, theirs in _SHAPE.items()},
        "num_key_value_heads": config.num_kv_heads,
        "head_dim": config.head_dim,
        "hidden_act": "silu",
        "rms_norm_eps": config.rms_norm_eps,
        "rope_theta": config.rope_theta,
        **({"rope_scaling": yarn} if config.yarn_factor > 1 else {}),
        "max_position_embeddings": longest,
        "tie_word_embeddings": config.tie_embeddings,
        "use_sliding_window": False,
        "max_window_layers": config.num_layers,
        "attention_dropout": 0.0,
        "initializer_range": 0.02,
        "use_cache": True,
        "torch_dtype": dtype,
    }


def _positive(their: dict, name: str, problems: list[str], *, kind: type = int, default: Any = None) -> Any:
    value = their.get(name)
    if value is None and default is not None:
        return default
    if isinstance(value, bool) or not isinstance(value, int if kind is int else (int, float)) or value <= 0:
        problems.append(f"expected {name} to be a positive {'integer' if kind is int else 'number'}, got {value!r}")
        return None
    return kind(value)


def _head_dim(shape: dict, their: dict, problems: list[str]) -> int | None:
    hidden, heads = shape["hidden_size"], shape["num_heads"]
    if their.get("head_dim") is not None or not hidden or not heads:
        return 1  # given, or another problem
    if hidden % heads:
        problems.append(
            f"hidden_size {hidden} is not a multiple of num_attention_heads {heads} and head_dim is not given"
        )
        return 1
    return hidden // heads


def _rope(their: dict, problems: list[str]) -> dict[str, Any]:
    """The rotary fields of a Qwen2Config."""
    forms = [their.get(name) or {} for name in ("rope_parameters", "rope_scaling")]
    if not all(isinstance(form, dict) for form in forms):
        problems.append(f"expected rope_parameters and rope_scaling to be objects, got {forms}")
        return {}
    scaling = forms[0] | forms[1]
    if any(isinstance(value, dict) for value in scaling.values()):
        problems.append("rope parameters that differ between layers are not supported")
        return {}
    theta = _positive({"rope_theta": their.get("rope_theta"), **scaling}, "rope_theta", problems, kind=float)
    kind = scaling.get("rope_type", scaling.get("type", "default"))
    if scaling.get("partial_rotary_factor", their.get("partial_rotary_factor")) not in (None, 1):
        problems.append("partial_rotary_factor other than 1 is not supported")
    if kind == "default":
        return {"rope_theta": theta}
    if kind != "yarn":
        problems.append(f"expected rope type default or yarn, got {kind!r}")
        return {}
    factor = _positive(scaling, "factor", problems, kind=float)
    trained = {"original_max_position_embeddings": their.get("max_position_embeddings"), **scaling}
    original = _positive(trained, "original_max_position_embeddings", problems)
    for name, default in _YARN_DEFAULTS.items():
        if scaling.get(name) not in (None, default):
            problems.append(f"yarn with {name} = {scaling[name]!r} is not supported; Qwen2.5 has {default}")
    amplitude = scaling.get("attention_factor")
    if amplitude is not None and factor and not math.isclose(amplitude, 0.1 * math.log(max(factor, 1)) + 1):
        problems.append(f"yarn with attention_factor = {amplitude!r} is not supported; leave it out")
    return {"rope_theta": theta, "yarn_factor": factor, "original_context": original}


def _unsupported(their: dict) -> list[str]:
    problems = []
    if their.get("hidden_act", "silu") != "silu":
        problems.append(f"expected hidden_act silu, got {their['hidden_act']!r}")
    if their.get("use_sliding_window") or "sliding_attention" in (their.get("layer_types") or ()):
        problems.append("sliding windows are not supported; expected use_sliding_window false")
    if their.get("quantization_config"):
        problems.append("quantised weights are not supported; take the checkpoint they were made from")
    return problems
