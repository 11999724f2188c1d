"""What a session samples depends on its own ids, its seed and the weights; on nothing else."""

import asyncio
import dataclasses
import functools
import random

import hypothesis
import hypothesis.strategies as st
import jax
import numpy as np
import pytest

from stepdr_jax.engine.engine import EngineError, JaxEngine, SampleParams
from stepdr_jax.engine.pages import PageAllocator, Session
from stepdr_jax.models import qwen2
from stepdr_jax.ops.vocab_loss import token_stats

CONFIG = qwen2.Qwen2Config(
    vocab_size=100,  # not a multiple of the sampler's block
    hidden_size=32,
    num_layers=2,
    num_heads=4,
    num_kv_heads=2,
    head_dim=8,
    intermediate_size=48,
    rope_theta=1e4,
    rms_norm_eps=1e-6,
    tie_embeddings=True,
)
STOPS = (3, 7)
MAX_LEN = 64
# Far from uniform logits, so that a wrong cache entry changes samples.
PARAMS = jax.tree.map(lambda w: 6 * w, qwen2.init_params(CONFIG, jax.random.PRNGKey(0)))
OTHER = jax.tree.map(lambda w: 5 * w, qwen2.init_params(CONFIG, jax.random.PRNGKey(1)))


PAGED = dict(page_size=8, num_pages=40)  # room for 5 sequences of 64 tokens


def make_engine(**overrides):
    settings = (
        dict(max_num_seqs=4, max_len=MAX_LEN, stop_ids=STOPS, prefill_batch=2, prefill_chunk=8, decode_steps=4)
        | overrides
    )
    return JaxEngine(PARAMS, CONFIG, **settings)


def prompt(number: int) -> list[int]:
    return np.random.default_rng(number).integers(10, 100, 3 + number % 11).tolist()


def observation(number: int, turn: int) -> list[int]:
    return np.random.default_rng([number, turn]).integers(10, 100, 1 + (number + turn) % 13).tolist()


async def episode(engine, number: int, turns: int = 3, close: bool = True):
    """Turns of a session: prompt, sampled, observation, sampled ..."""
    done = []
    for turn in range(turns):
        new = prompt(number) if turn == 0 else observation(number, turn)
        async with asyncio.timeout(120):  # pages that leaked are waited for without end
            done.append(await engine.generate(f"s{number}", new, SampleParams(max_tokens=9, seed=number)))
        await asyncio.sleep(0)
    if close:
        await engine.close(f"s{number}")
    return done


@functools.partial(jax.jit, static_argnames="config")
def trainer_hidden(tokens_1T, config):
    places_1T = jax.numpy.arange(tokens_1T.shape[1])[None]
    return qwen2.hidden_states(PARAMS, tokens_1T, places_1T, jax.numpy.ones_like(tokens_1T), config)[0]


def hidden(ids) -> np.ndarray:
    """What the trainer's forward pass gives; padded behind, which causal attention cannot see."""
    tokens_1T = np.zeros((1, MAX_LEN), np.int32)
    tokens_1T[0, : len(ids)] = ids
    return np.asarray(trainer_hidden(tokens_1T, CONFIG))[: len(ids)]


def one_by_one(engine, numbers):
    async def run():
        return {number: await episode(engine, number) for number in numbers}

    return asyncio.run(run())


def together(engine, numbers):
    async def run():
        return dict(zip(numbers, await asyncio.gather(*(episode(engine, n) for n in numbers)), strict=True))

    return asyncio.run(run())


@pytest.fixture(scope="module")
def reference():
    return one_by_one(make_engine(), range(16))


def test_concurrent_sessions_in_any_order_sample_what_each_samples_alone_bit_for_bit(reference):
    for order in range(3):
        numbers = list(range(16))
        random.Random(order).shuffle(numbers)
        assert together(make_engine(), numbers) == reference


