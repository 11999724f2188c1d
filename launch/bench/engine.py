"""Speed of the sampler; `launch.bench staggered`, `episode` and `decode` run these."""

import asyncio
import dataclasses
import statistics
import sys
import time

import numpy as np

from launch.bench import peers
from stepdr_jax.errors import UserError

MAX_NUM_SEQS, REQUESTS = 32, 128
PROMPT, LONGEST = (16, 256), 256  # tokens of a prompt, from and to; most that are sampled
MEDIAN, SPREAD = 48, 1.0  # of the log-normal numbers of sampled tokens
TURNS, TURN, OBSERVATION, QUESTION, EPISODES = 12, 24, 56, 96, 8  # an episode; tokens; how many at once


# ---------------------------------------------------------------------------------------------------------- staggered


@dataclasses.dataclass(frozen=True)
class Requests:
    """What is asked: prompts of ids, and how many tokens each is answered with (stop ids are off on every side)."""

    prompts: list[list[int]]
    new: list[int]

    @property
    def sampled(self) -> int:
        return sum(self.new)

    def groups(self) -> list["Requests"]:
        """As engines without continuous batching take them: MAX_NUM_SEQS at a time, in the order of arrival."""
        starts = range(0, len(self.new), MAX_NUM_SEQS)
        return [Requests(self.prompts[i : i + MAX_NUM_SEQS], self.new[i : i + MAX_NUM_SEQS]) for i in starts]


def requests_of(vocabulary: int, *, even: bool) -> Requests:
    """REQUESTS prompts of uniform lengths with long-tailed answers; `even`: all of 128 tokens, answered with 128."""
    rng = np.random.default_rng(0)
    if even:
        lengths = new = np.full(REQUESTS, 128)
    else:
        lengths = rng.integers(PROMPT[0], PROMPT[1] + 1, REQUESTS)
        new = np.clip(np.rint(rng.lognormal(np.log(MEDIAN), SPREAD, REQUESTS)), 4, LONGEST).astype(int)
    return Requests([rng.integers(0, vocabulary, n).tolist() for n in lengths], new.tolist())


def staggered(config, rounds: int) -> dict:
    """Sampled tokens a second, MAX_NUM_SEQS sequences at a time, prompts included; ours, Tunix's and transformers'."""
    peers.require_tunix()
    params, model = _weights(config)
    found = {
        "what": "staggered",
        "unit": "sampled tokens per second, prompts' prefill included, compilation not",
        "max_num_seqs": MAX_NUM_SEQS,
        "requests": REQUESTS,
        "model": dict(config.model),
        "vocabulary": model.vocab_size,
    }
    for name, even in (("staggered", False), ("even", True)):
        asked = requests_of(model.vocab_size, even=even)
        sides = {
            "ours": our_answers(config, params, model, asked),
            "tunix": tunix_answers(params, model, asked),
            "transformers": transformers_answers(config, params, asked),
        }
        found["transformers_threads"] = sys.modules["torch"].get_num_threads()
        found[name] = {
            "sampled_tokens": asked.sampled,
            "prompt_tokens": sum(map(len, asked.prompts)),
            **peers.comparison(asked.sampled, peers.in_turns(sides, rounds)),
        }
    return found | peers.conditions(rounds)


def _model(config):
    from stepdr_jax.models.qwen2 import Qwen2Config

    return Qwen2Config.from_config(config.model, config.tokenizer.vocab_size)


def _weights(config):
    from stepdr_jax.training import state

    model = _model(config)
    return state.initial_params(model, config.seed), model


def _engine(config, params, model, *, max_num_seqs: int, max_len: int, **sizes):
    from stepdr_jax.engine.engine import JaxEngine

    s = config.sampler
    settings = dict(
        pools=s.pools,
        prefill_batch=s.prefill_batch,
        prefill_chunk=s.prefill_chunk,
        decode_steps=s.decode_steps,
        prefill_calls=s.prefill_calls,
    )
    return JaxEngine(params, model, max_num_seqs=max_num_seqs, max_len=max_len, stop_ids=(), **(settings | sizes))


def our_answers(config, params, model, asked: Requests):
    """A function that answers everything that is asked, requests entering as others leave."""
    from stepdr_jax.engine.engine import SampleParams

    engine = _engine(config, params, model, max_num_seqs=MAX_NUM_SEQS, max_len=PROMPT[1] + LONGEST)

    async def one(index: int, running):
        async with running:
            name = f"{index}"
            answer = await engine.generate(name, asked.prompts[index], SampleParams(asked.new[index], seed=index))
            await engine.close(name)
        assert len(answer.ids) == asked.new[index]

    async def everything():
        running = asyncio.Semaphore(MAX_NUM_SEQS)
        await asyncio.gather(*(one(index, running) for index in range(len(asked.new))))

    return lambda: asyncio.run(everything())


