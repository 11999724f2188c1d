"""A chain whose values are known: the critic finds them, and PPO finds the policy that walks it.

States 0 to GOAL; a turn is one sampled token, an odd id steps forward, an even one falls back to 0. Between turns
stands an observation of random length that ends with the state. Reaching GOAL within TURNS turns is
worth 1, all else 0.
"""

import asyncio
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from stepdr_jax.engine.engine import JaxEngine, SampleParams
from stepdr_jax.models import qwen2
from stepdr_jax.rl import learner, ppo
from stepdr_jax.rl.rollouts import EpisodeArrays

GOAL, TURNS, CONTEXT, EPISODES = 3, 5, 40, 48
FILLER, STATE = 2, 4  # ids: filler, and the first state's; 8 ids in all
MODEL = qwen2.Qwen2Config(8, 32, 2, 2, 1, 16, 48, 1e4, 1e-6, False)


def settings(**changes) -> learner.PPOConfig:
    return learner.PPOConfig(
        **dict(
            settings=ppo.ProgramSettings(MODEL, 1.0, 0.2, 10.0, 0.0, 0.0),
            actor_optimizer=ppo.make_optimizer(3e-3, 1, 0.95, 1.0),
            critic_optimizer=ppo.make_optimizer(2e-3, 10, 0.95, 1.0),
            gamma=1.0,
            gae_lambda=1.0,
            actor_minibatches=1,
            critic_minibatches=2,
            critic_warmup_iterations=0,
            loss_aggregation="token_mean",
            whiten=True,
            tis_cap=0.0,
            microbatch_sequences=8,
            seq_len=CONTEXT,
            seed=0,
        )
        | changes
    )


def fresh() -> dict:
    actor = qwen2.init_params(MODEL, jax.random.key(0))
    actor["unembedding"] = jnp.zeros_like(actor["unembedding"])  # every id is equally likely
    return learner.init_state(actor, settings(), jax.random.key(1))


@functools.cache
def value(state: int, left: int) -> float:
    """Of a policy that steps forward half the time."""
    if state == GOAL:
        return 1.0
    return 0.0 if left == 0 else 0.5 * value(state + 1, left - 1) + 0.5 * value(0, left - 1)


class Walk:
    """One episode: what the harness appends, and what happened."""

    def __init__(self, seed):
        self.rng = np.random.default_rng(seed)
        self.tokens, self.actions, self.states, self.state = [], [], [], 0
        self.logprobs = []  # of the sampler; none where nobody sampled
        self.observe()

    def observe(self):
        self.tokens += [FILLER] * int(self.rng.integers(1, 5)) + [STATE + self.state]

    def act(self, id_: int) -> bool:
        """Takes a sampled id; True when the episode ends."""
        self.actions.append(len(self.tokens))
        self.states.append(self.state)
        self.tokens.append(id_)
        self.state = self.state + 1 if id_ % 2 else 0
        ended = self.state == GOAL or len(self.actions) == TURNS
        if not ended:
            self.observe()
        return ended


def arrays(walks) -> EpisodeArrays:
    E = len(walks)
    tokens, mask = np.zeros((E, CONTEXT), np.int32), np.zeros((E, CONTEXT), bool)
    for e, walk in enumerate(walks):
        tokens[e, : len(walk.tokens)] = walk.tokens
        mask[e, walk.actions] = True
    lengths = np.array([len(walk.tokens) for walk in walks], np.int32)
    rewards = np.array([walk.state == GOAL for walk in walks], np.float32)
    logprobs = np.where(mask, -np.log(8.0), 0).astype(np.float32)
    for e, walk in enumerate(walks):
        if walk.logprobs:
            logprobs[e, walk.actions] = walk.logprobs
    return EpisodeArrays(tokens, lengths, mask, logprobs, rewards, np.ones(E, bool))


def random_walks(seed):
    walks = [Walk([seed, e]) for e in range(EPISODES)]
    for walk in walks:
        while not walk.act(int(walk.rng.integers(8))):
            pass
    return walks


async def walks_of(engine, iteration):
    async def one(e):
        walk, new = Walk([iteration, e]), 0
        while True:
            known = len(walk.tokens)
            done = await engine.generate(
                f"{e}", walk.tokens[new:], SampleParams(max_tokens=1, seed=iteration * 1000 + e)
            )
            walk.logprobs.append(done.logprobs[0])
            ended = walk.act(done.ids[0])
            new = known + 1
            if ended:
                await engine.close(f"{e}")
                return walk

    return await asyncio.gather(*(one(e) for e in range(EPISODES)))


@pytest.fixture(scope="module")
def taught():
    """A critic after watching the random policy."""
    state, config = fresh(), settings(critic_warmup_iterations=1000)
    for iteration in range(120):
        state, _, _ = learner.update(state, arrays(random_walks(iteration)), config, iteration)
    return state


def test_the_critic_finds_the_values_whatever_stands_between_the_turns(taught):
    walks = [walk for seed in range(5000, 5005) for walk in random_walks(seed)]
    values = learner._old_values(taught["critic"], arrays(walks), settings())
    found, wanted = [], []
    for e, walk in enumerate(walks):
        for turn, (at, state) in enumerate(zip(walk.actions, walk.states, strict=True)):
            found.append(values[e, at])
            wanted.append(value(state, TURNS - turn))
    found, wanted = np.array(found), np.array(wanted)
    assert np.sqrt(np.mean((found - wanted) ** 2)) < 0.06
    assert np.std(wanted) > 2 * 0.06  # a constant would not do
    for exact in np.unique(wanted):  # on average each state has its own value
        assert abs(found[wanted == exact].mean() - exact) < 0.08


@pytest.mark.parametrize("staleness", [0, 1])
def test_ppo_finds_the_policy_that_walks_the_chain(taught, staleness):
    """Also from walks of the weights one iteration before, weighed by what the present ones make of them."""
    state, config = jax.tree.map(jnp.copy, taught), settings(tis_cap=2.0 * staleness)
    success, waiting = [], []
    engine = JaxEngine(
        state["params"],
        MODEL,
        max_num_seqs=EPISODES,
        max_len=CONTEXT,
        stop_ids=(),
        prefill_batch=8,
        prefill_chunk=8,
        decode_steps=1,
    )
    for iteration in range(40):
        waiting.append(asyncio.run(walks_of(engine, iteration)))
        success.append(np.mean([walk.state == GOAL for walk in waiting[-1]]))
        if len(waiting) > staleness:
            state, _, _ = learner.update(state, arrays(waiting.pop(0)), config, iteration)
            asyncio.run(engine.update_weights(state["params"], iteration + 1))
    assert abs(np.mean(success[:2]) - value(0, TURNS)) < 0.15  # begins as the random policy
    assert np.mean(success[-5:]) > 0.95
