"""The logs of a stage: metrics rows, the event log, TensorBoard files, traces, and throughput."""

import builtins
import json
import os
import struct
import subprocess
import sys
import time
from pathlib import Path

import pytest
from tensorboardX.proto.event_pb2 import Event

from stepdr_jax import files
from stepdr_jax.errors import UserError
from stepdr_jax.models.flops import peak_flops, training_flops
from stepdr_jax.models.sizes import SIZES
from stepdr_jax.runtime import writers
from stepdr_jax.runtime.layout import StageLayout
from stepdr_jax.training import metrics
from tests.training import tiny, traced


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    run_dir = tmp_path_factory.mktemp("run")
    command = [sys.executable, str(Path(traced.__file__)), str(run_dir)]
    environment = os.environ | {"JAX_PLATFORMS": "cpu"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    home = run_dir / "seed0" / "midtrain1"
    return home, json.loads(done.stdout), files.read_jsonl(home / "metrics.jsonl")


def test_losses_by_capability_and_family_are_those_of_the_same_tokens(run):
    for row in run[2]:
        assert row["capability_loss"].keys() == {"planning", "deep_search"}  # tiny's first and second segments
        assert row["family_loss"] == {
            family: row["source_loss"][source] for source, family in (("up", "search"), ("down", "research"))
        }
        assert min(row["source_loss"].values()) <= row["loss"] <= max(row["source_loss"].values())
        assert min(row["capability_loss"].values()) <= row["loss"] <= max(row["capability_loss"].values())


def test_heldout_loss_is_measured_on_schedule_and_at_the_end(run):
    assert [row["step"] for row in run[2] if "heldout_loss" in row] == [6, 12]
    assert all(row["heldout_loss"].keys() == {"up", "down"} for row in run[2] if "heldout_loss" in row)


def test_traces_are_written_when_planned_when_a_file_asks_and_when_a_signal_does(run):
    asked = [
        [event["first"], event["step"]]
        for event in files.read_jsonl(run[0] / "events.jsonl")
        if event["event"] == "profile"
    ]
    assert [2, 3] in asked and len(asked) == 3
    assert not (run[0] / "profile").exists()
    for first, _ in asked:
        [trace] = (run[0] / "profiles" / f"{first:08d}").rglob("*.xplane.pb")
        assert trace.stat().st_size > 1000


def test_the_event_file_holds_the_rows(run):
    [path] = (run[0] / "tensorboard").iterdir()
    data, found, at = path.read_bytes(), {}, 0
    while at < len(data):
        (size,) = struct.unpack_from("<Q", data, at)
        event = Event.FromString(data[at + 12 : at + 12 + size])
        found |= {(value.tag, event.step): value.simple_value for value in event.summary.value}
        at += 16 + size
    for row in run[2]:
        assert found["loss", row["step"]] == pytest.approx(row["loss"], rel=1e-6)
        assert found["source_loss/up", row["step"]] == pytest.approx(row["source_loss"]["up"], rel=1e-6)


def test_the_event_log_has_every_start_and_the_end(run):
    events = files.read_jsonl(run[0] / "events.jsonl")
    assert [event["event"] for event in events if event["event"] in ("start", "end")] == ["start", "end"]
    assert events[0]["step"] == 0 and events[-1]["step"] == 12
    assert all(a["time"] <= b["time"] for a, b in zip(events, events[1:], strict=False))


def test_weights_and_biases_that_is_not_installed_is_named_with_its_fix(tmp_path, monkeypatch):
    real = builtins.__import__

    def without(name, *rest):
        if name == "wandb":
            raise ImportError(name)
        return real(name, *rest)

    monkeypatch.setattr(builtins, "__import__", without)
    config = tiny.tiny_config(tmp_path, **{"log.wandb_project": "mine"})
    with pytest.raises(UserError, match=r"log.wandb_project: .* is not installed; .* pip install wandb"):
        writers.StageWriters(StageLayout(tmp_path), config, 0)


def test_weights_and_biases_takes_rows_offline(tmp_path, monkeypatch):
    pytest.importorskip("wandb", reason="Weights & Biases is not installed")
    monkeypatch.setenv("WANDB_MODE", "offline")
    writer = writers.StageWriters(StageLayout(tmp_path), tiny.tiny_config(tmp_path, **{"log.wandb_project": "mine"}), 0)
    writer.write_row({"step": 3, "loss": 1.5, "source_loss": {"up": 2.0}})
    writer.close()
    assert b"source_loss/up" in next(tmp_path.rglob("*.wandb")).read_bytes()


def test_throughput_counts_no_compilation_and_no_step_of_another_process():
    meter = metrics.ThroughputMeter(productive=30.0, first_start=time.time() - 100.0, peak_flops=1e6)
    for seconds in (50.0, 1.0, 1.0, 4.0):
        meter.record_step(seconds)
    row = meter.timings(steps=6, tokens=600.0, flops=6e5, remaining=10)
    assert row["tokens_per_second"] == 50.0  # 100 a step, three steps in 6 s
    assert row["step_seconds"] == {"median": 1.0, "p90": 3.4, "largest": 4.0}
    assert row["mfu"] == 0.05 and row["eta_seconds"] == 20.0
    assert row["goodput"] == pytest.approx(0.36, abs=1e-3)
    assert meter.timings(steps=6, tokens=600.0, flops=6e5, remaining=0)["mfu"] is None


def test_a_clock_that_was_set_back_leaves_goodput_unknown():
    meter = metrics.ThroughputMeter(productive=30.0, first_start=time.time() + 3600, peak_flops=None)
    assert meter.timings(steps=1, tokens=1.0, flops=1.0, remaining=0)["goodput"] is None


def test_model_flops_are_those_of_the_planner_for_one_segment_and_less_for_short_ones():
    from stepdr_jax.aot import roofline

    model, context = SIZES["32B"], 4096
    work = roofline.work_of(model, seq_len=context, batch_size=1, remat="none", strategy="none", shards=1, zigzag=False)
    whole = training_flops(model, tokens=context, pairs=context * (context + 1) / 2)
    assert whole == pytest.approx(work.model)
    halves = training_flops(model, tokens=context, pairs=2 * (context // 2) * (context // 2 + 1) / 2)
    assert whole - halves == pytest.approx(work.model_attention / 2, rel=1e-3)


def test_the_peak_of_a_processor_is_unknown():
    import jax

    assert peak_flops(jax.devices("cpu")) is None
