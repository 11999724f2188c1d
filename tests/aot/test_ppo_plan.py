"""The plan of PPO: what each phase holds, how many episodes fit, bounds of the sampler, what a person gets wrong, the
presets."""

import copy
import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from configs import miniature, ppo_128k, ppo_128k_disaggregated, ppo_128k_v5p_256, ppo_presets
from launch import entry
from launch import plan as planner
from stepdr_jax.aot import plan, ppo, ppo_plan, ppo_report, ppo_speed
from stepdr_jax.errors import UserError
from stepdr_jax.sharding import topology

REPOSITORY = Path(__file__).resolve().parents[2]
needs_libtpu = pytest.mark.skipif(not importlib.util.find_spec("libtpu"), reason="needs libtpu: pip install -e .[tpu]")
GIB = 2**30
SLICES = topology.parse("v5p:4x4x8")


def changed(config, **fields):
    """`config` with fields by dotted names, dots written as two underscores."""
    other = copy.deepcopy(config).unlock()
    for name, value in fields.items():
        section, field = name.split("__")
        other[section][field] = value
    return other.lock()


def made_up(name):
    """A compiled program with sizes in whole GiB: actor and critic 1 and their moments 2, the sampler's weights 15."""
    sizes = {"moments": 2, "weights": 1, "gradient": 1}
    buffers = {buffer: sizes.get(buffer.split()[-1], 0) * GIB for buffer in ppo.ARGUMENTS[name]}
    if name in ppo.SAMPLER:
        buffers |= {"sampler weights": 15 * GIB, "pages": 64 * GIB}
    temporaries = {"actor": 10, "critic": 9, "decode": 1}.get(name, 0) * GIB
    arguments = sum(buffers.values())
    memory = dict(arguments=arguments, outputs=0, aliased=0, temporaries=temporaries, total=arguments + temporaries)
    return dict(
        status="fits",
        argument_bytes=buffers,
        memory=memory,
        collectives=[],
        host_devices=4,
        compile_seconds=1.0,
        lower_seconds=1.0,
    )


HELD = {name: made_up(name) for name in ppo_plan.PROGRAMS}


def totals(config, offload):
    return {row["phase"]: row["total"] / GIB for row in ppo_plan.phases(config, offload, HELD)}


def test_a_colocated_sampler_and_the_learner_hold_their_memory_by_turns():
    config = ppo_128k.get_config()
    none, idle = totals(config, "none"), totals(config, "idle")
    assert none["sampling"] == 6 + 15 + 64 + 1 and idle["sampling"] == 15 + 64 + 1
    assert none["actor learns"] == 6 + 1 + 10 and idle["actor learns"] == 3 + 1 + 10
    assert none["critic learns"] == 6 + 1 + 9 and idle["critic learns"] == 3 + 1 + 9
    assert idle["old values"] == 1 and none["old values"] == 6
    assert none["weights on their way"] == 6 + 15 and idle["weights on their way"] == 1 + 15


def test_a_disaggregated_sampler_shares_no_chip_with_the_learner():
    found = ppo_plan.phases(ppo_128k_disaggregated.get_config(), "none", HELD)
    where = {row["phase"]: row["device"] for row in found}
    assert where.pop("sampling") == "sampler" and set(where.values()) == {"learner"}
    assert totals(ppo_128k_disaggregated.get_config(), "none")["sampling"] == 15 + 64 + 1


def test_copies_of_the_actor_are_counted_where_the_settings_ask_for_them():
    config = ppo_128k_disaggregated.get_config()
    more = changed(config, ppo__kl_coefficient=0.1, ppo__staleness=1)
    assert totals(more, "none")["actor learns"] == totals(config, "none")["actor learns"] + 2


@pytest.fixture
def compiled(monkeypatch):
    monkeypatch.setattr(ppo_plan, "_compiled", lambda config, slices, name, settings: HELD[name])
    return lambda config: ppo_plan.plan(config, SLICES, plan.Settings(), ppo_plan.Load.from_config(config))


