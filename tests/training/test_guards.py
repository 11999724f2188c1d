"""A batch that would throw the run off is skipped, or undone and read past; the same again after a kill."""

import json
import shutil

import jax.numpy as jnp
import numpy as np
import pytest

from stepdr_jax import files
from stepdr_jax.errors import UserError
from stepdr_jax.runtime import checkpoint
from stepdr_jax.training import guards, loop
from tests.training import tiny
from tests.training.test_resume import checkpoints, rows

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


def home(run_dir):
    return run_dir / "seed0" / "midtrain1"


def test_a_running_mean_follows_a_lasting_change_and_is_not_moved_by_one_spike():
    limits, norms = guards.NormLimits(factor=4.0, window=10), guards.empty_norms()
    assert float(guards.norm_limit(norms, limits)) == np.inf
    for _ in range(10):
        norms = guards.updated(norms, jnp.float32(2.0), limits)
    assert float(guards.norm_limit(norms, limits)) == pytest.approx(8.0)
    spiked = guards.updated(norms, jnp.float32(1e6), limits)
    assert float(spiked["mean"]) == pytest.approx(0.9 * 2 + 0.1 * 8)
    for nothing in (jnp.float32(jnp.nan), jnp.float32(jnp.inf), jnp.float32(0)):
        assert guards.updated(norms, nothing, limits) == norms
    for _ in range(30):
        norms = guards.updated(norms, jnp.float32(100.0), limits)
    assert float(guards.norm_limit(norms, limits)) > 100


def test_a_spike_is_skipped_counted_and_leaves_no_trace(tmp_path):
    done = train(tmp_path, Poisoned(6, 1), **SPIKES)
    assert [row["spikes"] for row in rows(tmp_path)] == [0, 0, 0, 1, 0, 0, 0]
    assert done["steps"] == 14 and not guards.read_rewinds(home(tmp_path))


def judged(watch, losses, **row):
    guard = tiny.tiny_config("unused").midtrain1.guard
    row = dict(step=10, skipped=0, spikes=0, source_loss=losses) | row
    return watch.judge(guard, row, {name: 100.0 for name in losses})


def test_another_mixture_of_sources_is_no_loss_spike_and_a_jump_of_a_known_one_is():
    watch = guards.Watch()
    for _ in range(5):
        assert judged(watch, {"easy": 0.5}) is None
    assert judged(watch, {"hard": 9.0}) is None
    assert judged(watch, {"easy": 0.6, "hard": 5.0}) is None
    assert "above its running mean" in judged(watch, {"easy": 2.6})
    assert "5 steps skipped" in judged(watch, {"easy": 0.5}, spikes=2, skipped=3)


def test_a_checkpoint_is_good_once_the_log_row_that_covers_it_was_sane():
    watch = guards.Watch()
    watch.saved(10, judged=True)
    watch.saved(15, judged=False)
    assert watch.good == 10
    assert judged(watch, {"easy": 0.5}, spikes=9) and watch.good == 10
    assert judged(watch, {"easy": 0.5}) is None and watch.good == 15
    assert guards.Watch.after([], json.loads(json.dumps(watch.as_dict()))) == watch


def test_what_was_read_on_the_way_to_a_spike_is_never_read_again():
    def positions(*rewinds):
        rewinds = [guards.Rewind(at, to, "") for at, to in rewinds]
        return [guards.data_position(rewinds, step) for step in (0, 4, 5, 9, 10, 15)]

    assert positions() == [0, 4, 5, 9, 10, 15]
    assert positions((20, 10)) == [0, 4, 5, 9, 20, 25]
    assert positions((20, 10), (15, 10)) == [0, 4, 5, 9, 25, 30]
    assert positions((20, 10), (12, 5)) == [0, 4, 22, 26, 27, 32]  # batches 10 to 19 stay unread after the second


REWOUND = SPIKES | {"midtrain1.guard.max_skips": 2, "midtrain1.checkpoint_every": 4}


@pytest.fixture(scope="module")
def rewound(tmp_path_factory):
    """A run whose batches 8 to 10 are poisoned: rows end at even steps, checkpoints at multiples of 4."""
    run_dir, loader = tmp_path_factory.mktemp("rewound"), Poisoned(8, 3)
    return run_dir, train(run_dir, loader, **REWOUND), loader