def tunix_answers(params, model, asked: Requests):
    """Tunix's own sampler in groups. Its loop runs to the longest answer of a group, which it is told (its best case: a
    user would give it the limit); prompts are padded on the left to 256, so that few shapes are compiled. It returns no
    log-probabilities here; ours does."""
    sample = TunixSampler(params, model, cache=PROMPT[1] + LONGEST)
    groups = [(sample.text(group.prompts), max(group.new)) for group in asked.groups()]

    def answer():
        for prompts, longest in groups:
            out = sample(prompts, longest, max_prompt_length=PROMPT[1])
            assert all(len(tokens) == longest for tokens in out.tokens)

    return answer


def transformers_answers(config, params, asked: Requests):
    """`generate` in groups, padded on the left to the longest prompt, to the longest answer of the group."""
    torch, model = peers.transformers_sampler(config, params)
    groups = []
    for group in asked.groups():
        width = max(map(len, group.prompts))
        ids = torch.zeros((len(group.prompts), width), dtype=torch.int64)
        mask = torch.zeros_like(ids)
        for row, prompt in enumerate(group.prompts):
            ids[row, width - len(prompt) :] = torch.tensor(prompt)
            mask[row, width - len(prompt) :] = 1
        groups.append((ids, mask, max(group.new)))

    def answer(groups=groups):
        with torch.inference_mode():
            for ids, mask, new in groups:
                settings = dict(do_sample=True, top_k=0, top_p=1.0, temperature=1.0, pad_token_id=0)
                out = model.generate(
                    input_ids=ids, attention_mask=mask, max_new_tokens=new, min_new_tokens=new, **settings
                )
                assert out.shape[1] == ids.shape[1] + new

    peers.faster_threads(torch, lambda: answer([(*groups[0][:2], 16)]))
    return answer


class TunixSampler:
    """Tunix's Sampler at temperature 1 on our weights, with a cache of so many tokens a sequence."""

    def __init__(self, params, model, *, cache: int):
        from tunix.generate import sampler

        size = sampler.CacheConfig(cache, model.num_layers, model.num_kv_heads, model.head_dim)
        theirs = peers.tunix_model(model, params)
        self._sampler = sampler.Sampler(theirs, peers.NumberTokenizer(), size)
        self._seed = 0

    @staticmethod
    def text(prompts) -> list[str]:
        return [" ".join(map(str, prompt)) for prompt in prompts]

    def __call__(self, prompts: list[str], new: int, **settings):
        self._seed += 1
        return self._sampler(prompts, max_generation_steps=new, temperature=1.0, top_p=1.0, seed=self._seed, **settings)


# ------------------------------------------------------------------------------------------------------------ episode


def episode(config, rounds: int) -> dict:
    """EPISODES episodes of TURNS turns at once: our parked sessions against engines that read the history again.

    A turn samples TURN tokens and gets OBSERVATION more. Prefill is timed by itself, too: the same episodes, whose
    sampled tokens come with the observation, one token sampled a turn.
    """
    peers.require_tunix()
    params, model = _weights(config)
    found: dict = {
        "what": "episode",
        "unit": "seconds for all episodes, compilation excluded",
        "turns": TURNS,
        "episodes": EPISODES,
        "tokens": {"question": QUESTION, "turn": TURN, "observation": OBSERVATION, "final": _longest()},
        "model": dict(config.model),
    }
    for name, sampled in (("whole", TURN), ("prefill_alone", 1)):
        parked, again, theirs = (
            OurEpisodes(config, params, model, sampled, park=True),
            OurEpisodes(config, params, model, sampled, park=False),
            TunixEpisodes(params, model, sampled),
        )
        sides = {"ours": parked, "ours_again": again, "tunix": theirs}
        times = peers.in_turns(sides, rounds)
        found[name] = {
            side: {
                "seconds": round(statistics.median(times[side].wall), 3),
                "prefilled_tokens": sides[side].prefilled,
                **peers.ratios(times).get(side, {}),
            }
            for side in sides
        }
        found[name]["tunix"]["prefilled_with_padding"] = theirs.padded
    return found | peers.conditions(rounds)


def _longest() -> int:
    return QUESTION + TURNS * TURN + (TURNS - 1) * OBSERVATION


def _given(rng, vocabulary: int, sampled: int) -> list[list[int]]:
    """What is given before each turn; the tokens of a turn that are not sampled are given as well."""
    lengths = [QUESTION] + [OBSERVATION + TURN - sampled] * (TURNS - 1)
    return [rng.integers(0, vocabulary, n).tolist() for n in lengths]


