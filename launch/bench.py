"""Measures speed on this machine and prints one JSON object.

--what=train: tokens per second of a midtrain1 training step (forward, backward, AdamW) of config.model, ours against
the same model, batch and optimiser in transformers on PyTorch. Both run in this process on the same number of threads,
in turns, so that a busy machine slows both; the medians are compared.

--what=sample: tokens sampled per second by `sampler.slots` sequences of config.model at once, prompts included, ours against
`generate` of transformers on the same weights.

--what=convert: host memory and time of reading a random Hugging Face checkpoint of a published --size into our arrays, and of
writing it back. Needs twice the checkpoint's size on disk, in TMPDIR.

--what=attention: time and peak memory of attention backends by length, and of context strategies on eight simulated
devices; sizes are its own, not the config's.
"""

import json
import os
import statistics
import sys
import time

from absl import flags

from launch import bench_attention, bench_convert, bench_saving, entry
from stepdr_jax.errors import UserError
from stepdr_jax.orchestration import process

_WHAT = flags.DEFINE_string("what", "train", "train, sample, convert, attention or saving")
_SIZE = flags.DEFINE_string("size", "0.5B", "of Qwen2.5, for --what=convert")
_ROUNDS = flags.DEFINE_integer("rounds", 9, "measurements of each side, after one that is not counted")


def main(config) -> None:
    benches = {
        "train": train,
        "sample": sample,
        "convert": lambda *_: bench_convert.measure(_SIZE.value),
        "attention": lambda _, rounds: bench_attention.measure(rounds),
        "saving": lambda *_: [bench_saving.measure(gigabytes) for gigabytes in (0.01, 0.4)],
    }
    if _WHAT.value not in benches:
        raise UserError(f"expected --what to be one of {', '.join(benches)}, got {_WHAT.value!r}")
    if "GLIBC_TUNABLES" not in os.environ:  # read by the C library when a process starts; the quickstart sets it too
        os.execve(sys.executable, [*sys.orig_argv], os.environ | {"GLIBC_TUNABLES": process.MALLOC})
    print(json.dumps(benches[_WHAT.value](config, _ROUNDS.value), indent=1))


def train(config, rounds: int) -> dict:
    """Interleaved training steps of both sides on random packed rows of one segment."""
    batch = _random_batch(config.midtrain1.batch, config.midtrain1.context, config.tokenizer.vocab_size)
    sides = {"ours": _our_step(config, batch), "transformers": _their_step(config, batch)}
    seconds = _in_turns(sides, rounds)
    return {
        "what": "train",
        "unit": "tokens per second",
        **_comparison(batch["tokens"].size, seconds),
        "rows": config.midtrain1.batch,
        "context": config.midtrain1.context,
        "vocabulary": config.tokenizer.vocab_size,
        "model": dict(config.model),
        "threads": _threads(),
        "rounds": rounds,
    }


def sample(config, rounds: int) -> dict:
    """Interleaved batches of `sampler.slots` prompts of 96 random tokens, 128 sampled tokens each, the same weights on both sides."""
    slots, prompt, new = config.sampler.slots, 96, 128
    prompts = _random_batch(slots, prompt, config.tokenizer.vocab_size)["tokens"]
    sides = {"ours": _our_sampler(config, prompts, new), "transformers": _their_sampler(config, prompts, new)}
    seconds = _in_turns(sides, rounds)
    return {
        "what": "sample",
        "unit": "sampled tokens per second, prompts' prefill included",
        **_comparison(slots * new, seconds),
        "sequences": slots,
        "prompt_tokens": prompt,
        "sampled_tokens": new,
        "cache_tokens": config.agent.max_episode_tokens,
        "shards": config.sampler.shards,
        "model": dict(config.model),
        "threads": _threads(),
        "rounds": rounds,
    }


def _in_turns(sides: dict, rounds: int) -> dict[str, list[float]]:
    """Seconds of each side, round by round, after one round that compiles."""
    seconds = {name: [] for name in sides}
    for work in sides.values():
        work()
    for _ in range(rounds):
        for name, work in sides.items():
            began = time.perf_counter()
            work()
            seconds[name].append(time.perf_counter() - began)
    return seconds


