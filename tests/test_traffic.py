# ruff: noqa: E501 - lines as compilers write them
"""The account of a compiled program, on text as a GPU's and a TPU's compiler write it."""

import re

import pytest

from benchmarks import traffic

PROGRAM = """
HloModule jit_step, is_scheduled=true

FileNames
1 "/somewhere/stvit_jax/ops/depthwise.py"
2 "/elsewhere/jax/_src/nn.py"
3 "/somewhere/stvit_jax/models/layers.py"

FunctionNames
1 "f"

FileLocations
1 {file_name_id=1 function_name_id=1 line=30 end_line=30 column=1 end_column=2}
2 {file_name_id=2 function_name_id=1 line=9 end_line=9 column=1 end_column=2}
3 {file_name_id=3 function_name_id=1 line=77 end_line=77 column=1 end_column=2}

StackFrames
1 {file_location_id=3 parent_frame_id=1}
2 {file_location_id=2 parent_frame_id=2}
3 {file_location_id=1 parent_frame_id=3}


%fused_reduce (param_0: bf16[2,1000]) -> f32[2] {
  %param_0 = bf16[2,1000]{1,0} parameter(0)
  %convert = f32[2,1000]{1,0} convert(%param_0)
  ROOT %reduce = f32[2]{0} reduce(%convert, %zero), dimensions={1}
}

%moved (param_0.1: bf16[2,1000]) -> bf16[1000,2] {
  %param_0.1 = bf16[2,1000]{1,0} parameter(0)
  ROOT %transpose = bf16[1000,2]{1,0} transpose(%param_0.1), dimensions={1,0}
}

%body (p: (s32[], bf16[2,1000])) -> (s32[], bf16[2,1000]) {
  %p = (s32[], bf16[2,1000]{1,0}) parameter(0)
  %x.1 = bf16[2,1000]{1,0} get-tuple-element(%p), index=1
  %y.1 = bf16[1000,2]{1,0} fusion(%x.1), kind=kInput, calls=%moved
}

ENTRY %main (x: bf16[2,1000]) -> f32[2] {
  %x = bf16[2,1000]{1,0} parameter(0)
  %b = bf16[2000]{0} bitcast(%x)
  %s = f32[2]{0} fusion(%x), kind=kInput, calls=%fused_reduce, metadata={op_name="jit/layers_2/blocks_0/norm" stack_frame_id=3}
  %g = (bf16[2,8]{1,0}, s8[4096]{0}) custom-call(%x, %w), custom_call_target="__cublas$lt$matmul", metadata={op_name="jit/layers_2/blocks_1/fc"}
  %k = bf16[2,1000]{1,0} custom-call(%x, %x), custom_call_target="mosaic_gpu_v2"
  %v = bf16[2,1000]{1,0:T(8,128)(2,1)S(1)} copy(%x)
  %c = (bf16[2,1000]{1,0}, bf16[2,1000]{1,0:S(1)}, u32[]{:S(2)}) copy-start(%v)
  %d = bf16[2,1000]{1,0} copy-done(%c)
  %t = (s32[], bf16[2,1000]{1,0}) while(%tuple), condition=%cond, body=%body, config={"known_trip_count":{"n":"3"}}
  ROOT %n = f32[2]{0} negate(%s)
}
"""


@pytest.fixture
def found() -> dict[str, traffic.Kernel]:
    return {kernel.name: kernel for kernel in traffic.kernels(PROGRAM)}


def test_what_kernels_read_and_write(found) -> None:
    map_bytes = 2 * 2000
    expected = {
        "s": ("reduction", map_bytes + 8, 1),
        "g": ("gemm", map_bytes + 32, 1),  # without the workspace
        "k": ("own", 2 * map_bytes, 1),  # an operand once
        "v": ("move", map_bytes, 1),  # to the memory of the chip
        "c": ("move", map_bytes, 1),  # and back
        "y.1": ("move", 3 * 2 * map_bytes, 3),
        "n": ("negate", 16, 1),
    }
    assert {k.name: (k.kind, k.bytes, k.times) for k in found.values()} == expected
    assert found["s"].wide == 8 and found["k"].wide == 0
    assert found["s"].where == "depthwise.py:30 < layers.py:77"


def test_one_block_stands_for_a_stage(found) -> None:
    """Kernels of the first block count by depth, all others once."""
    whole = {k.name: k for k in traffic.whole(found.values(), (3, 5, 9, 3))}
    assert whole["s"].bytes == 9 * found["s"].bytes and whole["s"].times == 9
    assert whole["g"] == found["g"] and whole["n"] == found["n"]
    assert traffic.whole(found.values(), None) == list(found.values())


def test_the_account_in_numbers_and_words(found) -> None:
    summary = traffic.summary(list(found.values()), 0.001)
    assert summary["kernels"] == 9 and summary["kinds"]["own"]["megabytes_per_image"] == 8.0
    assert list(summary["kinds"])[0] == "move"  # the largest first
    lines = traffic.report(list(found.values()), 0.001, top=2)
    assert lines[0].startswith("through memory: 48.1 MB an image in 9 kernels")
    assert any("own" in line for line in lines) and "largest" in "".join(lines)


def test_a_kernel_belongs_to_a_part() -> None:
    """A module and one inside; outside modules a file."""
    ours = "jit(step)/jvp(Segmenter.head_logits)/"
    names = {
        ours + "decode_head/decode_head.logits/conv_seg/bhwd,dk->bhwk/dot": "decode_head/conv_seg",
        ours + "backbone.feature_maps/layers_2/blocks_0/mlp/fc1/add": "backbone/layers_2",
        ours + "norm_0/checkpoint/jvp(Segmenter.head_logits)/norm_0/mul": "norm_0",
        "jit(step)/jvp(STViT)/layers_1/blocks_3/norm1/mul": "layers_1",
        ours + "mul": "the network",
        "jit(f)/jvp(Segmenter)/Segmenter.head_logits/backbone/stem/add": "backbone/stem",
        "jit(step)/jvp()/reduce_sum": "loss.py",
    }
    for name, part in names.items():
        backward = re.sub(r"jvp\((.*?)\)", r"transpose(jvp(\1))", name, count=1)
        for op_name, expected in ((name, (2, 0)), (backward, (0, 2))):
            where = "deep.py:3 < loss.py:7"
            kernel = traffic.Kernel("k", "loop", 4_000_000, 0, 1, where, op_name, "f32[1]")
            assert traffic.parts([kernel], images=2) == {part: expected}


@pytest.mark.parametrize("rows, expected", [(10, ["fused"]), (2, [])])
def test_sums_of_stacks_are_found(rows, expected) -> None:
    """Ten products that are stacked and summed read x and dy ten times, and would count once."""
    operands = ", ".join(["%m"] * rows)
    program = f"""
%fused (a: bf16[300,1000], b: bf16[300,1000]) -> f32[{rows}] {{
  %a = bf16[300,1000]{{1,0}} parameter(0)
  %b = bf16[300,1000]{{1,0}} parameter(1)
  %m = bf16[1,300000]{{1,0}} multiply(%a, %b)
  %s = bf16[{rows},300000]{{1,0}} concatenate({operands}), dimensions={{0}}
  %c = f32[{rows},300000]{{1,0}} convert(%s)
  ROOT %r = f32[{rows}]{{0}} reduce(%c, %zero), dimensions={{1}}
}}

ENTRY %main (a: bf16[300,1000]) -> f32[{rows}] {{
  ROOT %f = f32[{rows}]{{0}} fusion(%a, %b), kind=kInput, calls=%fused
}}
"""
    assert traffic.stacked_reductions(program) == expected