class OurEpisodes:
    """All episodes once; `park`: sessions stay open between turns, else each turn is a new session with the whole
    history."""

    def __init__(self, config, params, model, sampled: int, *, park: bool):
        self.sampled, self.park, self.prefilled = sampled, park, 0
        rng = np.random.default_rng(1)
        self.given = [_given(rng, model.vocab_size, sampled) for _ in range(EPISODES)]
        self.engine = _engine(config, params, model, max_num_seqs=EPISODES, max_len=_longest() + 8, prefill_chunk=128)

    async def _one(self, index: int):
        from stepdr_jax.engine.engine import SampleParams

        history: list[int] = []
        for turn, given in enumerate(self.given[index]):
            history += given
            new = given if self.park else history
            answer = await self.engine.generate(f"{index}", new, SampleParams(self.sampled, seed=index))
            history += answer.ids
            if not self.park or turn == TURNS - 1:
                await self.engine.close(f"{index}")

    def __call__(self):
        async def everything():
            await asyncio.gather(*map(self._one, range(EPISODES)))

        before = self.engine.stats()["prefilled_tokens"]
        asyncio.run(everything())
        self.prefilled = int(self.engine.stats()["prefilled_tokens"] - before)


class TunixEpisodes:
    """All episodes once, turn by turn together, the whole history each turn: its sampler keeps no cache between
    calls."""

    def __init__(self, params, model, sampled: int):
        self.sampled, self.prefilled, self.padded = sampled, 0, 0
        rng = np.random.default_rng(1)
        self.given = [_given(rng, model.vocab_size, sampled) for _ in range(EPISODES)]
        self.sampler = TunixSampler(params, model, cache=(1 << _longest().bit_length()) + TURN)

    def __call__(self):
        histories: list[list[int]] = [[] for _ in range(EPISODES)]
        self.prefilled = self.padded = 0
        for turn in range(TURNS):
            for history, given in zip(histories, self.given, strict=True):
                history += given[turn]
            out = self.sampler(self.sampler.text(histories), self.sampled)
            self.prefilled += sum(map(len, histories))
            self.padded += out.padded_prompt_tokens.size
            for history, tokens in zip(histories, out.tokens, strict=True):
                history += tokens.tolist()


# ------------------------------------------------------------------------------------------------------------- decode


def decode(config, name: str, rounds: int, *, max_num_seqs: int, seq_len: int, bandwidth: float) -> dict:
    """Decode steps of a published shape on one accelerator: sampled tokens a second and the share of the memory
    roofline.

    Every step must read all weights once and the K/V of every sequence; the roofline is those bytes over the memory's
    bandwidth. Weights are random, pages are full up to `seq_len` tokens.
    """
    import jax

    from stepdr_jax.engine import programs, weights
    from stepdr_jax.engine.engine import layout_of
    from stepdr_jax.models import qwen2, sizes
    from stepdr_jax.sharding import hardware

    device, steps = jax.devices()[0], 32
    B = max_num_seqs
    model = dataclasses.replace(sizes.size(name), param_dtype="bfloat16") if name else _model(config)
    kind = device.device_kind
    speed = bandwidth or hardware.memory_bandwidth(kind)
    if not speed:
        raise UserError(f"no memory bandwidth is known for {kind!r}; give it, in bytes a second, as --bandwidth=...")
    page = 128 if device.platform == "tpu" else 0
    layout = layout_of(model, B, -(-(seq_len + steps) // 128) * 128, page_size=page, devices=[device])
    held = weights.transfer(jax.jit(lambda: qwen2.init_params(model, jax.random.key(0)))(), [(layout, device)])[0]
    pool = programs.init_pool(layout, device)
    table_BM = np.arange(B * layout.columns, dtype=np.int32).reshape(B, layout.columns)
    state = dict(
        token=np.zeros(B, np.int32),
        position=np.full(B, seq_len - 1, np.int32),
        remaining=np.full(B, steps, np.int32),
        seed=np.arange(B, dtype=np.uint32),
        temperature=np.ones(B, np.float32),
    )
    stop_ids_I, seconds = np.zeros(0, np.int32), []
    for _ in range(rounds + 1):
        began = time.perf_counter()
        pool, ids_Bs, _ = programs.decode(held, pool, table_BM, state, stop_ids_I, layout=layout, decode_steps=steps)
        assert (np.asarray(ids_Bs) >= 0).all()
        seconds.append(time.perf_counter() - began)
    step = statistics.median(seconds[1:]) / steps
    weight_bytes = sum(leaf.nbytes for leaf in jax.tree.leaves(held)) - held["embedding"].nbytes
    width = np.dtype(model.dtype).itemsize if model.dtype != "bfloat16" else 2
    kv_bytes = 2 * model.num_layers * model.num_kv_heads * model.head_dim * width * (seq_len + steps / 2) * B
    return {
        "what": "decode",
        "device": kind,
        "model": dataclasses.asdict(model),
        "max_num_seqs": max_num_seqs,
        "seq_len": seq_len,
        "attention": layout.attention,
        "tokens_per_second": round(B / step),
        "step_ms": round(1e3 * step, 3),
        "bytes_a_step": {"weights": weight_bytes, "kv": int(kv_bytes)},
        "bandwidth": speed,
        "roofline_share": round((weight_bytes + kv_bytes) / speed / step, 3),
        "rounds": rounds,
    }
