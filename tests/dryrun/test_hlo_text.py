"""Recorded and shortened TPU text: its loops say nowhere how often they run."""

import pytest

from moe_jax.dryrun import hlo

TPU_LOOP = """
HloModule jit_step, is_scheduled=true

%fused.1 (param_0.6: bf16[8,32], param_1.3: bf16[3,32,16]) -> bf16[3,8,16] {
  %param_0.6 = bf16[3,8,32]{2,1,0:T(8,128)(2,1)} parameter(0)
  %param_1.3 = bf16[3,32,16]{2,1,0:T(8,128)(2,1)S(1)} parameter(1)
  ROOT %convolution.3 = bf16[3,8,16]{2,1,0:T(8,128)(2,1)} convolution(%param_0.6, %param_1.3), window={size=3 stride=2 lhs_dilate=3}, dim_labels=0bf_0io->0bf, metadata={op_name="jit(step)/while/body/dot_general"}
}

%body.1 (arg.0: (s32[], bf16[3,8,32], bf16[3,32,16], s32[], s32[], /*index=5*/s32[])) -> (s32[], bf16[3,8,32], bf16[3,32,16], s32[], s32[], /*index=5*/s32[]) {
  %arg.0 = (s32[]{:T(128)}, bf16[3,8,32]{2,1,0:T(8,128)(2,1)}, bf16[3,32,16]{2,1,0:T(8,128)(2,1)S(1)}, s32[]{:T(128)}, s32[]{:T(128)}, /*index=5*/s32[]{:T(128)}) parameter(0)
  %gte.0 = s32[]{:T(128)} get-tuple-element(%arg.0), index=0
  %gte.1 = bf16[3,8,32]{2,1,0:T(8,128)(2,1)} get-tuple-element(%arg.0), index=1
  %gte.2 = bf16[3,32,16]{2,1,0:T(8,128)(2,1)S(1)} get-tuple-element(%arg.0), index=2
  %gte.3 = s32[]{:T(128)} get-tuple-element(%arg.0), index=3
  %gte.4 = s32[]{:T(128)} get-tuple-element(%arg.0), index=4
  %gte.5 = s32[]{:T(128)} get-tuple-element(%arg.0), index=5
  %fusion.1 = bf16[3,8,16]{2,1,0:T(8,128)(2,1)} fusion(%gte.1, %gte.2), kind=kOutput, calls=%fused.1
  %two = s32[]{:T(128)} constant(2)
  %next = s32[]{:T(128)} STEP
  %copy.4 = s32[]{:T(128)} copy(%gte.4)
  ROOT %tuple.11 = (s32[]{:T(128)}, bf16[3,8,32]{2,1,0:T(8,128)(2,1)}, bf16[3,32,16]{2,1,0:T(8,128)(2,1)S(1)}, s32[]{:T(128)}, s32[]{:T(128)}, /*index=5*/s32[]{:T(128)}) tuple(%next, %gte.1, %gte.2, %gte.3, %copy.4, /*index=5*/%next)
}

%condition.1 (arg.1: (s32[], bf16[3,8,32], bf16[3,32,16], s32[], s32[], /*index=5*/s32[])) -> pred[] {
  %seven = s32[]{:T(128)} constant(7)
  %arg.1 = (s32[]{:T(128)}, bf16[3,8,32]{2,1,0:T(8,128)(2,1)}, bf16[3,32,16]{2,1,0:T(8,128)(2,1)S(1)}, s32[]{:T(128)}, s32[]{:T(128)}, /*index=5*/s32[]{:T(128)}) parameter(0)
  %i = s32[]{:T(128)} get-tuple-element(%arg.1), index=0
  %carried = s32[]{:T(128)} get-tuple-element(%arg.1), index=4
  %changed = s32[]{:T(128)} get-tuple-element(%arg.1), index=5
  ROOT %lt.0 = pred[]{:T(512)} TEST
}

ENTRY %main.4 (x.1: bf16[3,8,32], w.1: bf16[3,32,16], n.1: s32[]) -> bf16[3,8,32] {
  %start = s32[]{:T(128)} constant(START)
  %one = s32[]{:T(128)} constant(1)
  %nine = s32[]{:T(128)} constant(9)
  %x.1 = bf16[3,8,32]{2,1,0:T(8,128)(2,1)} parameter(0), metadata={op_name="x"}
  %w.1 = bf16[3,32,16]{2,1,0:T(8,128)(2,1)} parameter(1), metadata={op_name="w"}
  %n.1 = s32[]{:T(128)} parameter(2), metadata={op_name="n"}
  %copy-start = (bf16[3,32,16]{2,1,0:T(8,128)(2,1)S(1)}, bf16[3,32,16]{2,1,0:T(8,128)(2,1)}, u32[]{:S(2)}) copy-start(%w.1)
  %copy-done = bf16[3,32,16]{2,1,0:T(8,128)(2,1)S(1)} copy-done(%copy-start)
  %copy.10 = s32[]{:T(128)} copy(%start)
  %tuple.12 = (s32[]{:T(128)}, bf16[3,8,32]{2,1,0:T(8,128)(2,1)}, bf16[3,32,16]{2,1,0:T(8,128)(2,1)S(1)}, s32[]{:T(128)}, s32[]{:T(128)}, /*index=5*/s32[]{:T(128)}) tuple(%copy.10, %x.1, %copy-done, %one, %nine, /*index=5*/%n.1)
  %while = (s32[]{:T(128)}, bf16[3,8,32]{2,1,0:T(8,128)(2,1)}, bf16[3,32,16]{2,1,0:T(8,128)(2,1)S(1)}, s32[]{:T(128)}, s32[]{:T(128)}, /*index=5*/s32[]{:T(128)}) while(%tuple.12), condition=%condition.1, body=%body.1, metadata={op_name="jit(step)/while"}
  ROOT %gte.9 = bf16[3,8,32]{2,1,0:T(8,128)(2,1)} get-tuple-element(%while), index=1
}
"""  # noqa: E501 - recorded text, as the compiler wrote it
ROUND = 2 * 3 * 8 * 32 * 16


