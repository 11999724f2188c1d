"""What the learner's numbers are, against a plain forward pass and closed forms."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from stepdr_jax.models import qwen2
from stepdr_jax.rl import learner, ppo
from tests.rl.small_batch import CONFIG, MODEL, make_episodes, make_state


@pytest.mark.parametrize("temperature", [0.5, 2.0])
def test_log_probabilities_are_those_of_the_temperature_that_sampled(temperature):
    """Logits are divided by it before the softmax, in the trainer as in the sampler."""
    config = dataclasses.replace(CONFIG, settings=dataclasses.replace(CONFIG.settings, temperature=temperature))
    episodes, params = make_episodes(), make_state()["params"]
    old_ET, entropy_ET, _ = learner._old_logprobs(params, None, episodes, config)
    e, length = 1, 24
    tokens = episodes.tokens_ET[e : e + 1, :length]
    places, ones = np.arange(length, dtype=np.int32)[None], np.ones((1, length), np.int32)
    x = qwen2.hidden_states(params, tokens, places, ones, MODEL)[0]
    logp = np.asarray(jax.nn.log_softmax(x @ qwen2.unembedding(params).T / temperature))
    for t in np.flatnonzero(episodes.action_mask_ET[e]):
        np.testing.assert_allclose(old_ET[e, t], logp[t - 1, tokens[0, t]], atol=1e-4)
        np.testing.assert_allclose(entropy_ET[e, t], -(np.exp(logp[t - 1]) * logp[t - 1]).sum(), atol=1e-4)


@pytest.mark.parametrize(
    ("ratio", "advantage", "loss", "slope", "clipped"),
    [
        (2.0, -1.0, 2.0, 2.0, False),  # below the floor's reach: as without it
        (5.0, -1.0, 3.0, 0.0, True),  # an action that became five times as probable counts as three times
        (0.5, -1.0, 0.8, 0.0, True),  # the ordinary clip stays
        (5.0, 1.0, -1.2, 0.0, True),  # and is alone where the advantage is positive
    ],
)
def test_the_dual_clip_bounds_what_a_bad_action_can_cost(ratio, advantage, loss, slope, clipped):
    def objective(x):
        return ppo.policy_loss(x, jnp.zeros(1), jnp.array([advantage]), jnp.ones(1), 0.2, 3.0)

    (value, flag), gradient = jax.value_and_grad(objective, has_aux=True)(jnp.log(jnp.array([ratio])))
    assert (float(value), bool(flag[0])) == (pytest.approx(loss), clipped)
    np.testing.assert_allclose(gradient, [slope], atol=1e-5)
    without, _ = ppo.policy_loss(jnp.log(jnp.array([ratio])), jnp.zeros(1), jnp.array([advantage]), jnp.ones(1), 0.2)
    assert (float(without) > float(value) + 1e-6) == (ratio == 5.0 and advantage < 0)


def test_the_dual_clip_is_a_setting_of_the_learner():
    """Old log-probabilities that the policy has left far behind: only then it matters."""
    episodes = make_episodes()
    mask = episodes.action_mask_ET
    actions = dict(
        weight=ppo.action_weights(mask, "token_mean"),
        share=ppo.action_weights(mask, "token_mean"),
        advantage=np.where(mask, -1.0, 0.0),
        old_logprob=np.where(mask, -60.0, 0.0),
    )
    micro, *_ = ppo.pack(episodes, range(6), rows=8, seq_len=24)
    norms = {}
    for bound in (0.0, 3.0):
        settings = dataclasses.replace(CONFIG.settings, dual_clip=bound)
        params = make_state()["params"]
        total, _ = ppo.actor_gradients(
            params, ppo.zeros_like(params), micro.rows, micro.gather(**actions), settings=settings
        )
        norms[bound] = float(sum(jnp.sum(leaf**2) for leaf in jax.tree.leaves(total)))
    assert norms[3.0] == 0.0 < norms[0.0]