def test_as_many_pages_as_are_said_to_fit_do_and_no_more(compiled):
    config = ppo_128k.get_config()
    none, idle = compiled(config)["placements"]
    for placement in (none, idle):
        beside = placement["sampling_bytes"] - 64 * GIB
        held = lambda pages, p=placement: beside + pages * p["page_bytes"]  # noqa: E731, B023
        assert held(placement["pages_that_fit"]) <= SLICES.generation.hbm < held(placement["pages_that_fit"] + 1)
    assert none["pages"] == 8192 and none["page_bytes"] == 8 * 2**20
    assert idle["pages_that_fit"] - none["pages_that_fit"] == 6 * GIB // (8 * 2**20)
    assert none["episodes"] == dict(
        full_length_per_host=8, full_length=256, mean_length_per_host=32, mean_length=1024
    )  # 8,192 pages of 128 tokens; 32 slots


def test_parts_that_fit_alone_but_not_together_say_what_to_change(compiled, monkeypatch):
    big = copy.deepcopy(HELD)
    for name in ppo.SAMPLER:
        big[name]["argument_bytes"]["pages"] = 78 * GIB
        big[name]["memory"]["arguments"] = big[name]["memory"]["total"] = 93 * GIB
    monkeypatch.setattr(ppo_plan, "_compiled", lambda config, slices, name, settings: big[name])
    found = compiled(ppo_128k.get_config())
    assert not found["fits"]
    said = " ".join(found["advice"]["together"])
    assert "'sampling'" in said and "sampler.num_pages=" in said and "placement.offload=idle fits as it is" in said
    assert "DOES NOT FIT" in ppo_report.text(found)


def test_a_plan_is_plain_data_and_reads_on_a_terminal(compiled):
    found = compiled(ppo_128k.get_config())
    assert found["fits"] and json.loads(json.dumps(found)) == found
    shown = ppo_report.text(found)
    assert "ESTIMATE, not measured" in shown and max(map(len, shown.splitlines())) <= 120
    assert len(ppo_report.markdown_rows(found)) == 2


def test_a_decode_step_is_bound_by_reading_weights_and_kv_once():
    config = ppo_128k.get_config()
    model = plan.model_of(config)
    assert ppo_speed.kv_bytes(model) == 64 * 2 * 8 * 128 * 2
    d = ppo_speed.decode(model, sequences=8, length=131072, tensor=4, slices=SLICES)
    assert d["bytes_kv"] == 8 * 131072 * 2**18 / 4
    assert 14.5 * GIB < d["bytes_weights"] < 15.3 * GIB and d["bound"] == "hbm"
    assert d["seconds"]["step"] == (d["bytes_weights"] + d["bytes_kv"]) / SLICES.generation.speeds.hbm
    assert d["tokens_per_second"] == 8 / d["seconds"]["step"]
    longer = ppo_speed.decode(model, sequences=1, length=131072, tensor=4, slices=SLICES)
    assert longer["tokens_per_second"] < d["tokens_per_second"]


