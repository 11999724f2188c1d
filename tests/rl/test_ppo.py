"""Losses and updates: what the objective is, and that neither packing nor splitting changes it."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from stepdr_jax.models import qwen2, value_head
from stepdr_jax.rl import learner, ppo
from stepdr_jax.rl.rollouts import EpisodeArrays
from tests.rl.small_batch import CONFIG, CONTEXT, MODEL, make_episodes, make_state


def leaves_close(a, b, atol=1e-6):
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        np.testing.assert_allclose(x, y, atol=atol)


# ------------------------------------------------------------------------------------------------------------ losses


def test_at_ratio_one_the_gradient_is_the_policy_gradient():
    logp, advantage, weight = jnp.array([-1.0, -2.0, -0.5]), jnp.array([1.0, -2.0, 0.0]), jnp.full(3, 1 / 3)
    gradient = jax.grad(lambda x: ppo.policy_loss(x, logp, advantage, weight, 0.2)[0])(logp)
    np.testing.assert_allclose(gradient, -weight * advantage, atol=1e-7)


@pytest.mark.parametrize(
    ("ratio", "advantage", "clipped"),
    [(1.5, 1.0, True), (0.5, 1.0, False), (1.5, -1.0, False), (0.5, -1.0, True), (1.1, 1.0, False), (0.9, -1.0, False)],
)
def test_clipping_stops_the_gradient_only_where_moving_on_would_gain(ratio, advantage, clipped):
    def loss(x):
        return ppo.policy_loss(x, jnp.zeros(1), jnp.array([advantage]), jnp.ones(1), 0.2)

    at = jnp.log(jnp.array([ratio]))
    gradient, flag = jax.grad(loss, has_aux=True)(at)
    assert bool(flag[0]) == clipped
    np.testing.assert_allclose(gradient, [0.0 if clipped else -ratio * advantage], atol=1e-6)


def test_value_loss_takes_the_larger_of_free_and_clipped_error():
    old, returns, weight = jnp.zeros(3), jnp.array([1.0, 1.0, 0.1]), jnp.ones(3)
    # clipped to 0.2: error 0.64 > 0.25; inside the clip: free; beyond the return: the free error is larger
    value = jnp.array([0.5, 0.1, 0.9])
    expected = 0.5 * ((0.2 - 1) ** 2 + (0.1 - 1) ** 2 + (0.9 - 0.1) ** 2)
    np.testing.assert_allclose(ppo.value_loss(value, old, returns, weight, 0.2), expected, rtol=1e-6)


def test_kl_estimate_is_zero_at_equality_and_positive_elsewhere():
    logp = jnp.array([-1.0, -1.0, -1.0])
    k3 = ppo.kl_to_reference(logp, jnp.array([-1.0, -2.0, -0.5]))
    assert k3[0] == 0 and (k3[1:] > 0).all()


def test_aggregation_decides_the_weight_of_an_episode():
    mask = np.zeros((3, 10), bool)
    mask[0, :2] = mask[1, :8] = True
    token, mean, summed = (ppo.action_weights(mask, name) for name in ppo.AGGREGATIONS)
    np.testing.assert_allclose(token.sum(1), [0.2, 0.8, 0], rtol=1e-6)
    np.testing.assert_allclose(mean.sum(1), [0.5, 0.5, 0], rtol=1e-6)
    np.testing.assert_allclose(summed.sum(1), [1, 4, 0], rtol=1e-6)
    with pytest.raises(ValueError, match="loss_aggregation"):
        ppo.action_weights(mask, "mean")


# ---------------------------------------------------------------------------------------------------------- packing


@pytest.mark.parametrize("order", [None, np.arange(CONTEXT), np.random.default_rng(0).permutation(CONTEXT)])
def test_packing_keeps_every_action_once_and_its_own_history(order):
    episodes = make_episodes()
    seen = np.zeros_like(episodes.action_mask_ET, int)
    back = np.arange(CONTEXT) if order is None else np.argsort(order)
    for micro in ppo.pack(episodes, range(6), rows=2, seq_len=CONTEXT, order=order):
        rows = {name: array if array.ndim == 1 else array[:, back] for name, array in micro.rows.items()}
        places = list(zip(*np.nonzero(micro.used_A), strict=True))
        for place in places:
            e, t = micro.episode_A[place], micro.token_A[place]
            seen[e, t] += 1
            assert micro.rows["target"][place] == episodes.tokens_ET[e, t]
            if order is None:
                row, column = divmod(int(rows["state"][place]), CONTEXT)
            else:
                row, column = place[0], order[place[1]]
            assert rows["positions"][row, column] == t - 1
            assert rows["segment_ids"][row, column] == rows["segment_ids"][row, column + 1 - t] > 0
            np.testing.assert_array_equal(rows["tokens"][row, column - t + 1 : column + 1], episodes.tokens_ET[e, :t])
    np.testing.assert_array_equal(seen, episodes.action_mask_ET)


def test_minibatches_are_a_partition_by_arithmetic():
    parts = list(ppo.minibatches(7, 3, seed=1, iteration=2, purpose=0))
    assert sorted(np.concatenate(parts)) == list(range(7))
    again = list(ppo.minibatches(7, 3, seed=1, iteration=2, purpose=0))
    assert all((a == b).all() for a, b in zip(parts, again, strict=True))


# ----------------------------------------------------------------------------------------------------------- updates


@pytest.fixture(scope="module")
def updated():
    return learner.update(make_state(), make_episodes(), CONFIG, 0)


def test_values_and_log_probabilities_are_read_before_the_token(updated):
    """Alignment against a plain forward pass of one unpacked episode."""
    episodes, state = make_episodes(), make_state()
    _, _, details = updated
    e, length = 1, 24
    tokens = episodes.tokens_ET[e : e + 1, :length]
    places, ones = np.arange(length, dtype=np.int32)[None], np.ones((1, length), np.int32)
    v = np.asarray(value_head.values(state["critic"], tokens, places, ones, MODEL))[0]
    x = qwen2.hidden_states(state["params"], tokens, places, ones, MODEL)[0]
    logp = np.asarray(jax.nn.log_softmax(x @ qwen2.unembedding(state["params"]).T))
    for t in np.flatnonzero(episodes.action_mask_ET[e]):
        np.testing.assert_allclose(details.values_ET[e, t], v[t - 1], atol=1e-5)
        np.testing.assert_allclose(details.logprobs_ET[e, t], logp[t - 1, tokens[0, t]], atol=1e-4)


def actor_gradient(groups, settings=CONFIG.settings, **more):
    """The gradient accumulated over microbatches that are packed from each group of episodes by itself."""
    episodes, params = make_episodes(), make_state()["params"]
    mask = episodes.action_mask_ET
    per_action = dict(
        weight=ppo.action_weights(mask, "token_mean"),
        share=ppo.action_weights(mask, "token_mean"),
        advantage=np.random.default_rng(1).normal(size=mask.shape),
        old_logprob=episodes.logprobs_ET,
        reference_logprob=episodes.logprobs_ET,
        **more,
    )
    total, objective = ppo.zeros_like(params), 0.0
    for members in groups:
        for micro in ppo.pack(episodes, members, rows=2, seq_len=CONTEXT):
            actions = micro.gather(**per_action)
            total, sums = ppo.actor_gradients(params, total, micro.rows, actions, settings=settings)
            objective += float(sums["policy_loss"])
    return total, objective


def test_splitting_and_packing_do_not_change_the_gradient():
    together, objective = actor_gradient([range(6)])
    for groups in ([[e] for e in range(6)], [[4, 1], [0, 5, 3, 2]]):
        apart, other = actor_gradient(groups)
        leaves_close(apart, together, atol=1e-5)
        assert other == pytest.approx(objective, abs=1e-5)


def test_the_reference_pulls_back_when_asked():
    settings = dataclasses.replace(CONFIG.settings, kl_coefficient=1.0)
    with_kl, objective = actor_gradient([range(6)], settings)
    without, plain = actor_gradient([range(6)])
    assert objective == pytest.approx(plain, abs=1e-5)
    assert not np.allclose(with_kl["embedding"], without["embedding"], atol=1e-3)


def test_log_probabilities_and_padding_at_given_tokens_do_not_matter(updated):
    episodes = make_episodes()
    behind = np.arange(CONTEXT)[None] >= episodes.lengths_E[:, None]
    disturbed = dataclasses.replace(
        episodes,
        logprobs_ET=np.where(episodes.action_mask_ET, episodes.logprobs_ET, 99).astype(np.float32),
        tokens_ET=np.where(behind, 5, episodes.tokens_ET).astype(np.int32),
    )
    state, metrics, _ = learner.update(make_state(), disturbed, CONFIG, 0)
    assert metrics == updated[1]
    leaves_close(state["params"], updated[0]["params"], atol=0)
    leaves_close(state["critic"], updated[0]["critic"], atol=0)


def test_masked_episodes_leave_the_update_of_the_surviving_subset():
    """Not a reward of 0, not part of whitening or of a minibatch, not shown to the critic: as if never sampled."""
    config = dataclasses.replace(CONFIG, actor_minibatches=2, critic_minibatches=3)
    masked = make_episodes(masked=(1, 4))
    keep = [0, 2, 3, 5]
    subset = EpisodeArrays(*(getattr(masked, field.name)[keep] for field in dataclasses.fields(EpisodeArrays)))
    a, metrics_a, _ = learner.update(make_state(), masked, config, 0)
    b, metrics_b, _ = learner.update(make_state(), subset, config, 0)
    leaves_close(a["params"], b["params"], atol=0)
    leaves_close(a["critic"], b["critic"], atol=0)
    assert metrics_a == metrics_b
    unmasked, _, _ = learner.update(make_state(), make_episodes(), config, 0)
    assert any(
        not np.allclose(x, y, atol=1e-4)
        for x, y in zip(jax.tree.leaves(unmasked["params"]), jax.tree.leaves(a["params"]), strict=True)
    )


def test_samples_of_other_weights_weigh_what_the_trainer_makes_of_them_up_to_a_cap():
    """Halved in the sampler's books, an action weighs twice as much; the critic is not concerned."""
    plain, _, details = learner.update(make_state(), make_episodes(), CONFIG, 0)
    mask = make_episodes().action_mask_ET

    def updated(shift, cap):
        episodes = make_episodes()
        claimed = np.where(mask, details.logprobs_ET - shift, 0).astype(np.float32)
        config = dataclasses.replace(CONFIG, tis_cap=cap, actor_optimizer=optax.sgd(1.0))
        state = make_state()
        state["params_moments"] = config.actor_optimizer.init(state["params"])
        return learner.update(state, dataclasses.replace(episodes, logprobs_ET=claimed), config, 0)

    start = make_state()["params"]
    steps = {}
    for name, shift, cap in (("same", 0.0, 5.0), ("twice", np.log(2), 5.0), ("capped", np.log(8), 3.0)):
        state, metrics, _ = updated(shift, cap)
        steps[name] = jax.tree.map(lambda new, old: new - old, state["params"], start)
        leaves_close(state["critic"], plain["critic"])
        assert metrics["importance/capped"] == (name == "capped")
        assert metrics["importance/mean"] == pytest.approx(np.exp(shift), rel=1e-4)
    leaves_close(steps["twice"], jax.tree.map(lambda s: 2 * s, steps["same"]), atol=2e-4)  # of up to 1
    leaves_close(steps["capped"], jax.tree.map(lambda s: 3 * s, steps["same"]), atol=2e-4)  # of up to 1


