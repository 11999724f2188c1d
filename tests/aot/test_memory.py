"""Bytes: the compiler's messages and dumps, and the formula that rules splits out."""

import pytest

from stepdr_jax.aot import memory
from stepdr_jax.models.sizes import SIZES

GIB = 2**30
# As libtpu 0.0.51 words it.
MESSAGE = (
    "RESOURCE_EXHAUSTED: XLA:TPU compile permanent error. Ran out of memory in memory space hbm. "
    "Used 42.70G of 31.24G hbm. Exceeded hbm capacity by 11.46G."
)
EARLY_MESSAGE = (
    "RESOURCE_EXHAUSTED: E1000: CompileTimeHbmOom: Ran out of memory on HBM, the total memory required for HLO "
    "temporaries (15.92G) exceeds available HBM (15.75G). HLO module: jit_train_step."
)
ALLOCATIONS = """BufferAssignment:
allocation 0: size 4096, page 0, parameter 0, shape |f32[32,32]| at ShapeIndex {}, maybe-live-out:
allocation 1: size 1024, page 0, parameter 1, shape |f32[256]| at ShapeIndex {}:
allocation 2: size 512, page 0, maybe-live-out:
allocation 3: size 10000, page 0, preallocated-temp:
allocation 4: size 700, page 0, color 1, preallocated-temp:
allocation 5: size 100, page 0, thread-local:
"""
REPORT = """Memory Space: default (color=0)
Total bytes: 17454067008 (16.25GiB)
  cumulative_size;       size;       offset; used_by_n_values; shapes_list
  ------------------------------------------------------------
    5.00GiB( 24%);    5.00GiB;    679575552;                5; 5×bf16[64,1,8192,5120]
    5.42GiB( 37%);  432.00MiB;   7968161792;                6; f32[512,152064], 5×f32[152064,5120]

Memory Space: vmem (color=1)
    9.00GiB( 24%);    9.00GiB;    679575552;                5; u8[9]
"""


def test_an_out_of_memory_message_gives_both_numbers():
    assert memory.shortage(MESSAGE) == pytest.approx(dict(needed=42.70 * GIB, limit=31.24 * GIB))


def test_the_message_that_speaks_of_temporaries_is_read_too():
    assert memory.shortage(EARLY_MESSAGE) == pytest.approx(dict(needed=15.92 * GIB, limit=15.75 * GIB))


def test_another_error_is_not_a_shortage_of_memory():
    assert memory.shortage("INTERNAL: Mosaic failed to compile") is None


def test_kinds_are_read_before_code_is_generated(tmp_path):
    (tmp_path / "module_0.jit_step.after_optimizations-buffer-assignment.txt").write_text(ALLOCATIONS)
    held = memory.by_allocation(tmp_path)
    assert held == dict(arguments=5120, outputs=4608, aliased=4096, temporaries=10000, total=5120 + 512 + 10000)


def test_the_largest_buffers_are_those_of_the_devices_memory(tmp_path):
    (tmp_path / "module_0.jit_step.memory-usage-report.txt").write_text(REPORT)
    (tmp_path / "module_1.small.memory-usage-report.txt").write_text("Memory Space: default (color=0)\n")
    assert memory.top_buffers(tmp_path) == [
        {"bytes": 5 * GIB, "shapes": "5×bf16[64,1,8192,5120]"},
        {"bytes": 432 * 2**20, "shapes": "f32[512,152064], 5×f32[152064,5120]"},
    ]


def formula(**changes):
    mesh = dict(data=1, fsdp=8, context=16, tensor=1)
    sizes = dict(seq_len=131072, batch_size=8, microbatches=1, remat="layer", loss_chunk=512) | changes
    return memory.estimate(SIZES["32B"], mesh, **sizes)


def test_state_and_saved_inputs_of_32b_by_hand():
    held = formula()
    assert held["state"] == pytest.approx(16 * 32.76e9 / 128, rel=2e-3)  # float32 master, m, v and gradient
    assert held["saved"] == 64 * 8192 * 5120 * 2  # layers x tokens x width x bytes: 5 GiB


def test_more_recomputation_takes_less_memory():
    held = [formula(remat=remat)["total"] for remat in ("none", "attention", "layer", "offload")]
    assert held == sorted(held, reverse=True) and len(set(held)) == 4


def test_the_largest_size_that_fits():
    assert memory.largest(100, lambda size: 3 * size, 1000, 8) == 32
    assert memory.largest(2, lambda size: 3 * size, 1000, 8) == 0
    assert memory.largest(1e9, lambda size: 3 * size, 1000, 8) == 1000