def same(got: dict, wanted: dict) -> None:
    """Ids exactly; log-probabilities up to the order of sums, which follows the number of tokens in the pool."""
    assert got.keys() == wanted.keys()
    for number in got:
        assert got[number] == [
            dataclasses.replace(g, logprobs=pytest.approx(g.logprobs, abs=1e-4)) for g in wanted[number]
        ]


@pytest.mark.parametrize(
    "pages", [PAGED, dict(page_size=16), dict(page_size=5, num_pages=21), dict(page_size=8, num_pages=8)]
)
def test_pages_do_not_change_samples(reference, pages):
    """Of any size, down to room for one sequence: sessions then take each other's pages in the middle of a turn."""
    for prefill_calls in (0, 1):
        engine = make_engine(prefill_calls=prefill_calls, **pages)
        same(together(engine, range(16)), reference)
        assert engine.stats()["pages_in_use"] == 0
    if pages.get("num_pages") == 8:
        assert engine.stats()["preemptions"] > 0


def test_where_a_sequences_pages_lie_does_not_change_a_bit():
    alone = one_by_one(make_engine(**PAGED), range(16))
    for order in range(3):
        numbers = list(range(16))
        random.Random(order).shuffle(numbers)
        assert together(make_engine(**PAGED), numbers) == alone


def test_pages_that_were_on_the_host_come_back_exactly():
    alone = one_by_one(make_engine(page_size=8), range(6))

    async def run(engine):
        opened = {number: [] for number in range(6)}
        for turn in range(3):
            for number in range(6):
                new = prompt(number) if turn == 0 else observation(number, turn)
                params = SampleParams(max_tokens=9, seed=number)
                opened[number].append(await engine.generate(f"s{number}", new, params))
        return opened

    engine = make_engine(page_size=8, num_pages=9)
    assert asyncio.run(run(engine)) == alone
    assert engine.stats()["evictions"] > 3
    assert engine.stats()["replayed_tokens"] == 0


@hypothesis.settings(max_examples=60, deadline=None)
@hypothesis.given(st.lists(st.tuples(st.sampled_from("grow release".split()), st.integers(0, 4), st.integers(0, 40))))
def test_pages_are_never_lost_or_shared(moves):
    pool = PageAllocator(7, 4)
    sessions = [Session(str(i)) for i in range(5)]
    for move, which, tokens in moves:
        session = sessions[which]
        before = list(session.pages)
        if move == "release":
            pool.release(session)
        elif pool.grow(session, tokens):
            assert len(session.pages) * 4 >= tokens and session.pages[: len(before)] == before
        else:
            assert session.pages == before
        held = [page for session in sessions for page in session.pages]
        assert sorted(held) == sorted(set(held)) and len(held) + pool.free == 7


def test_pools_do_not_change_samples(reference):
    assert together(make_engine(max_num_seqs=4, pools=2, prefill_batch=2), range(16)) == {
        number: [dataclasses.replace(g, logprobs=pytest.approx(g.logprobs, abs=1e-5)) for g in turns]
        for number, turns in reference.items()
    }


def test_the_reference_exercises_every_kind_of_turn(reference):
    kinds = {generation.finish for turns in reference.values() for generation in turns}
    assert {"stop", "length"} <= kinds
    assert all(generation.ids for generation in reference[0])


def test_eviction_to_the_host_is_exact(reference):
    """More open sessions than max_num_seqs: every turn of each finds its place taken by another."""

    async def run(engine):
        opened = [[] for _ in range(6)]
        for turn in range(3):
            for number in range(6):
                new = prompt(number) if turn == 0 else observation(number, turn)
                params = SampleParams(max_tokens=9, seed=number)
                opened[number].append(await engine.generate(f"s{number}", new, params))
        return opened

    engine = make_engine(max_num_seqs=4)
    assert asyncio.run(run(engine)) == [reference[number] for number in range(6)]
    assert engine.stats()["evictions"] > 6
    assert engine.stats()["sessions"] == 6