def test_two_spikes_in_a_row_of_the_log_take_the_run_back_past_their_data(rewound):
    run_dir, done, loader = rewound
    [rewind] = guards.read_rewinds(home(run_dir))
    assert (rewind.at, rewind.to, rewind.complete) == (10, 8, True)
    assert rewind.reason == "2 steps skipped (0 not finite, 2 gradient spikes)"
    assert loader.read[:11] == list(range(11)) and loader.read[11:] == list(range(10, 16))
    assert [row["step"] for row in rows(run_dir)] == [2, 4, 6, 8, 10, 12, 14]
    assert [row["spikes"] for row in rows(run_dir)] == [0, 0, 0, 0, 1, 0, 0]  # batch 10 is poisoned too, and alone
    assert done["steps"] == 14


KILLED = REWOUND | {"midtrain1.guard.max_skips": 1, "midtrain1.checkpoint_every": 3, "checkpointing.background": False}


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A run that goes back more than once, uninterrupted."""
    run_dir = tmp_path_factory.mktemp("whole")
    return run_dir, train(run_dir, Poisoned(8, 3), **KILLED)


@pytest.mark.parametrize("written", [False, True])
def test_a_run_killed_while_it_goes_back_ends_with_the_same_bits(tmp_path, whole, monkeypatch, written):
    """Killed before the return is written down, and after it but before the checkpoints it undoes are gone."""

    class Killed(BaseException):
        pass

    def die(*_, **__):
        raise Killed

    monkeypatch.setattr(checkpoint if written else guards, "remove_after" if written else "go_back", die)
    with pytest.raises(Killed):
        train(tmp_path, Poisoned(8, 3), **KILLED)
    monkeypatch.undo()
    assert checkpoint.steps(checkpoints(tmp_path))[-1] == 9  # past the spike: not to be continued from
    assert len(guards.read_rewinds(home(tmp_path))) == written
    assert train(tmp_path, Poisoned(8, 3), **KILLED)["params_sha256"] == whole[1]["params_sha256"]
    assert guards.read_rewinds(home(tmp_path)) == guards.read_rewinds(home(whole[0]))
    assert rows(tmp_path) == rows(whole[0])


def test_a_kill_after_going_back_reads_on_past_the_same_data(tmp_path, rewound):
    shutil.copytree(rewound[0], tmp_path / "cut")
    (home(tmp_path / "cut") / "done.json").unlink()
    checkpoint.remove_after(checkpoints(tmp_path / "cut"), 12)
    loader = Poisoned(8, 3)
    assert train(tmp_path / "cut", loader, **REWOUND)["params_sha256"] == rewound[1]["params_sha256"]
    assert loader.read == [14, 15]


def test_a_loss_that_jumps_takes_the_run_back(tmp_path):
    """Without a limit on norms the poison is learnt, and the next rows pay for it."""
    guard = {"loss_rise": 0.5, "loss_window": 2, "max_rollbacks": 1}
    overrides = OFF | {f"midtrain1.guard.{name}": value for name, value in guard.items()}
    overrides |= {"midtrain1.learning_rate": 0.2, "midtrain1.log_every": 1, "midtrain1.checkpoint_every": 2}
    with pytest.raises(UserError, match=r"above its running mean at step \d+, after going back 1 times; lower"):
        train(tmp_path, Poisoned(6, 99), **overrides | {"midtrain1.steps": 40})
    [rewind] = guards.read_rewinds(home(tmp_path))
    assert rewind.to <= rewind.at - 1 and "nats per token" in rewind.reason


def test_without_leave_to_go_back_spikes_are_only_counted_until_no_step_is_taken(tmp_path):
    never = SPIKES | {"midtrain1.guard.max_rollbacks": 0, "midtrain1.guard.max_skips": 1}
    train(tmp_path / "one", Poisoned(6, 1), **never)
    assert sum(row["spikes"] for row in files.read_jsonl(home(tmp_path / "one") / "metrics.jsonl")) == 1
    with pytest.raises(UserError, match=r"2 steps skipped .* after going back 0 times; lower"):
        train(tmp_path / "all", Poisoned(6, 2), **never)
