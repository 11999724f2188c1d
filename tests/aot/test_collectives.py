"""Reading transfers out of HLO text: loops, groups, axes, hiding. The text is of XLA's form, cut to what matters."""

import pytest

from stepdr_jax.aot import collectives, schedule

MESH = dict(data=1, fsdp=2, context=4, tensor=1)

PROGRAM = """HloModule jit_step, is_scheduled=true

%cond (p: (s32[], bf16[8,128])) -> pred[] {
  %limit = s32[]{:T(128)} constant(5)
  %p = (s32[], bf16[8,128]) parameter(0)
  %i = s32[] get-tuple-element(%p), index=0
  ROOT %lt = pred[] compare(%i, %limit), direction=LT
}

%product (a: bf16[8,128]) -> bf16[8,128] {
  %a = bf16[8,128]{1,0} parameter(0)
  ROOT %c = bf16[8,128]{1,0} convolution(%a, %a), dim_labels=bf_io->bf
}

%body (q: (s32[], bf16[8,128])) -> (s32[], bf16[8,128]) {
  %q = (s32[], bf16[8,128]) parameter(0)
  %x = bf16[8,128]{1,0} get-tuple-element(%q), index=1
  %hop = (bf16[8,128]{1,0}, bf16[8,128]{1,0}, u32[], u32[]) collective-permute-start(%x), channel_id=1, \
source_target_pairs={{0,1},{1,2},{2,3},{3,0},{4,5},{5,6},{6,7},{7,4}}
  %work = bf16[8,128]{1,0} fusion(%x), kind=kOutput, calls=%product
  %hopped = bf16[8,128]{1,0} collective-permute-done(%hop)
  %bare = (bf16[8,128]{1,0}, bf16[8,128]{1,0}, u32[], u32[]) collective-permute-start(%x), channel_id=2, \
source_target_pairs={{0,4},{4,0},{1,5},{5,1},{2,6},{6,2},{3,7},{7,3}}
  %bared = bf16[8,128]{1,0} collective-permute-done(%bare)
  %sum = bf16[8,128]{1,0} all-reduce(%bared), channel_id=3, replica_groups={{0,4},{1,5},{2,6},{3,7}}, to_apply=%add
  %one = s32[] get-tuple-element(%q), index=0
  ROOT %out = (s32[], bf16[8,128]) tuple(%one, %sum)
}

%all-reduce-scatter.1 (input: f32[64,128]) -> f32[32,128] {
  %input = f32[64,128]{1,0} parameter(0)
  ROOT %ar = f32[64,128]{1,0} all-reduce(%input), channel_id=4, replica_groups={{0,4},{1,5},{2,6},{3,7}}, \
to_apply=%add
}

ENTRY %main (w: bf16[8,128], g: f32[64,128]) -> bf16[8,128] {
  %w = bf16[8,128]{1,0} parameter(0)
  %g = f32[64,128]{1,0} parameter(1)
  %zero = s32[] constant(0)
  %whole = bf16[32,128]{1,0} all-gather(%w), channel_id=5, replica_groups=[2,4]<=[8], dimensions={0}, \
metadata={op_name="jit(step)/gather"}
  %part = bf16[2,128]{1,0} reduce-scatter(%w), channel_id=6, replica_groups={{0,1,2,3},{4,5,6,7}}, dimensions={0}
  %scatter = f32[32,128]{1,0} fusion(%g), kind=kCustom, calls=%all-reduce-scatter.1
  %start = (s32[], bf16[8,128]) tuple(%zero, %w)
  %loop = (s32[], bf16[8,128]) while(%start), condition=%cond, body=%body
  ROOT %last = bf16[8,128]{1,0} get-tuple-element(%loop), index=1
}
"""


@pytest.fixture(scope="module")
def found():
    transfers = collectives.summarise(schedule.parse(PROGRAM), MESH)
    return {t["name"]: t for t in transfers}


def test_a_loop_multiplies_what_is_inside(found):
    assert found["hop"]["times"] == 5 and found["hop"]["loops"] == [5]
    assert found["whole"]["times"] == 1 and found["whole"]["loops"] == []


def test_axes_are_read_from_every_form_of_groups(found):
    axes = {name: t["axes"] for name, t in found.items()}
    assert axes == dict(
        hop=["context"], bare=["fsdp"], sum=["fsdp"], whole=["context"], part=["context"], scatter=["fsdp"]
    )


@pytest.mark.parametrize(
    ("groups", "axes"),
    [
        ("replica_groups=[4,2]<=[2,4]T(1,0)", ("fsdp",)),
        ("replica_groups=[1,8]<=[8]", ("fsdp", "context")),
        ("replica_groups=mesh['axis_0'=2,'axis_1'=4] {'axis_1'}", ("context",)),
        ("replica_groups=mesh['axis_0'=2,'axis_1'=4] {'axis_1','axis_0'}", ("fsdp", "context")),
        ("source_target_pairs={{0,4},{1,5}}", ("fsdp",)),
        ("dimensions={0}", ()),
    ],
)
def test_groups(groups, axes):
    assert collectives.axes_of(f"(%x), {groups}, channel_id=1", MESH) == axes


def test_bytes_are_those_of_the_whole_array(found):
    assert found["hop"]["bytes"] == 8 * 128 * 2
    assert found["whole"]["bytes"] == 32 * 128 * 2  # gathered
    assert found["part"]["bytes"] == 4 * 2 * 128 * 2  # before it is scattered over 4 devices


def test_hidden_means_that_arithmetic_is_scheduled_between_start_and_done(found):
    assert found["hop"]["hidden"] and not found["bare"]["hidden"]
    assert found["whole"]["synchronous"] and not found["hop"]["synchronous"]


def test_an_all_reduce_inside_its_scatter_fusion_is_a_reduce_scatter(found):
    assert found["scatter"]["kind"] == "reduce-scatter" and found["sum"]["kind"] == "all-reduce"


def test_lint_names_what_costs_more_than_it_must(found):
    big = [t | {"bytes": t["bytes"] * 2**12} for t in found.values()]
    said = collectives.lint(big, smallest_kernel=2**20)
    assert [s.split(":")[0] for s in said if "sum " in s] == ["all-reduce of a whole gradient", "all-reduce in a loop"]
    assert [s.split(":")[0] for s in said if "bare " in s] == ["exposed permute"]
    assert not any(f": {name} " in s for s in said for name in ("hop", "whole", "part", "scatter"))


def test_lint_is_silent_about_small_transfers(found):
    assert collectives.lint(list(found.values()), smallest_kernel=2**20) == []