def _comparison(tokens: int, seconds: dict[str, list[float]]) -> dict:
    speed = {name: tokens / statistics.median(times) for name, times in seconds.items()}
    ratios = [theirs / ours for ours, theirs in zip(seconds["ours"], seconds["transformers"], strict=True)]
    return {
        "ours": round(speed["ours"]),
        "transformers": round(speed["transformers"]),
        "ratio": round(speed["ours"] / speed["transformers"], 2),
        "ratio_of_rounds": [round(min(ratios), 2), round(statistics.median(ratios), 2), round(max(ratios), 2)],
        "best": {name: round(tokens / min(times)) for name, times in seconds.items()},
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
    from stepdr_jax.sharding.mesh import make_mesh
    from stepdr_jax.training import state
    from stepdr_jax.training.optimizer import optimizer_of
    from stepdr_jax.training.program import train_program
    from stepdr_jax.training.step import arrange

    vocabulary = config.tokenizer.vocab_size
    program, abstract, _ = train_program(config, "midtrain1", make_mesh(), vocab_size=vocabulary)
    model = Qwen2Config.from_config(config.model, vocabulary)
    fresh = state.new_state(state.initial_params(model, config.seed), optimizer_of(config.midtrain1), 1)
    now = jax.device_put(fresh, jax.tree.map(lambda leaf: leaf.sharding, abstract))
    batch = arrange(batch)

    def step():
        nonlocal now
        now = program(now, batch)
        jax.block_until_ready(now)

    return step


def _their_step(config, batch: dict):
    torch, model = _their_model(config, use_cache=False)
    model.train()
    settings = config.midtrain1
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


def _our_sampler(config, prompts, new: int):
    import asyncio

    from stepdr_jax.engine.engine import JaxEngine, SampleParams
    from stepdr_jax.models.qwen2 import Qwen2Config
    from stepdr_jax.training import state

    model = Qwen2Config.from_config(config.model, config.tokenizer.vocab_size)
    engine = JaxEngine(
        state.initial_params(model, config.seed),
        model,
        slots=config.sampler.slots,
        shards=config.sampler.shards,
        max_len=config.agent.max_episode_tokens,
        stop_ids=(),
    )

    async def one(index: int):
        params = SampleParams(max_tokens=new, seed=index)
        generation = await engine.generate(f"{index}", prompts[index].tolist(), params)
        await engine.close(f"{index}")
        assert len(generation.ids) == new

    async def everything():
        await asyncio.gather(*(one(index) for index in range(len(prompts))))

    return lambda: asyncio.run(everything())


def _their_sampler(config, prompts, new: int):
    """`generate` with the same weights; its static cache needs compilation, so its default dynamic one is used."""
    from stepdr_jax.models import hf
    from stepdr_jax.models.qwen2 import Qwen2Config
    from stepdr_jax.training import state

    ours = Qwen2Config.from_config(config.model, config.tokenizer.vocab_size)
    tensors = dict(hf.tensors(ours, state.initial_params(ours, config.seed)))
    torch, model = _their_model(config, use_cache=True)
    model.eval()
    model.load_state_dict({name: torch.from_numpy(array.copy()) for name, array in tensors.items()}, strict=False)
    ids = torch.from_numpy(prompts.astype("int64"))
    settings = dict(do_sample=True, top_k=0, top_p=1.0, temperature=1.0, max_new_tokens=new, min_new_tokens=new)

    def run():
        with torch.inference_mode():
            out = model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), pad_token_id=0, **settings)
        assert out.shape[1] == ids.shape[1] + new

    return run


def _their_model(config, *, use_cache: bool):
    try:
        import torch
        import transformers
    except ImportError as error:
        raise UserError(f"the comparison needs {error.name}; pip install torch transformers") from None
    torch.set_num_threads(_threads())
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


if __name__ == "__main__":
    entry.run(main, __doc__)
