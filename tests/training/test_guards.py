"""A batch that causes a spike is skipped, or rolled back and left out; the same after a kill."""

import json
import shutil

import jax.numpy as jnp
import numpy as np
import pytest

from stepdr_jax import files
from stepdr_jax.errors import UserError
from stepdr_jax.runtime import checkpoint
from stepdr_jax.runtime.layout import StageLayout
from stepdr_jax.training import guards, loop
from tests.training import tiny
from tests.training.stage_files import checkpoints, rows

OFF = {f"midtrain1.guard.{name}": 0 for name in ("norm_factor", "loss_rise")}
SPIKES = OFF | {"midtrain1.guard.norm_factor": 1.6, "midtrain1.guard.norm_window": 3, "midtrain1.log_every": 2}
SPIKES |= {"midtrain1.steps": 14}  # the same in every test: one program


class Poisoned(tiny.Memory):
    """From batch `first` on, `count` batches repeat one token: every gradient points the same way."""

    def __init__(self, first, count):
        super().__init__()
        self.bad, self.read = range(first, first + count), []

    def batch(self, step, rows=None):
        self.read.append(step)
        batch = super().batch(step, rows)
        if step in self.bad:
            batch["tokens"] = np.full_like(batch["tokens"], 7)
        return batch


def train(run_dir, loader, **overrides):
    config = tiny.tiny_config(run_dir, **overrides)
    return loop.train(config, "midtrain1", loader=loader, vocab_size=tiny.VOCAB)


def layout(run_dir):
    return StageLayout(run_dir / "seed0" / "midtrain1")


def test_a_running_mean_follows_a_lasting_change_and_is_not_moved_by_one_spike():
    limits, norms = guards.NormLimits(factor=4.0, window=10), guards.empty_norm_stats()
    assert float(guards.norm_limit(norms, limits)) == np.inf
    for _ in range(10):
        norms = guards.update_norm_stats(norms, jnp.float32(2.0), limits)
    assert float(guards.norm_limit(norms, limits)) == pytest.approx(8.0)
    spiked = guards.update_norm_stats(norms, jnp.float32(1e6), limits)
    assert float(spiked["mean"]) == pytest.approx(0.9 * 2 + 0.1 * 8)
    for nothing in (jnp.float32(jnp.nan), jnp.float32(jnp.inf), jnp.float32(0)):
        assert guards.update_norm_stats(norms, nothing, limits) == norms
    for _ in range(30):
        norms = guards.update_norm_stats(norms, jnp.float32(100.0), limits)
    assert float(guards.norm_limit(norms, limits)) > 100


def test_a_spike_is_skipped_counted_and_leaves_no_trace(tmp_path):
    done = train(tmp_path, Poisoned(6, 1), **SPIKES)
    assert [row["spikes"] for row in rows(tmp_path)] == [0, 0, 0, 1, 0, 0, 0]
    assert done["steps"] == 14 and not guards.read_rollbacks(layout(tmp_path))


def check_row(monitor, losses, **row):
    guard = tiny.tiny_config("unused").midtrain1.guard
    row = dict(step=10, skipped=0, spikes=0, source_loss=losses) | row
    return monitor.check(guard, row, {name: 100.0 for name in losses})


def test_another_mixture_of_sources_is_no_loss_spike_and_a_jump_of_a_known_one_is():
    monitor = guards.LossMonitor()
    for _ in range(5):
        assert check_row(monitor, {"easy": 0.5}) is None
    assert check_row(monitor, {"hard": 9.0}) is None
    assert check_row(monitor, {"easy": 0.6, "hard": 5.0}) is None
    assert "above its running mean" in check_row(monitor, {"easy": 2.6})
    assert "5 steps skipped" in check_row(monitor, {"easy": 0.5}, spikes=2, skipped=3)


def test_a_checkpoint_is_good_once_the_log_row_that_covers_it_was_sane():
    monitor = guards.LossMonitor()
    monitor.checkpoint_saved(10, checked=True)
    monitor.checkpoint_saved(15, checked=False)
    assert monitor.good_step == 10
    assert check_row(monitor, {"easy": 0.5}, spikes=9) and monitor.good_step == 10
    assert check_row(monitor, {"easy": 0.5}) is None and monitor.good_step == 15
    assert guards.LossMonitor.restore(json.loads(json.dumps(monitor.as_dict())), []) == monitor


def test_batches_read_before_a_rollback_are_never_read_again():
    def positions(*rollbacks):
        rollbacks = [guards.Rollback(at, to, "") for at, to in rollbacks]
        return [guards.data_position(rollbacks, step) for step in (0, 4, 5, 9, 10, 15)]

    assert positions() == [0, 4, 5, 9, 10, 15]
    assert positions((20, 10)) == [0, 4, 5, 9, 20, 25]
    assert positions((20, 10), (15, 10)) == [0, 4, 5, 9, 25, 30]
    assert positions((20, 10), (12, 5)) == [0, 4, 22, 26, 27, 32]  # batches 10 to 19 stay unread after the second


