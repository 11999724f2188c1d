"""The loss counts exactly the target tokens, however the batch is split, and survives numbers that are not finite."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from stepdr_jax.configuration import check_values
from stepdr_jax.errors import UserError
from stepdr_jax.models import qwen2
from stepdr_jax.sharding.mesh import make_mesh
from stepdr_jax.training import state
from stepdr_jax.training.optimizer import adamw, make_schedule, wsd_schedule
from stepdr_jax.training.program import train_program
from stepdr_jax.training.step import NUM_CAPABILITIES, arrange, gradients, loss_sums, train_step
from tests.training.tiny import VOCAB, Memory, tiny_config

MODEL = qwen2.Qwen2Config(VOCAB, 16, 1, 2, 1, 8, 32, 1e4, 1e-6, True)
OPTIONS = dict(num_sources=2, loss_chunk=48, z_loss=1e-3)


@pytest.fixture(scope="module")
def params():
    return state.initial_params(MODEL, 0)


@functools.cache
def program(**options):
    return jax.jit(functools.partial(gradients, config=MODEL, **(OPTIONS | options)))


def by_hand(params, batch):
    """Sums over targets, token by token, from the whole logits."""
    x = qwen2.hidden_states(params, batch["tokens"], batch["positions"], batch["segment_ids"], MODEL)
    logits = np.asarray(x @ qwen2.unembedding(params).T, np.float64)
    logz = np.log(np.exp(logits).sum(-1))
    nll, weight, total = np.zeros(2), np.zeros(2), 0.0
    B, T = batch["tokens"].shape
    for b in range(B):
        for t in range(T - 1):
            same = batch["segment_ids"][b, t] == batch["segment_ids"][b, t + 1] != 0
            if same and batch["loss_mask"][b, t + 1]:
                loss = logz[b, t] - logits[b, t, batch["tokens"][b, t + 1]]
                nll[batch["source"][b]] += loss
                weight[batch["source"][b]] += 1
                total += loss + OPTIONS["z_loss"] * logz[b, t] ** 2
    return total, nll, weight


def test_loss_is_the_sum_over_targets_inside_segments(params):
    batch = Memory().batch(0)
    batch["loss_mask"][:, 5:9] = False
    total, sums = jax.jit(functools.partial(loss_sums, config=MODEL, **OPTIONS))(params, arrange(batch))
    expected_total, expected_nll, expected_weight = by_hand(params, batch)
    np.testing.assert_array_equal(sums["weight"], expected_weight)
    np.testing.assert_allclose(sums["loss"], expected_nll, rtol=1e-5)
    np.testing.assert_allclose(total, expected_total, rtol=1e-5)


def test_microbatches_of_unequal_weight_give_the_gradient_of_the_whole(params):
    batch = Memory().batch(1)
    batch["loss_mask"][0] = False
    batch["loss_mask"][1, 10:] = False
    whole, sums = program()(params, arrange(batch))
    cut, cut_sums = program(microbatches=2)(params, arrange(batch))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6, rtol=1e-4), cut, whole)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6), cut_sums, sums)


def test_changing_what_is_no_target_and_no_context_changes_no_gradient(params):
    batch = Memory().batch(2)
    expected = program()(params, arrange(batch))[0]
    batch["tokens"] = np.where(batch["segment_ids"] == 0, 1, batch["tokens"])  # padding
    jax.tree.map(np.testing.assert_array_equal, program()(params, arrange(batch))[0], expected)


def test_a_batch_without_targets_moves_nothing_but_the_position(params):
    batch = Memory().batch(3)
    batch["loss_mask"][:] = False
    gradient, sums = program()(params, arrange(batch))
    assert not any(np.any(leaf) for leaf in jax.tree.leaves(gradient))
    assert not np.any(sums["weight"])


def test_losses_of_capabilities_add_up_to_those_of_sources_token_by_token(params):
    batch = Memory().batch(4)
    batch["capability"] = np.where(batch["segment_ids"] == 1, 1, 3)  # two in every row
    batch["capability"][0] = 0
    _, sums = program()(params, arrange(batch))
    weight_BT = arrange(batch)["weight"]
    assert sums["capability_weight"].tolist() == [
        float(weight_BT[batch["capability"] == c].sum()) for c in range(NUM_CAPABILITIES)
    ]
    assert np.count_nonzero(sums["capability_loss"]) == 3
    np.testing.assert_allclose(sums["capability_loss"].sum(), sums["loss"].sum(), rtol=1e-6)


def test_a_gradient_that_is_not_finite_is_skipped_and_counted(params):
    optimizer = adamw(1e-2)
    step = jax.jit(
        functools.partial(train_step, config=MODEL, optimizer=optimizer, clip_norm=1.0, num_sources=2, loss_chunk=64)
    )
    broken = jax.tree.map(jnp.copy, params)
    broken["final_norm"] = broken["final_norm"].at[0].set(jnp.inf)
    before = state.new_state(broken, optimizer, 2)
    after = step(before, arrange(Memory().batch(0)))
    jax.tree.map(np.testing.assert_array_equal, (after.params, after.optimizer), (before.params, before.optimizer))
    assert (int(after.step), int(after.window["skipped"]), int(after.window["steps"])) == (1, 1, 0)
    healthy = step(state.new_state(params, optimizer, 2), arrange(Memory().batch(0)))
    assert (int(healthy.window["skipped"]), int(healthy.window["steps"])) == (0, 1)
    assert np.any(healthy.params["embedding"] != params["embedding"])


def test_schedule_warms_up_holds_and_decays():
    schedule = wsd_schedule(steps=100, warmup_steps=10, decay_share=0.2, learning_rate=1.0, final_learning_rate=0.1)
    rates = [float(schedule(i)) for i in range(100)]
    assert rates[0] == pytest.approx(0.1)
    assert rates[9:80] == [1.0] * 71
    assert rates[90] == pytest.approx(0.55)
    assert rates[99] == pytest.approx(0.145)


def test_the_other_schedules_warm_up_and_then_fall_along_a_cosine_or_hold():
    stage = tiny_config("unused", **{"midtrain1.steps": 110, "midtrain1.warmup_steps": 10}).midtrain1
    stage.update(dict(learning_rate=1.0, final_learning_rate=0.1, schedule="cosine"))
    rates = [float(make_schedule(stage)(i)) for i in range(111)]
    assert rates[0] == pytest.approx(0.1) and rates[9:11] == [1.0, 1.0]
    assert rates[60] == pytest.approx(0.55) and rates[35] == pytest.approx(0.1 + 0.9 * (1 + np.cos(np.pi / 4)) / 2)
    assert rates[110] == pytest.approx(0.1) and sorted(rates[10:], reverse=True) == rates[10:]
    stage.schedule = "constant"
    assert [float(make_schedule(stage)(i)) for i in (0, 9, 60, 109)] == [pytest.approx(0.1), 1.0, 1.0, 1.0]


@pytest.mark.parametrize(
    ("field", "value", "line"),
    [
        ("midtrain1.schedule", "linear", "midtrain1.schedule: expected one of wsd, cosine, constant, got 'linear'"),
        ("profile.steps", (9, 3), r"profile.steps: expected \(first, last\)"),
        ("midtrain1.guard.norm_window", 0, "midtrain1.guard.norm_window: expected a number above 0"),
    ],
)
def test_settings_that_cannot_work_are_named(field, value, line):
    with pytest.raises(UserError, match=line):
        check_values(tiny_config("unused", **{field: value}))


def test_z_loss_reaches_the_objective_from_the_config(params):
    batch = arrange(Memory().batch(0))
    run = {z: program(z_loss=z)(params, batch)[0]["final_norm"] for z in (0.0, 1.0)}
    assert np.abs(run[1.0] - run[0.0]).max() > 1e-4
    config = tiny_config("unused", **{"midtrain1.z_loss": 0.25})
    step = train_program(config, "midtrain1", make_mesh(), vocab_size=VOCAB)[0]
    assert step.__wrapped__.keywords["z_loss"] == 0.25


@pytest.mark.parametrize("steps", [1, 2, 7])
def test_schedule_of_a_training_shorter_than_its_warmup_stays_between_its_rates(steps):
    schedule = wsd_schedule(steps=steps, warmup_steps=50, decay_share=0.3, learning_rate=1.0, final_learning_rate=0.1)
    assert all(0 < float(schedule(i)) <= 1.0 for i in range(steps))