def test_an_iteration_counts_every_call_of_every_program(compiled):
    config = changed(ppo_128k.get_config(), ppo__critic_minibatches=12)
    iteration = compiled(config)["estimate"]["iteration"]
    assert iteration["episodes"] == 512
    assert iteration["sampled_tokens"] == 512 * 8192 and iteration["observed_tokens"] == 512 * 24576
    # 4 episodes of 32,768 tokens a row, 8 rows a call; a twelfth of 512 episodes is 11 rows, so 2 calls
    assert iteration["calls"] == dict(logprobs=16, values=16, critic=24, actor=16, update_critic=12, update_actor=1)
    turns = iteration["seconds_sampling"] + iteration["seconds_learning"]
    assert iteration["seconds_total"] == pytest.approx(turns + iteration["seconds"]["weights"])
    ahead = changed(ppo_128k_disaggregated.get_config(), ppo__staleness=1)
    iteration = compiled(ahead)["estimate"]["iteration"]
    assert iteration["seconds_total"] < iteration["seconds_sampling"] + iteration["seconds_learning"]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--episode_tokens=999999"], "--episode_tokens: expected 1 to agent.max_episode_tokens 131072, got 999999"),
        (
            ["--episode_tokens=100", "--sampled_tokens=200"],
            "--sampled_tokens: expected 1 to the episode's 100, got 200",
        ),
        (["--search"], "--stage=ppo compiles all programs"),
        (["--programs=train"], "--stage=ppo compiles all programs"),
    ],
)
def test_mistakes_are_one_line_that_names_the_fix(words, said):
    config = str(REPOSITORY / "configs" / "ppo_128k.py")
    words = [f"--config={config}", "--stage=ppo", "--topology=v5p:4x4x8", *words]
    with pytest.raises(UserError, match=said) as raised:
        planner.main(entry.parse(["plan", *words]))
    assert "\n" not in str(raised.value)


PLACES = """
import json, sys
from configs import ppo_128k, ppo_128k_disaggregated
from stepdr_jax.aot import ppo
from stepdr_jax.errors import UserError
from stepdr_jax.sharding import topology
for sampler, changes in json.loads(sys.argv[1]):
    config = (ppo_128k_disaggregated if sampler == "disaggregated" else ppo_128k).get_config().unlock()
    for name, value in changes.items():
        section, field = name.split(".")
        config[section][field] = value
    try:
        mesh, replica = ppo.places(topology.parse("v5p:4x4x8"), config)
        own = {device.id for device in mesh.devices.flat}
        print(mesh.size, len(replica), len(own & {device.id for device in replica}), replica[0].process_index)
    except UserError as error:
        print(error)
"""


@needs_libtpu
def test_who_works_where_and_what_does_not_go():
    from stepdr_jax.aot.compile import ENVIRONMENT

    cases = [
        ("colocated", {}, "128 4 4 0"),
        ("disaggregated", {}, "64 2 0 0"),
        (
            "colocated",
            {"sampler.tensor": 8},
            "at most the 4 devices of a host of v5p:4x4x8, as a replica lies within a host, got 8",
        ),
        ("disaggregated", {"sampler.tensor": 4}, "fewer than the 4 devices of a host"),
        (
            "disaggregated",
            {"mesh.fsdp": 8},
            "learner's 64 devices of v5p:4x4x8; the samplers have 2 of the 4 of each of 32 hosts",
        ),
        ("colocated", {"mesh.fsdp": 4}, "learner's 128 devices of v5p:4x4x8, got data=1, fsdp=4"),
    ]
    environment = {**os.environ, **ENVIRONMENT, "PYTHONPATH": str(REPOSITORY)}
    asked = json.dumps([case[:2] for case in cases])
    done = subprocess.run(
        [sys.executable, "-c", PLACES, asked], env=environment, capture_output=True, text=True, timeout=200
    )
    lines = done.stdout.splitlines()
    assert len(lines) == len(cases), done.stderr[-1000:]
    for line, (_, _, said) in zip(lines, cases, strict=True):
        assert said in line


def tiny():
    """The miniature with a head size of the paged kernel, over the four chips of a host."""
    config = changed(
        miniature.get_config(),
        model__hidden_size=256,
        model__head_dim=128,
        model__intermediate_size=512,
        model__dtype="bfloat16",
        mesh__fsdp=2,
        mesh__context=2,
        parallel__context_strategy="ring",
        agent__max_episode_tokens=1024,
        ppo__microbatch_sequences=2,
        ppo__remat="layer",
    )
    return changed(
        config,
        sampler__tensor=2,
        sampler__pools=1,
        sampler__max_num_seqs=8,
        sampler__page_size=64,
        sampler__num_pages=64,
        sampler__decode_steps=4,
        sampler__prefill_chunk=128,
    )


