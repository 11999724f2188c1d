"""What the speed comparisons share: measuring in turns, and the same weights in transformers and in Tunix.

Peers live in this process: ours and theirs have the same threads, allocator and moments of a busy machine. Tunix (the
only JAX stack with a learned critic in its PPO) is not among the project's dependencies: `pip install
google-tunix==0.1.7` in an environment of its own beside them, because it moves transformers to another version.
"""

import dataclasses
import os
import statistics
import time
from collections.abc import Callable

from stepdr_jax.errors import UserError

TUNIX = "0.1.7"


@dataclasses.dataclass
class Times:
    """Seconds of each round of one side: on the clock, and of processors (which other processes' work adds less to)."""

    wall: list[float] = dataclasses.field(default_factory=list)
    processor: list[float] = dataclasses.field(default_factory=list)


def in_turns(sides: dict[str, Callable[[], object]], rounds: int) -> dict[str, Times]:
    """Times of each side, round by round, after one round that compiles."""
    times = {name: Times() for name in sides}
    for work in sides.values():
        work()
    for _ in range(rounds):
        for name, work in sides.items():
            wall, processor = time.perf_counter(), time.process_time()
            work()
            times[name].wall.append(time.perf_counter() - wall)
            times[name].processor.append(time.process_time() - processor)
    return times


def ratios(times: dict[str, Times]) -> dict:
    """How many times as long as "ours" each other side takes: by medians on the clock and of processor time, and least
    and most of the rounds on the clock."""
    ours = times["ours"]
    return {
        name: {
            "clock": round(statistics.median(t.wall) / statistics.median(ours.wall), 2),
            "processor": round(statistics.median(t.processor) / statistics.median(ours.processor), 2),
            "rounds": [round(pick(a / b for a, b in zip(t.wall, ours.wall, strict=True)), 2) for pick in (min, max)],
        }
        for name, t in times.items()
        if name != "ours"
    }


def comparison(amount: float, times: dict[str, Times], digits: int = 0) -> dict:
    """Amount per second of each side by its median, and at best, and `ratios`."""
    speed = {name: round(amount / statistics.median(t.wall), digits or None) for name, t in times.items()}
    best = {name: round(amount / min(t.wall), digits or None) for name, t in times.items()}
    return speed | {"best": best, "ratio": ratios(times)}


def conditions(rounds: int) -> dict:
    """What a figure should say about the machine it was taken on."""
    return {"threads": threads(), "rounds": rounds, "load": round(os.getloadavg()[0], 1)}


def threads() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def ten_million(config):
    """The config with a model of 10 million parameters: eight layers of width 256, 16,384 words."""
    config = config.copy_and_resolve_references()
    shape = dict(hidden_size=256, num_layers=8, num_heads=8, num_kv_heads=2, head_dim=32, intermediate_size=768)
    with config.unlocked():
        config.model.update(shape)
        config.tokenizer.vocab_size = 16384
    return config


# ------------------------------------------------------------------------------------------------------ transformers


def transformers_model(config, *, use_cache: bool):
    """(torch, a Qwen2ForCausalLM of config.model with random weights)."""
    try:
        import torch
        import transformers
    except ImportError as error:
        raise UserError(f"the comparison needs {error.name}; pip install torch transformers") from None
    torch.set_num_threads(threads())
    m = config.model
    settings = transformers.Qwen2Config(
        vocab_size=config.tokenizer.vocab_size,
        hidden_size=m.hidden_size,
        num_hidden_layers=m.num_layers,
        num_attention_heads=m.num_heads,
        num_key_value_heads=m.num_kv_heads,
        head_dim=m.head_dim,
        intermediate_size=m.intermediate_size,
        rope_parameters={"rope_type": "default", "rope_theta": m.rope_theta},
        rms_norm_eps=m.rms_norm_eps,
        tie_word_embeddings=m.tie_embeddings,
        use_cache=use_cache,
        bos_token_id=None,
        eos_token_id=None,
    )
    return torch, transformers.Qwen2ForCausalLM(settings)