def test_eviction_without_host_memory_prefills_again(reference):
    async def run(engine):
        first = [await episode(engine, number, turns=2, close=False) for number in range(6)]
        third = [
            await engine.generate(f"s{number}", observation(number, 2), SampleParams(max_tokens=9, seed=number))
            for number in range(6)
        ]
        return [[*turns, last] for turns, last in zip(first, third, strict=True)]

    engine = make_engine(host_bytes=0)
    for number, turns in enumerate(asyncio.run(run(engine))):
        for got, wanted in zip(turns, reference[number], strict=True):
            assert got.ids == wanted.ids
            np.testing.assert_allclose(got.logprobs, wanted.logprobs, atol=1e-4)
    assert engine.stats()["replayed_tokens"] > 0


def test_a_resumed_session_prefills_only_what_is_new():
    engine = make_engine()

    async def run():
        first = await engine.generate("a", prompt(5), SampleParams(max_tokens=6, seed=1))
        before = engine.stats()["prefilled_tokens"]
        await engine.generate("a", [11, 12, 13], SampleParams(max_tokens=2, seed=1))
        return first, before

    _, before = asyncio.run(run())
    assert before == len(prompt(5)) - 1
    # the last sampled token, whose K/V was not written yet, and the observation but for its last token
    assert engine.stats()["prefilled_tokens"] - before == 3


def test_log_probabilities_are_the_trainers(reference):
    """Over several turns: sampled tokens in the middle of given ones, all in one forward pass of the trainer."""
    for number, temperature in ((0, 1.0), (5, 0.7)):
        engine = make_engine()

        async def run(engine=engine, number=number, temperature=temperature):
            ids, positions, logprobs = [], [], []
            for turn in range(3):
                new = prompt(number) if turn == 0 else observation(number, turn)
                params = SampleParams(max_tokens=9, seed=3, temperature=temperature)
                generation = await engine.generate("s", new, params)
                ids += new
                positions += range(len(ids), len(ids) + len(generation.ids))
                ids += generation.ids
                logprobs += generation.logprobs
            return ids, positions, logprobs

        ids, positions, logprobs = asyncio.run(run())
        at = np.asarray(positions)
        logprob_N, _, _ = token_stats(
            hidden(ids)[at - 1],
            qwen2.unembedding(PARAMS),
            np.asarray(ids)[at],
            chunk=64,
            temperature=temperature,
        )
        np.testing.assert_allclose(logprobs, logprob_N, atol=2e-4)


def test_greedy_takes_the_most_probable_token():
    engine = make_engine()

    async def run():
        return await engine.generate("s", prompt(4), SampleParams(max_tokens=5, seed=0, temperature=0.0))

    generation = asyncio.run(run())
    ids = [*prompt(4), *generation.ids]
    logits_TV = hidden(ids) @ qwen2.unembedding(PARAMS).T
    assert generation.ids == tuple(np.argmax(logits_TV, -1)[len(prompt(4)) - 1 : len(ids) - 1].tolist())


def test_a_stop_inside_a_decode_call_ends_the_turn_there(reference):
    stopped = [g for turns in reference.values() for g in turns if g.finish == "stop"]
    assert any(len(g.ids) % 4 for g in stopped), "no stop fell inside a call of 4 steps"
    assert all(g.ids[-1] in STOPS for g in stopped)
    assert not any(set(g.ids[:-1]) & set(STOPS) for turns in reference.values() for g in turns)


def test_the_end_of_the_cache_is_full_and_the_session_stays_usable_by_its_owner():
    engine = make_engine(stop_ids=(-5,))

    async def run():
        long = list(range(10, 10 + MAX_LEN - 4))
        first = await engine.generate("s", long, SampleParams(max_tokens=20, seed=0))
        second = await engine.generate("s", [11], SampleParams(max_tokens=20, seed=0))
        await engine.close("s")
        return first, second

    first, second = asyncio.run(run())
    assert (first.finish, len(first.ids)) == ("full", 4)
    assert (second.finish, second.ids) == ("full", ())
    assert engine.stats()["sessions"] == 0