ROLLED_BACK = SPIKES | {"midtrain1.guard.max_skips": 2, "midtrain1.checkpoint_every": 4}


@pytest.fixture(scope="module")
def rolled_back(tmp_path_factory):
    """A run whose batches 8 to 10 are poisoned: rows end at even steps, checkpoints at multiples of 4."""
    run_dir, loader = tmp_path_factory.mktemp("rolled_back"), Poisoned(8, 3)
    return run_dir, train(run_dir, loader, **ROLLED_BACK), loader


def test_two_spikes_in_a_log_row_roll_the_run_back_and_leave_out_their_data(rolled_back):
    run_dir, done, loader = rolled_back
    [rollback] = guards.read_rollbacks(layout(run_dir))
    assert (rollback.at, rollback.to, rollback.complete) == (10, 8, True)
    assert rollback.reason == "2 steps skipped (0 not finite, 2 gradient spikes)"
    assert loader.read[:11] == list(range(11)) and loader.read[11:] == list(range(10, 16))
    assert [row["step"] for row in rows(run_dir)] == [2, 4, 6, 8, 10, 12, 14]
    assert [row["spikes"] for row in rows(run_dir)] == [0, 0, 0, 0, 1, 0, 0]  # batch 10 is poisoned too, and alone
    assert done["steps"] == 14


KILLED = ROLLED_BACK | {
    "midtrain1.guard.max_skips": 1,
    "midtrain1.checkpoint_every": 3,
    "checkpointing.background": False,
}


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A run that rolls back more than once, uninterrupted."""
    run_dir = tmp_path_factory.mktemp("whole")
    return run_dir, train(run_dir, Poisoned(8, 3), **KILLED)


@pytest.mark.parametrize("written", [False, True])
def test_a_run_killed_during_a_rollback_ends_with_the_same_bits(tmp_path, whole, monkeypatch, written):
    """Killed before the rollback is recorded, and after that but before the checkpoints that it undoes are removed."""

    class Killed(BaseException):
        pass

    def die(*_, **__):
        raise Killed

    monkeypatch.setattr(checkpoint if written else guards, "remove_after" if written else "record_rollback", die)
    with pytest.raises(Killed):
        train(tmp_path, Poisoned(8, 3), **KILLED)
    monkeypatch.undo()
    assert checkpoint.saved_steps(checkpoints(tmp_path))[-1] == 9  # after the spike: training must not continue from it
    assert len(guards.read_rollbacks(layout(tmp_path))) == written
    assert train(tmp_path, Poisoned(8, 3), **KILLED)["params_sha256"] == whole[1]["params_sha256"]
    assert guards.read_rollbacks(layout(tmp_path)) == guards.read_rollbacks(layout(whole[0]))
    assert rows(tmp_path) == rows(whole[0])


def test_a_run_killed_after_a_rollback_leaves_out_the_same_data(tmp_path, rolled_back):
    shutil.copytree(rolled_back[0], tmp_path / "cut")
    layout(tmp_path / "cut").done.unlink()
    checkpoint.remove_after(checkpoints(tmp_path / "cut"), 12)
    loader = Poisoned(8, 3)
    assert train(tmp_path / "cut", loader, **ROLLED_BACK)["params_sha256"] == rolled_back[1]["params_sha256"]
    assert loader.read == [14, 15]


def test_a_loss_that_jumps_rolls_the_run_back(tmp_path):
    """Without a limit on norms the model learns from the poisoned batches, and the loss of the next rows rises."""
    guard = {"loss_rise": 0.5, "loss_window": 2, "max_rollbacks": 1}
    overrides = OFF | {f"midtrain1.guard.{name}": value for name, value in guard.items()}
    overrides |= {"midtrain1.learning_rate": 0.2, "midtrain1.log_every": 1, "midtrain1.checkpoint_every": 2}
    with pytest.raises(UserError, match=r"above its running mean at step \d+, after 1 rollbacks; lower"):
        train(tmp_path, Poisoned(6, 99), **overrides | {"midtrain1.steps": 40})
    [rollback] = guards.read_rollbacks(layout(tmp_path))
    assert rollback.to <= rollback.at - 1 and "nats per token" in rollback.reason


def test_without_rollbacks_spikes_are_only_counted_until_no_step_is_applied(tmp_path):
    never = SPIKES | {"midtrain1.guard.max_rollbacks": 0, "midtrain1.guard.max_skips": 1}
    train(tmp_path / "one", Poisoned(6, 1), **never)
    assert sum(row["spikes"] for row in files.read_jsonl(layout(tmp_path / "one").metrics)) == 1
    with pytest.raises(UserError, match=r"2 steps skipped .* after 0 rollbacks; lower"):
        train(tmp_path / "all", Poisoned(6, 2), **never)