def tpu_loop(test, step="add(%gte.0, %gte.3)", start=0):
    """Element 0 of the state counts, 3 is a one and 4 a nine that are carried along."""
    return TPU_LOOP.replace("TEST", test).replace("STEP", step).replace("START", str(start))


@pytest.mark.parametrize(
    ("trips", "arguments"),
    [
        (7, {"test": "compare(%i, %seven), direction=LT"}),
        (8, {"test": "compare(%seven, %i), direction=GE"}),
        (9, {"test": "compare(%i, %carried), direction=LT"}),
        (5, {"test": "compare(%i, %seven), direction=NE", "start": 2}),
        (4, {"test": "compare(%i, %seven), direction=LT", "step": "add(%two, %gte.0)"}),
        (
            3,
            {
                "test": "compare(%seven, %i), direction=LT",
                "step": "subtract(%gte.0, %gte.3)",
                "start": 10,
            },
        ),
        (0, {"test": "compare(%i, %seven), direction=LT", "start": 7}),
    ],
    ids="constant swapped-inclusive carried-in started-at-2 by-two downwards never".split(),
)
def test_the_trips_of_a_tpu_loop_follow_from_its_counter(trips, arguments):
    assert hlo.product_flops(tpu_loop(**arguments)) == trips * ROUND


@pytest.mark.parametrize(
    "arguments",
    [
        {"test": "compare(%i, %changed), direction=LT"},
        {"test": "compare(%i, %seven), direction=GT"},
        {"test": "compare(%i, %seven), direction=LT", "step": "multiply(%gte.0, %gte.3)"},
        {"test": "compare(%i, %seven), direction=NE", "start": 9},
        {"test": "and(%i, %seven)"},
    ],
    ids="bound-changes wrong-way no-step passed-by two-conditions".split(),
)
def test_a_tpu_loop_whose_trips_do_not_follow_is_refused_by_name(arguments):
    with pytest.raises(ValueError, match="the trip count of loop while is not known"):
        hlo.product_flops(tpu_loop(**arguments))


def test_tpu_layouts_and_comments_do_not_hide_shapes():
    text = tpu_loop("compare(%i, %seven), direction=LT")
    assert hlo.buffer_shapes(text) == {(), (3, 8, 32), (3, 32, 16), (3, 8, 16)}
