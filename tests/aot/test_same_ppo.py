"""What the planner compiles for PPO is what the learner and the sampler run: the same text, from real arrays and
abstract ones."""

import asyncio

import jax
import numpy as np
import pytest

from stepdr_jax.aot import programs as planned
from stepdr_jax.engine import factory, programs
from stepdr_jax.engine.engine import SampleParams
from stepdr_jax.models import qwen2
from stepdr_jax.models.qwen2 import Qwen2Config
from stepdr_jax.rl import learner, ppo
from stepdr_jax.rl.rollouts import EpisodeArrays
from stepdr_jax.sharding import rules
from stepdr_jax.sharding.mesh import make_mesh
from tests.rl import toy


def spy(patch, module, name, ran):
    real = getattr(module, name)

    def call(*arguments, **static):
        ran.setdefault(name, set()).add(real.lower(*arguments, **static).as_text())
        return real(*arguments, **static)

    patch.setattr(module, name, call)


def setting(tmp_path):
    config = toy.config(tmp_path, critic_warmup_iterations=0, actor_minibatches=1, critic_minibatches=1).unlock()
    config.tokenizer.vocab_size = 320
    config.sampler.update(
        dict(max_num_seqs=2, pools=1, page_size=16, num_pages=6, prefill_batch=2, prefill_chunk=8, decode_steps=4)
    )
    mesh = make_mesh(**config.mesh)
    return config.lock(), Qwen2Config.from_config(config.model, 320), mesh


def text_of(name, config, mesh):
    program, arguments = planned.build_program(name, config, "ppo", mesh, jax.devices()[:1])
    return program.lower(*arguments).as_text()


def test_the_learner_runs_the_programs_that_the_planner_compiles(tmp_path):
    config, model, mesh = setting(tmp_path)
    learning = learner.PPOConfig.from_config(config, model, mesh)
    state = learner.init_state(qwen2.init_params(model, jax.random.key(0)), learning, jax.random.key(0))
    state = jax.device_put(state, rules.param_shardings(state, mesh))
    E, T = 4, learning.seq_len  # every token but the first is sampled, so that actions have the widest shape
    mask_ET = np.ones((E, T), bool)
    mask_ET[:, 0] = False
    tokens_ET = np.random.default_rng(0).integers(0, 320, (E, T)).astype(np.int32)
    logprobs_ET = np.full((E, T), -5.0, np.float32)
    episodes = EpisodeArrays(
        tokens_ET, np.full(E, T), mask_ET, logprobs_ET, np.arange(E, dtype=np.float32), np.ones(E, bool)
    )
    ran = {}
    with pytest.MonkeyPatch.context() as patch:
        for name in ("logprobs", "values", "actor_gradients", "critic_gradients", "apply_gradient"):
            spy(patch, ppo, name, ran)
        learner.update(state, episodes, learning, 0)
    asked = {"logprobs": "logprobs", "values": "values", "actor": "actor_gradients", "critic": "critic_gradients"}
    for name, function in asked.items():
        assert ran[function] == {text_of(name, config, mesh)}, name
        assert len(text_of(name, config, mesh)) > 5_000
    assert ran["apply_gradient"] == {text_of("update_actor", config, mesh), text_of("update_critic", config, mesh)}


def test_the_sampler_runs_the_programs_that_the_planner_compiles(tmp_path):
    config, model, mesh = setting(tmp_path)
    ran = {}

    async def sample():
        params = qwen2.init_params(model, jax.random.key(0))
        engine = factory.make_engine(config, params, model, toy.TOKENIZER)
        await engine.generate("one", list(range(20)), SampleParams(max_tokens=6, seed=1))
        await engine.close("one")

    with pytest.MonkeyPatch.context() as patch:
        for name in ("decode", "prefill"):
            spy(patch, programs, name, ran)
        asyncio.run(sample())
    assert ran == {name: {text_of(name, config, mesh)} for name in ("decode", "prefill")}