def test_new_weights_invalidate_what_was_cached():
    async def run(engine, update):
        await engine.generate("s", prompt(1), SampleParams(max_tokens=5, seed=1))
        if update:
            await engine.update_weights(OTHER, 7)
        return engine._sessions["s"][0].ids, engine

    async def continued(engine, new):
        return await engine.generate("s", new, SampleParams(max_tokens=5, seed=1))

    engine = make_engine()

    async def both():
        ids, _ = await run(engine, update=True)
        known = list(ids)
        return known, await continued(engine, [20, 21])

    known, got = asyncio.run(both())
    fresh = JaxEngine(
        OTHER, CONFIG, max_num_seqs=4, max_len=MAX_LEN, stop_ids=STOPS, prefill_batch=2, prefill_chunk=8, decode_steps=4
    )
    wanted = asyncio.run(continued(fresh, [*known, 20, 21]))
    assert (got.ids, got.logprobs, got.version) == (wanted.ids, wanted.logprobs, 7)


def test_a_weight_update_waits_for_running_requests_and_holds_back_new_ones():
    engine = make_engine()

    async def run():
        running = asyncio.create_task(engine.generate("a", prompt(1), SampleParams(max_tokens=9, seed=1)))
        await asyncio.sleep(0)
        update = asyncio.create_task(engine.update_weights(OTHER, 1))
        await asyncio.sleep(0)
        late = asyncio.create_task(engine.generate("b", prompt(2), SampleParams(max_tokens=9, seed=1)))
        return await running, await update, await late

    running, _, late = asyncio.run(run())
    assert (running.version, late.version) == (0, 1)


@pytest.mark.parametrize("mode", ["keep", "recompute"])
def test_weights_may_change_in_the_middle_of_a_turn(mode):
    """What comes after the change: over the old K/V, or as a session that always had the new weights would sample
    it."""
    engine = make_engine(stop_ids=(-5,), **PAGED)

    async def run():
        running = asyncio.create_task(engine.generate("a", prompt(1), SampleParams(max_tokens=24, seed=1)))
        while engine.stats()["sampled_tokens"] < 8:
            await asyncio.sleep(0.001)
        await engine.pause()
        before = engine.stats()["sampled_tokens"]
        await asyncio.sleep(0.05)
        assert engine.stats()["sampled_tokens"] == before  # nothing runs
        await engine.update_weights(OTHER, 5, mode=mode)
        engine.resume()
        return before, await running

    before, generation = asyncio.run(run())
    assert 8 <= before < 24 and len(generation.ids) == 24
    assert generation.version == 0  # of its first token
    assert engine.stats()["version"] == 5
    fresh = JaxEngine(
        OTHER, CONFIG, max_num_seqs=4, max_len=MAX_LEN, stop_ids=(-5,), prefill_batch=2, prefill_chunk=8, decode_steps=4
    )
    known = [*prompt(1), *generation.ids[:before]]
    continued = asyncio.run(fresh.generate("a", known, SampleParams(max_tokens=24 - before, seed=1)))
    if mode == "recompute":
        assert generation.ids[before:] == continued.ids
        np.testing.assert_allclose(generation.logprobs[before:], continued.logprobs, atol=1e-4)
        assert engine.stats()["stale_tokens"] == 0
    else:
        assert not np.allclose(generation.logprobs[before:], continued.logprobs, atol=1e-2)
        assert engine.stats()["stale_tokens"] == 24 - before


def test_a_long_observation_does_not_hold_up_the_others():
    engine = make_engine(prefill_calls=1, prefill_batch=1, stop_ids=(-5,), **PAGED)

    async def run():
        long = asyncio.create_task(engine.generate("long", list(range(10, 58)), SampleParams(max_tokens=4, seed=1)))
        await asyncio.sleep(0)
        short = asyncio.create_task(engine.generate("short", [11], SampleParams(max_tokens=16, seed=2)))
        done, _ = await asyncio.wait([long, short], return_when=asyncio.FIRST_COMPLETED)
        return short in done, await long, await short

    first, _, short = asyncio.run(run())
    assert first and len(short.ids) == 16