def transformers_sampler(config, params):
    """(torch, the model with our weights, ready to generate)."""
    from stepdr_jax.models import hf
    from stepdr_jax.models.qwen2 import Qwen2Config

    ours = Qwen2Config.from_config(config.model, config.tokenizer.vocab_size)
    tensors = dict(hf.tensors(ours, params))
    torch, model = transformers_model(config, use_cache=True)
    model.eval()
    model.load_state_dict({name: torch.from_numpy(array.copy()) for name, array in tensors.items()}, strict=False)
    return torch, model


def faster_threads(torch, work: Callable[[], object]) -> None:
    """Leaves torch with all threads or with one, whichever is faster: on busy cores its threads wait for each other."""
    seconds = {}
    for count in {1, threads()}:
        torch.set_num_threads(count)
        work()
        began = time.perf_counter()
        work()
        seconds[count] = time.perf_counter() - began
    torch.set_num_threads(min(seconds, key=seconds.get))


# ------------------------------------------------------------------------------------------------------------- Tunix


def require_tunix() -> None:
    """Raises UserError with the recipe where the measured version of Tunix is not installed."""
    from importlib import metadata

    recipe = f"install it beside the project, in an environment of its own: pip install google-tunix=={TUNIX}"
    try:
        found = metadata.version("google-tunix")
    except metadata.PackageNotFoundError:
        raise UserError(f"the comparison needs Tunix, which is not installed; {recipe}") from None
    if found != TUNIX:
        raise UserError(f"expected google-tunix {TUNIX}, whose PPO and sampler are compared, got {found}; {recipe}")
    os.environ.setdefault("TQDM_DISABLE", "1")  # read when its progress bar is imported


class NumberTokenizer:
    """Text is ids in decimal. Padding and end are ids that no model samples, so that lengths are the caller's alone."""

    def encode(self, text: str, **_) -> list[int]:
        return [int(word) for word in text.split()]

    def decode(self, ids, **_) -> str:
        return " ".join(map(str, ids))

    def bos_id(self) -> None:
        return None

    def eos_id(self) -> int:
        return -2

    def pad_id(self) -> int:
        return -1


def tunix_model(model, params):
    """Tunix's Qwen2 with a copy of our weights. `model`: our Qwen2Config."""
    import jax.numpy as jnp
    from flax import nnx
    from tunix.models.qwen2 import model as tunix_qwen2

    theirs = tunix_qwen2.Qwen2(
        tunix_qwen2.ModelConfig(
            num_layers=model.num_layers,
            vocab_size=model.vocab_size,
            embed_dim=model.hidden_size,
            hidden_dim=model.intermediate_size,
            num_heads=model.num_heads,
            head_dim=model.head_dim,
            num_kv_heads=model.num_kv_heads,
            rope_theta=model.rope_theta,
            norm_eps=model.rms_norm_eps,
            use_tied_embedding=model.tie_embeddings,
        ),
        rngs=nnx.Rngs(0),
    )

    def put(variable, array):
        variable[...] = jnp.array(array).reshape(variable[...].shape)

    put(theirs.embedder.input_embedding, params["embedding"])
    put(theirs.final_norm.w, params["final_norm"])
    if not model.tie_embeddings:
        put(theirs.lm_head.w, params["unembedding"].T)
    for index, layer in enumerate(theirs.layers):
        ours = {name: array[index] for name, array in params["layers"].items()}
        put(layer.input_layernorm.w, ours["attention_norm"])
        put(layer.post_attention_layernorm.w, ours["mlp_norm"])
        for name in ("q", "k", "v"):
            put(getattr(layer.attn, f"{name}_proj").w, ours[f"{name}_kernel"])
            put(getattr(layer.attn, f"{name}_bias"), ours[f"{name}_bias"])
        put(layer.attn.o_proj.w, ours["output_kernel"])
        for name in ("gate", "up", "down"):
            put(getattr(layer.mlp, f"{name}_proj").kernel, ours[f"{name}_kernel"])
    return theirs