@needs_libtpu
@pytest.mark.parametrize("name", ["actor", "decode"])
def test_a_program_of_ppo_compiles_for_a_tpu_and_updates_in_place(name):
    result = ppo_plan._compiled(tiny(), topology.parse("v5p:2x2x1"), name, plan.Settings(limit=400))
    assert result["status"] == "fits" and result["host_devices"] == 4
    kept = "pages" if name == "decode" else "actor gradient"
    assert result["memory"]["aliased"] == pytest.approx(
        result["argument_bytes"][kept], rel=0.1
    )  # donated: never there twice
    assert sum(result["argument_bytes"].values()) == pytest.approx(result["memory"]["arguments"], rel=0.1)


def test_presets_say_where_every_value_is_from_and_suit_any_size():
    lines = Path(ppo_presets.__file__).read_text().splitlines()
    assigned = [line for line in lines if line.startswith("    ") and "=" in line and "config" not in line]
    assert len(assigned) > 25
    for line in assigned:
        assert any(source in line for source in ("# Open-Reasoner-Zero", "# paper", "# ours")), line
    orz = ppo_presets.orz_paper(miniature.get_config().unlock()).ppo
    assert (orz.prompts_per_iteration, orz.samples_per_prompt, orz.critic_minibatches, orz.actor_learning_rate) == (
        128,
        64,
        12,
        1e-6,
    )
    small = ppo_presets.stepdr(miniature.get_config().unlock())
    assert small.ppo.gamma == small.ppo.gae_lambda == 1.0 and small.model.num_layers == 2
    assert entry.load(REPOSITORY / "configs" / "ppo_orz_paper.py").ppo.actor_minibatches == 1


@pytest.mark.parametrize(
    ("config", "slices", "learners"),
    [(ppo_128k, "v5p:4x4x8", 128), (ppo_128k_disaggregated, "v5p:4x4x8", 64), (ppo_128k_v5p_256, "v5p:4x8x8", 256)],
)
def test_configs_of_pods_suit_their_slice(config, slices, learners):
    c = entry.load(Path(config.__file__))
    assert c.mesh.data * c.mesh.fsdp * c.mesh.context * c.mesh.tensor == learners
    assert c.ppo.microbatch_sequences % (c.mesh.data * c.mesh.fsdp) == 0
    assert c.agent.max_episode_tokens == 131072
    hosts = topology.parse(slices).chips // 4
    assert c.ppo.prompts_per_iteration * c.ppo.samples_per_prompt % hosts == 0  # every host samples as many
    assert c.sampler.num_pages * c.sampler.page_size >= c.agent.max_episode_tokens


@pytest.mark.aot
@needs_libtpu
def test_ppo_of_32b_at_128k_fits_on_128_chips():
    config = ppo_128k.get_config()
    found = ppo_plan.plan(config, SLICES, plan.Settings(limit=900), ppo_plan.Load.from_config(config))
    none = found["placements"][0]
    assert found["fits"] and none["learning_bytes"] < 18 * GIB
    assert none["episodes"]["full_length"] == 256 and none["pages_that_fit"] > 9000
    held = found["programs"]
    for name, donated in (("actor", "actor gradient"), ("critic", "critic gradient"), ("decode", "pages")):
        assert held[name]["memory"]["aliased"] == pytest.approx(held[name]["argument_bytes"][donated], rel=0.01)
    for name in ("update_actor", "update_critic"):  # weights and moments in place, nothing beside them
        network = name.removeprefix("update_")
        kept = held[name]["argument_bytes"][f"{network} weights"] + held[name]["argument_bytes"][f"{network} moments"]
        assert held[name]["memory"]["aliased"] == pytest.approx(kept, rel=0.01)
        assert held[name]["memory"]["temporaries"] < 2**28
    assert held["transfer"]["memory"]["temporaries"] < 4 * GIB  # cuts, not whole stacks
    for name in ("actor", "critic"):
        assert not [s for s in held[name]["lint"] if "all-reduce" in s or "synchronous" in s]