def test_a_cancelled_request_frees_its_place_and_the_name_can_be_closed():
    engine = make_engine(max_num_seqs=1, prefill_batch=1, stop_ids=(-5,))

    async def run():
        victim = asyncio.create_task(engine.generate("a", prompt(1), SampleParams(max_tokens=40, seed=1)))
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        victim.cancel()
        await asyncio.gather(victim, return_exceptions=True)
        await engine.close("a")
        return await engine.generate("b", prompt(2), SampleParams(max_tokens=4, seed=2))

    assert len(asyncio.run(run()).ids) == 4
    assert engine.stats()["pages_in_use"] == 1  # b, still open


def test_closing_a_session_cancels_its_request_and_frees_its_name():
    engine = make_engine(stop_ids=(-5,))

    async def run():
        running = asyncio.create_task(engine.generate("a", prompt(1), SampleParams(max_tokens=40, seed=1)))
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        await engine.close("a")
        again = await engine.generate("a", prompt(2), SampleParams(max_tokens=4, seed=2))
        await engine.close("a")
        return again, await asyncio.gather(running, return_exceptions=True)

    again, ended = asyncio.run(run())
    assert len(again.ids) == 4
    assert isinstance(ended[0], asyncio.CancelledError)
    assert (engine.stats()["sessions"], engine.stats()["pages_in_use"]) == (0, 0)


def test_sessions_do_not_leak():
    engine = make_engine()
    together(engine, range(16))
    assert (engine.stats()["sessions"], engine.stats()["pages_in_use"]) == (0, 0)


def test_weights_that_are_not_numbers_are_an_error_not_a_sample():
    engine = JaxEngine(
        jax.tree.map(lambda w: w * np.nan, PARAMS),
        CONFIG,
        max_num_seqs=4,
        max_len=MAX_LEN,
        stop_ids=STOPS,
        prefill_batch=2,
        prefill_chunk=8,
        decode_steps=4,
    )
    with pytest.raises(EngineError, match="non-finite"):
        asyncio.run(engine.generate("s", [10, 11], SampleParams(max_tokens=2, seed=0)))


def test_misuse_is_named():
    engine = make_engine()
    with pytest.raises(ValueError, match="empty"):
        asyncio.run(engine.generate("s", [], SampleParams(max_tokens=2, seed=0)))
    with pytest.raises(ValueError, match="max_tokens"):
        asyncio.run(engine.generate("s", [1], SampleParams(max_tokens=0, seed=0)))
    for wrong, message in (
        (dict(max_num_seqs=3, pools=2), "multiple of pools"),
        (dict(page_size=8, num_pages=7), "at least 8 pages"),
        (dict(num_pages=3), "a page for each of 4 sequences"),
    ):
        with pytest.raises(ValueError, match=message):
            make_engine(**wrong)
    with pytest.raises(ValueError, match="mode among"):
        asyncio.run(engine.update_weights(OTHER, 1, mode="soon"))


def test_a_sleeping_engine_holds_nothing_and_goes_on_with_its_sessions_when_it_has_weights_again():
    async def sampled(releases):
        engine = make_engine(**PAGED)
        first = await episode(engine, 3, turns=1, close=False)
        if releases:
            await engine.sleep()
            assert engine.sleeping and not engine._weights and all(pool.kv_pages is None for pool in engine._pools)
            with pytest.raises(EngineError, match="no weights.*update_weights"):
                await engine.generate("s3", [20], SampleParams(max_tokens=9, seed=3))
        await engine.update_weights(OTHER, 1)
        return [*first, await engine.generate("s3", [20, 21], SampleParams(max_tokens=9, seed=3))]

    assert asyncio.run(sampled(True)) == asyncio.run(sampled(False))
