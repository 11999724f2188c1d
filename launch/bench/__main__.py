"""Measures speed on this machine and prints one JSON object: python -m launch.bench NAME [flags], with NAME one of

train: tokens per second of a midtrain1 training step (forward, backward, AdamW) of config.model, ours against
the same model, batch and optimiser in transformers on PyTorch. Both run in this process on the same number of threads,
in turns, so that a busy machine slows both; the medians are compared.

sample: tokens sampled per second by `sampler.max_num_seqs` sequences of config.model at once, prompts included, ours against
`generate` of transformers on the same weights.

convert: host memory and time of reading a random Hugging Face checkpoint of a published --size into our arrays, and of
writing it back. Needs twice the checkpoint's size on disk, in TMPDIR.

staggered: tokens sampled per second by 32 sequences at a time, while 128 requests with prompts and answers of many lengths wait,
ours against Tunix's sampler and `generate` of transformers; and the same with all lengths equal.

episode: eight episodes of twelve turns, our parked sessions against a new session each turn, and Tunix's sampler.

ppo: one PPO iteration (log-probabilities, values, advantages, updates of critic and actor) against Tunix's PPO learner,
with --episodes, --microbatch_sequences of them in one pass. These three need `pip install google-tunix==0.1.7` beside the project, in an environment of
its own (docs/benchmarks.md).

ahead: PPO iterations on policy against one step off, in turns, from --config.run_dir's SFT policy and world.

decode: the sampler's decode step of a published --size on one accelerator: tokens per second, share of the memory roofline.

attention: time and peak memory of attention backends by length, and of context strategies on eight simulated
devices; sizes are its own, not the config's.
"""

import json
import os
import sys

from absl import flags

from launch import entry
from launch.bench import ahead, attention, convert, engine, peers, ppo, saving
from stepdr_jax.errors import UserError
from stepdr_jax.orchestration import process

_SIZE = flags.DEFINE_string(
    "size", "", "of Qwen2.5, for convert (default 0.5B) and decode (default the config's model)"
)
_ROUNDS = flags.DEFINE_integer("rounds", 9, "measurements of each side, after one that is not counted")


_TEN_MILLION = flags.DEFINE_bool("ten_million", False, "a model of 10M parameters instead of the config's")
_EPISODES = flags.DEFINE_integer("episodes", 64, "of an iteration, for ppo")
_MICROBATCH = flags.DEFINE_integer("microbatch_sequences", 4, "episodes in one pass, for ppo")
_MAX_NUM_SEQS = flags.DEFINE_integer("max_num_seqs", 64, "sequences decoded together, for decode")
_SEQ_LEN = flags.DEFINE_integer("seq_len", 4096, "tokens that each has, for decode")
_BANDWIDTH = flags.DEFINE_float(
    "bandwidth", 0, "of the accelerator's memory, bytes a second, where it is not known, for decode"
)


def main(config) -> None:
    words = entry.arguments()
    if _TEN_MILLION.value:
        config = peers.ten_million(config)
    benches = {
        "train": train,
        "sample": sample,
        "staggered": engine.staggered,
        "episode": engine.episode,
        "ppo": lambda config, rounds: ppo.step(config, rounds, episodes=_EPISODES.value, microbatch=_MICROBATCH.value),
        "ahead": ahead.measure,
        "decode": lambda config, rounds: engine.decode(
            config,
            _SIZE.value,
            rounds,
            max_num_seqs=_MAX_NUM_SEQS.value,
            seq_len=_SEQ_LEN.value,
            bandwidth=_BANDWIDTH.value,
        ),
        "convert": lambda *_: convert.measure(_SIZE.value or "0.5B"),
        "attention": lambda _, rounds: attention.measure(rounds),
        "saving": lambda *_: [saving.measure(gigabytes) for gigabytes in (0.01, 0.4)],
    }
    if len(words) != 1 or words[0] not in benches:
        raise UserError(
            f"expected one of {', '.join(benches)}, got {' '.join(words) or 'nothing'}; for example python -m launch.bench train"
        )
    if "GLIBC_TUNABLES" not in os.environ:  # read by the C library when a process starts; the quickstart sets it too
        os.execve(sys.executable, [*sys.orig_argv], os.environ | {"GLIBC_TUNABLES": process.MALLOC})
    print(json.dumps(benches[words[0]](config, _ROUNDS.value), indent=1))


