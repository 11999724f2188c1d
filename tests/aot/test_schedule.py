"""Reading scheduled HLO: what runs between a transfer's start and its done."""

from stepdr_jax.aot import schedule

HLO = """HloModule jit_f, is_scheduled=true

%all-reduce-scatter.1 (p: f32[16,8]) -> f32[2,8] {
  %p = f32[16,8]{1,0} parameter(0)
  %all-reduce.1 = f32[16,8]{1,0} all-reduce(%p), to_apply=%add
  ROOT %slice = f32[2,8]{1,0} slice(%all-reduce.1), slice={[0:2], [0:8]}
}

%body (carry: (bf16[4,128], s32[])) -> (bf16[4,128], s32[]) {
  %carry = (bf16[4,128]{1,0:T(8,128)(2,1)}, s32[]) parameter(0)
  %kv = bf16[4,128]{1,0:T(8,128)(2,1)S(1)} get-tuple-element(%carry), index=0
  %early = (bf16[4,128]{1,0}, bf16[4,128]{1,0}, u32[]{:S(2)}) collective-permute-start(%kv), \
source_target_pairs={{0,1},{1,0}}
  %late = (bf16[4,128]{1,0}, bf16[4,128]{1,0}, u32[]{:S(2)}) collective-permute-start(%kv), \
source_target_pairs={{0,1},{1,0}}
  %late.done = bf16[4,128]{1,0} collective-permute-done(%late)
  %attend = (f32[4,128]{1,0}, f32[4]{0}) custom-call(%kv), custom_call_target="tpu_custom_call", \
frontend_attributes={kernel_metadata={
"xprof_metadata":"{\\"block_q\\": 1024}"
}}, metadata={op_name="splash"}
  %early.done = bf16[4,128]{1,0} collective-permute-done(%early)
  ROOT %out = (bf16[4,128]{1,0}, s32[]) tuple(%early.done, %kv)
}

ENTRY %main (x: f32[16,8]) -> f32[2,8] {
  %x = f32[16,8]{1,0} parameter(0)
  %loop = (bf16[4,128]{1,0}, s32[]) while(%x), condition=%condition, body=%body
  %whole = f32[32,8]{1,0} all-gather(%x), dimensions={0}
  %gather = (f32[16,8]{1,0}, f32[32,8]{1,0}) all-gather-start(%x), dimensions={0}
  %again = (bf16[4,128]{1,0}, s32[]) while(%loop), condition=%condition, body=%body
  %gather.done = f32[32,8]{1,0} all-gather-done(%gather)
  ROOT %sum = f32[2,8]{1,0} fusion(%x), kind=kCustom, calls=%all-reduce-scatter.1
}
"""


def test_transfers_with_what_hides_them():
    found = {t.name: t for t in schedule.transfers(schedule.parse(HLO))}
    assert set(found) == {"early", "late", "whole", "gather", "sum"}
    assert found["early"].kernels == ("attend",)
    assert found["late"].kernels == ()
    assert found["gather"].kernels == ("attend",)  # inside the loop between its start and its done
    assert {name for name, t in found.items() if t.synchronous} == {"whole", "sum"}
    assert {name: t.kind for name, t in found.items()} == {
        "early": "collective-permute",
        "late": "collective-permute",
        "whole": "all-gather",
        "gather": "all-gather",
        "sum": "reduce-scatter",
    }
    assert [found[name].payload for name in ("early", "whole", "gather", "sum")] == [1024, 1024, 1024, 64]


def test_computations_instructions_and_what_they_call():
    program = schedule.parse(HLO)
    assert list(program)[-1] == "main"
    loop = next(i for i in program["main"] if i.name == "loop")
    assert (loop.opcode, loop.operands, loop.called) == ("while", ["x"], ["condition", "body"])
    attend = next(i for i in program["body"] if i.is_kernel)
    assert "block_q" in attend.rest and attend.shape == "(f32[4,128]{1,0}, f32[4]{0})"
