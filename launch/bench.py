"""Measures speed on this machine and prints one JSON object.

--what=train: tokens per second of a midtrain1 training step (forward, backward, AdamW) of config.model, ours against
the same model, batch and optimiser in transformers on PyTorch. Both run in this process on the same number of threads,
in turns, so that a busy machine slows both; the medians are compared.
"""

import functools
import json
import os
import statistics
import time

from absl import flags

from launch import entry
from stepdr_jax.errors import UserError

_WHAT = flags.DEFINE_string("what", "train", "train")
_ROUNDS = flags.DEFINE_integer("rounds", 9, "measurements of each side, after one that is not counted")


def main(config) -> None:
    benches = {"train": train}
    if _WHAT.value not in benches:
        raise UserError(f"expected --what to be one of {', '.join(benches)}, got {_WHAT.value!r}")
    print(json.dumps(benches[_WHAT.value](config, _ROUNDS.value), indent=1))


def train(config, rounds: int) -> dict:
    """Interleaved training steps of both sides on random packed rows of one segment."""
    batch = _random_batch(config.midtrain1.batch, config.midtrain1.context, config.tokenizer.vocab_size)
    sides = {"ours": _our_step(config, batch), "transformers": _their_step(config, batch)}
    seconds = {name: [] for name in sides}
    for step in sides.values():
        step()
    for _ in range(rounds):
        for name, step in sides.items():
            began = time.perf_counter()
            step()
            seconds[name].append(time.perf_counter() - began)
    tokens = batch["tokens"].size
    speed = {name: tokens / statistics.median(times) for name, times in seconds.items()}
    ratios = [theirs / ours for ours, theirs in zip(seconds["ours"], seconds["transformers"], strict=True)]
    return {
        "what": "train",
        "unit": "tokens per second",
        "ours": round(speed["ours"]),
        "transformers": round(speed["transformers"]),
        "ratio": round(speed["ours"] / speed["transformers"], 2),
        "ratio_of_rounds": [round(min(ratios), 2), round(statistics.median(ratios), 2), round(max(ratios), 2)],
        "best": {name: round(tokens / min(times)) for name, times in seconds.items()},
        "rows": config.midtrain1.batch,
        "context": config.midtrain1.context,
        "vocabulary": config.tokenizer.vocab_size,
        "model": dict(config.model),
        "threads": _threads(),
        "rounds": rounds,
    }


def _threads() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _random_batch(rows: int, context: int, vocabulary: int) -> dict:
    import numpy as np

    ones = np.ones((rows, context), np.int32)
    return {
        "tokens": np.random.default_rng(0).integers(0, vocabulary, (rows, context)).astype(np.int32),
        "segment_ids": ones,
        "positions": np.arange(context, dtype=np.int32) * ones,
        "loss_mask": ones.astype(bool),
        "source": np.zeros(rows, np.int32),
    }


def _our_step(config, batch: dict):
    import jax

    from stepdr_jax.models.qwen2 import Qwen2Config
    from stepdr_jax.training import state
    from stepdr_jax.training.optimizer import adamw
    from stepdr_jax.training.step import train_step

    settings = config.midtrain1
    model = Qwen2Config.from_config(config.model, config.tokenizer.vocab_size)
    optimizer = adamw(settings.learning_rate, weight_decay=settings.weight_decay, beta2=settings.beta2)
    program = jax.jit(
        functools.partial(
            train_step,
            config=model,
            optimizer=optimizer,
            clip_norm=settings.clip_norm,
            num_sources=1,
            loss_chunk=settings.loss_chunk,
            z_loss=settings.z_loss,
        ),
        donate_argnums=0,
    )
    now = state.new_state(state.initial_params(model, config.seed), optimizer, 1)

    def step():
        nonlocal now
        now = program(now, batch)
        jax.block_until_ready(now)

    return step


def _their_step(config, batch: dict):
    try:
        import torch
        import transformers
    except ImportError as error:
        raise UserError(f"the comparison needs {error.name}; pip install torch transformers") from None
    torch.set_num_threads(_threads())
    settings, m = config.midtrain1, config.model
    model = transformers.Qwen2ForCausalLM(
        transformers.Qwen2Config(
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
            use_cache=False,
        )
    ).train()
    optimizer = torch.optim.AdamW(
        model.parameters(),
        lr=settings.learning_rate,
        betas=(0.9, settings.beta2),
        weight_decay=settings.weight_decay,
        foreach=True,
    )
    tokens = torch.from_numpy(batch["tokens"].astype("int64"))

    def step():
        optimizer.zero_grad(set_to_none=True)
        model(input_ids=tokens, labels=tokens).loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), settings.clip_norm)
        optimizer.step()

    return step


if __name__ == "__main__":
    entry.run(main, __doc__)