def train(config, rounds: int) -> dict:
    """Interleaved training steps of both sides on random packed rows of one segment."""
    batch = _random_batch(config.midtrain1.batch_size, config.midtrain1.seq_len, config.tokenizer.vocab_size)
    sides = {"ours": _our_step(config, batch), "transformers": _their_step(config, batch)}
    times = peers.in_turns(sides, rounds)
    return {
        "what": "train",
        "unit": "tokens per second",
        **peers.comparison(batch["tokens"].size, times),
        "sequences": config.midtrain1.batch_size,
        "seq_len": config.midtrain1.seq_len,
        "vocabulary": config.tokenizer.vocab_size,
        "model": dict(config.model),
        **peers.conditions(rounds),
    }


def sample(config, rounds: int) -> dict:
    """Interleaved batches of `sampler.max_num_seqs` prompts of 96 random tokens, 128 sampled tokens each, the same weights on both sides."""
    sequences, prompt, new = config.sampler.max_num_seqs, 96, 128
    prompts = _random_batch(sequences, prompt, config.tokenizer.vocab_size)["tokens"]
    sides = {"ours": _our_sampler(config, prompts, new), "transformers": _their_sampler(config, prompts, new)}
    times = peers.in_turns(sides, rounds)
    return {
        "what": "sample",
        "unit": "sampled tokens per second, prompts' prefill included",
        **peers.comparison(sequences * new, times),
        "sequences": sequences,
        "prompt_tokens": prompt,
        "sampled_tokens": new,
        "cache_tokens": config.agent.max_episode_tokens,
        "pools": config.sampler.pools,
        "model": dict(config.model),
        **peers.conditions(rounds),
    }


def _random_batch(sequences: int, seq_len: int, vocabulary: int) -> dict:
    import numpy as np

    ones = np.ones((sequences, seq_len), np.int32)
    return {
        "tokens": np.random.default_rng(0).integers(0, vocabulary, (sequences, seq_len)).astype(np.int32),
        "segment_ids": ones,
        "positions": np.arange(seq_len, dtype=np.int32) * ones,
        "loss_mask": ones.astype(bool),
        "source": np.zeros(sequences, np.int32),
    }


def _our_step(config, batch: dict):
    import jax

    from stepdr_jax.models.qwen2 import Qwen2Config
    from stepdr_jax.sharding.mesh import make_mesh
    from stepdr_jax.training import state
    from stepdr_jax.training.optimizer import make_optimizer
    from stepdr_jax.training.program import train_program
    from stepdr_jax.training.step import arrange

    vocabulary = config.tokenizer.vocab_size
    program, abstract, _ = train_program(config, "midtrain1", make_mesh(), vocab_size=vocabulary)
    model = Qwen2Config.from_config(config.model, vocabulary)
    fresh = state.new_state(state.initial_params(model, config.seed), make_optimizer(config.midtrain1), 1)
    now = jax.device_put(fresh, jax.tree.map(lambda leaf: leaf.sharding, abstract))
    batch = arrange(batch)

    def step():
        nonlocal now
        now = program(now, batch)
        jax.block_until_ready(now)

    return step


def _their_step(config, batch: dict):
    torch, model = peers.transformers_model(config, use_cache=False)
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
        max_num_seqs=config.sampler.max_num_seqs,
        pools=config.sampler.pools,
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
    from stepdr_jax.models.qwen2 import Qwen2Config
    from stepdr_jax.training import state

    ours = Qwen2Config.from_config(config.model, config.tokenizer.vocab_size)
    torch, model = peers.transformers_sampler(config, state.initial_params(ours, config.seed))
    ids = torch.from_numpy(prompts.astype("int64"))
    settings = dict(do_sample=True, top_k=0, top_p=1.0, temperature=1.0, max_new_tokens=new, min_new_tokens=new)

    def run():
        with torch.inference_mode():
            out = model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), pad_token_id=0, **settings)
        assert out.shape[1] == ids.shape[1] + new

    peers.faster_threads(torch, run)
    return run


if __name__ == "__main__":
    entry.run(main, __doc__, positional="NAME")
