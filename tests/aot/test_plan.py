"""The planner end to end: small programs compiled for real TPU slices, and what a person gets wrong."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from configs import midtrain_128k, miniature
from launch import entry
from launch import plan as planner
from stepdr_jax.aot import collectives, compile, plan, report, search
from stepdr_jax.errors import UserError
from stepdr_jax.sharding import topology

REPOSITORY = Path(__file__).resolve().parents[2]
needs_libtpu = pytest.mark.skipif(not importlib.util.find_spec("libtpu"), reason="needs libtpu: pip install -e .[tpu]")
QUICK = plan.Settings(quick=True, limit=240)


def tiny(**stage):
    """Two layers of a real head size over four devices, as the planner takes them."""
    config = miniature.get_config().unlock()
    config.model.update(
        dict(hidden_size=256, num_heads=2, num_kv_heads=2, head_dim=128, intermediate_size=512, dtype="bfloat16")
    )
    config.mesh.update(dict(data=1, fsdp=2, context=2, tensor=1))
    config.parallel.update(dict(context_strategy="ring", remat="layer"))
    config.midtrain2.update(dict(seq_len=2048, batch_size=2) | stage)
    return config.lock()


def run(*words):
    environment = {**os.environ, "JAX_PLATFORMS": "cpu", "COLUMNS": "120"}
    command = [sys.executable, "-m", "launch.plan", *words]
    return subprocess.run(command, cwd=REPOSITORY, env=environment, capture_output=True, text=True, timeout=300)


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    if not importlib.util.find_spec("libtpu"):
        pytest.skip("needs libtpu: pip install -e .[tpu]")
    cache = tmp_path_factory.mktemp("plans")
    settings = plan.Settings(quick=True, limit=240, cache=cache)
    slices = topology.parse("v5p:2x2x1")
    found = plan.plan(tiny(), "midtrain2", slices, ["train", "eval"], settings)
    return found, settings, slices


def test_a_plan_states_memory_transfers_flops_and_an_estimate(made):
    found, _, _ = made
    train = found["programs"]["train"]
    assert found["fits"] and train["memory"]["total"] < found["limit_bytes"]
    assert train["memory"]["aliased"] == pytest.approx(train["memory"]["arguments"], rel=0.1)  # the state is donated
    assert found["programs"]["eval"]["memory"]["total"] < train["memory"]["total"]
    assert {"collective-permute", "all-gather"} <= {t["kind"] for t in train["collectives"]}
    assert train["estimate"]["stage_tokens"] == 1200 * 2 * 2048
    assert "days" not in found["programs"]["eval"]["estimate"]


def test_the_ring_of_the_planned_step_is_hidden(made):
    train = made[0]["programs"]["train"]
    hops = [t for t in train["collectives"] if t["kind"] == "collective-permute" and t["kernels"]]
    assert hops and all(t["axes"] == ["context"] and t["hidden"] for t in hops)
    assert not [s for s in train["lint"] if "synchronous permute" in s or "all-reduce" in s]


def test_a_plan_is_plain_data_and_reads_on_a_terminal(made):
    found, _, _ = made
    assert json.loads(json.dumps(found)) == found
    shown = report.text(found)
    assert "FITS" in shown and "ESTIMATE, not measured" in shown and max(map(len, shown.splitlines())) <= 120


def test_a_finished_compilation_is_not_done_again(made, monkeypatch):
    found, settings, slices = made
    monkeypatch.setattr(compile, "_run", lambda *_: pytest.fail("compiled again"))
    assert plan.plan(tiny(), "midtrain2", slices, ["train", "eval"], settings) == found


def test_the_key_of_a_result_covers_every_field_it_depends_on():
    def key(config, **fields):
        return compile.Request(config, "midtrain2", **(dict(program="train", topology="v5p:2x2x1") | fields)).key()

    keys = [key(tiny()), key(tiny(batch_size=4)), key(tiny(), program="eval"), key(tiny(), topology="v6e:2x2")]
    assert len(set(keys)) == 4 and key(tiny()) == keys[0]


@needs_libtpu
def test_what_does_not_fit_says_so_with_a_context_that_does():
    slices = topology.parse("v5e:2x2")
    wide = tiny(seq_len=2**20).unlock()
    wide.model.update(dict(num_layers=8, hidden_size=1024, intermediate_size=4096))
    config = plan.changed(wide.lock(), "midtrain2", parallel=dict(context_strategy="all_gather", remat="none"))
    found = plan.plan(config, "midtrain2", slices, ["train"], QUICK)
    train = found["programs"]["train"]
    assert not found["fits"] and train["shortage"]["needed"] > train["shortage"]["limit"]
    assert any(s.startswith("midtrain2.seq_len=") and "fits (compiled)" in s for s in train["advice"])
    assert any("parallel.remat=" in s for s in train["advice"])
    assert "DOES NOT FIT" in report.text(found)


@needs_libtpu
def test_from_the_command_line_to_a_file(tmp_path):
    words = ["--topology=v5p:2x2x1", "--programs=eval", "--quick", f"--json={tmp_path}/plan.json", "--cache="]
    words += [f"--config.{name}" for name in ("mesh.fsdp=4", "midtrain2.seq_len=512", "model.head_dim=128")]
    done = run(*words)
    assert done.returncode == 0, done.stderr
    assert "eval step: FITS" in done.stdout
    assert json.loads((tmp_path / "plan.json").read_text())["mesh"]["fsdp"] == 4


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ([], "--topology=v5p:4x4x8"),
        (["--topology=v5q:4x4"], "did you mean"),
        (["--topology=v5p:4x4x8"], "128 devices of v5p:4x4x8"),
        (["--topology=v5p:2x2x1", "--config.mesh.fsdp=4", "--programs=trian"], "train, eval"),
        (["--topology=v5p:2x2x1", "--stage=midtrain3"], "midtrain1, midtrain2, sft"),
    ],
)
def test_mistakes_are_one_line_that_names_the_fix(words, said):
    with pytest.raises(UserError, match=said) as raised:
        planner.main(entry.parse(["plan", *words]))
    assert "\n" not in str(raised.value)


@needs_libtpu
def test_a_sequence_that_does_not_divide_is_one_line():
    with pytest.raises(UserError, match="context: expected a multiple of .* got 2046") as raised:
        plan.plan(tiny(seq_len=2046), "midtrain2", topology.parse("v5p:2x2x1"), ["train"], QUICK)
    assert "\n" not in str(raised.value)


def test_candidates_of_a_search_are_possible_and_ranked():
    slices = topology.parse("v5p:4x4x8")
    config = midtrain_128k.get_config()
    ranked = search.candidates(config, "midtrain2", slices)
    seconds = [s for s, _ in ranked]
    assert seconds == sorted(seconds) and len(ranked) > 20
    for _, other in ranked:
        topology.check_mesh(slices, other.mesh)
        assert other.midtrain2.batch_size % (other.mesh.data * other.mesh.fsdp) == 0
    assert config.mesh.fsdp == 8  # the config that was given is as it was


def test_the_front_is_what_nothing_beats_in_both():
    def made_up(rate, held):
        train = dict(status="fits", memory=dict(total=held), estimate=dict(tokens_per_second_per_chip=rate))
        return dict(fits=True, programs=dict(train=train))

    plans = [made_up(10, 5), made_up(9, 4), made_up(9, 6), made_up(3, 4), dict(fits=False, programs=dict(train={}))]
    assert search.front(plans) == plans[:2]


@pytest.mark.parametrize(
    ("name", "slices"),
    [
        ("midtrain_128k", "v5p-256"),
        ("midtrain_32k", "v5p-256"),
        ("sft_128k", "v5p-256"),
        ("midtrain_128k_v5p_512", "v5p:8x8x8"),
        ("midtrain_128k_v5e_256", "v5e-256"),
        ("midtrain_128k_v6e_256", "v6e-256"),
        ("midtrain_128k_tpu7x_64", "tpu7x:4x4x4"),
    ],
)
def test_configs_of_pods_have_the_fields_of_the_miniature_and_the_mesh_of_their_slice(name, slices):
    config = entry.load(REPOSITORY / "configs" / f"{name}.py")
    topology.check_mesh(topology.parse(slices), config.mesh)
    assert plan.model_of(config).vocab_size == 152064
    for stage in ("midtrain1", "midtrain2", "sft"):
        rows = config.mesh.data * config.mesh.fsdp * config[stage].microbatches
        assert config[stage].batch_size % rows == 0


def test_stage_one_reads_the_papers_tokens_and_saves_every_five_billion():
    for name in ("midtrain_128k", "midtrain_32k"):
        stage = entry.load(REPOSITORY / "configs" / f"{name}.py").midtrain1
        tokens = stage.batch_size * stage.seq_len
        assert stage.seq_len == 32768
        assert stage.steps * tokens == pytest.approx(150e9, rel=1e-4)
        assert stage.checkpoint_every * tokens == pytest.approx(5e9, rel=1e-3)


@needs_libtpu
def test_the_loss_of_32b_at_64_layers_and_128k_fits_on_128_chips():
    found = plan.plan(midtrain_128k.get_config(), "midtrain2", topology.parse("v5p:4x4x8"), ["eval"], QUICK)
    held = found["programs"]["eval"]
    assert held["memory"]["arguments"] + held["memory"]["temporaries"] < 5 * 2**30  # parameters alone are 0.95
    hops = [t for t in held["collectives"] if t["kind"] == "collective-permute" and t["bytes"] > 2**24]
    assert hops and all(t["hidden"] for t in hops)
    assert sum(t["times"] for t in hops) == 64 * 16  # layers x transfers; the last brings keys home


@pytest.mark.aot
@needs_libtpu
@pytest.mark.parametrize("quick", [True, False])
def test_32b_at_128k_on_128_chips_of_v5p(quick):
    """13 GiB a chip; hops hidden; gradients reduce-scattered. Quick and full compilation agree."""
    config, slices = midtrain_128k.get_config(), topology.parse("v5p:4x4x8")
    request = compile.Request(config, "midtrain2", "train", str(slices), quick=quick)
    result = compile.compile_program(request, limit=900)
    held = result["memory"]
    assert held["arguments"] + held["temporaries"] <= 13.0 * 2**30
    assert result["rss_bytes"] < 3 * 2**30
    hops = [t for t in result["collectives"] if t["kind"] == "collective-permute" and t["bytes"] >= 2**24]
    assert len(hops) >= 6 and all(t["hidden"] and t["kernels"] for t in hops)
    smallest = config.model.hidden_size * config.model.num_kv_heads * config.model.head_dim
    assert not [s for s in collectives.lint(result["collectives"], smallest) if "all-reduce" in s or "synchronous" in s]


@pytest.mark.aot
@needs_libtpu
@pytest.mark.parametrize("name", ["train", "eval"])
def test_stopping_before_code_changes_nothing_but_code(name):
    def result(quick):
        return compile.compile_program(compile.Request(tiny(), "midtrain2", name, "v5p:2x2x1", quick=quick), limit=400)

    early, whole = result(True), result(False)
    assert early["collectives"] == whole["collectives"] and early["hlo_sha256"] == whole["hlo_sha256"]
    for kind in ("arguments", "aliased", "temporaries"):
        assert early["memory"][kind] == pytest.approx(whole["memory"][kind], abs=2**15)  # code generation rounds up