def test_on_policy_the_ratio_is_one_and_nothing_is_clipped(updated):
    metrics = updated[1]
    assert metrics["clip_fraction"] == 0.0
    assert abs(metrics["kl"]) < 1e-6
    assert metrics["logprob_gap/max"] > 0.01  # the sampler's log-probabilities here are made up
    assert {"entropy", "explained_variance", "value_loss", "policy_loss", "actor_grad_norm", "critic_grad_norm"} <= set(
        metrics
    )


def test_critic_only_iterations_leave_the_actor_alone():
    before = make_state()
    expected = jax.device_get(before["params"])
    state, metrics, _ = learner.update(
        before, make_episodes(), dataclasses.replace(CONFIG, critic_warmup_iterations=1), 0
    )
    leaves_close(state["params"], expected, atol=0)
    assert "policy_loss" not in metrics and metrics["value_loss"] > 0


def test_a_batch_without_episodes_changes_nothing():
    before = make_state()
    expected = jax.device_get(before)
    state, metrics, _ = learner.update(before, make_episodes(masked=range(6)), CONFIG, 0)
    leaves_close(state, expected, atol=0)
    assert metrics == {"skipped_updates": 0.0, "guarded_updates": 0.0}


def test_a_gradient_that_is_not_finite_is_skipped():
    state = make_state()
    expected = jax.device_get((state["params"], state["params_moments"]))
    gradient = jax.tree.map(lambda w: jnp.full_like(w, jnp.nan), state["params"])
    params, moments, _, skipped = ppo.apply_gradient(
        state["params"], state["params_moments"], gradient, optimizer=CONFIG.actor_optimizer
    )
    assert bool(skipped)
    leaves_close((params, moments), expected, atol=0)
