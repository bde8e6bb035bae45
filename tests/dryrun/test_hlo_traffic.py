"""Bytes to and from main memory, counted by hand on shortened TPU text."""

import pytest

from moe_jax.dryrun import hlo_traffic

LAYERS, ROW = 5, 8 * 128 * 4  # bytes of f32[8,128], one layer of a stack of five
STACK = LAYERS * ROW

TEXT = """
HloModule jit_step, is_scheduled=true

%sliced (param_0: f32[5,8,128], param_1: s32[]) -> f32[8,128] {
  %param_0 = f32[5,8,128]{2,1,0:T(8,128)} parameter(0)
  %param_1 = s32[]{:T(128)} parameter(1)
  %slice.1 = f32[1,8,128]{2,1,0:T(8,128)} dynamic-slice(%param_0, %param_1)
  ROOT %bitcast.1 = f32[8,128]{1,0:T(8,128)} bitcast(%slice.1)
}

%updated (param_0.1: f32[5,8,128], param_1.1: f32[8,128], param_2.1: s32[]) -> f32[5,8,128] {
  %param_0.1 = f32[5,8,128]{2,1,0:T(8,128)} parameter(0)
  %param_1.1 = f32[8,128]{1,0:T(8,128)} parameter(1)
  %param_2.1 = s32[]{:T(128)} parameter(2)
  %bitcast.2 = f32[1,8,128]{2,1,0:T(8,128)} bitcast(%param_1.1)
  ROOT %update.1 = f32[5,8,128]{2,1,0} dynamic-update-slice(%param_0.1, %bitcast.2, %param_2.1)
}

ENTRY %main (x: f32[5,8,128], i: s32[]) -> f32[5,8,128] {
  %x = f32[5,8,128]{2,1,0:T(8,128)} parameter(0)
  %i = s32[]{:T(128)S(6)} parameter(1)
  INSTRUCTION
}
"""


@pytest.mark.parametrize(
    ("instruction", "moved"),
    [
        ("%y = f32[5,8,128]{2,1,0} negate(%x)", 2 * STACK),
        ("%y = f32[5,8,128]{2,1,0:T(8,128)S(1)} negate(%x)", STACK),  # into VMEM
        ("%y = f32[5120]{0} bitcast(%x)", 0),
        ("%y = f32[8,128]{1,0} fusion(%x, %i), kind=kLoop, calls=%sliced", 2 * ROW),
        ("%y = f32[8,128]{1,0:T(8,128)S(1)} fusion(%x, %i), kind=kLoop, calls=%sliced", ROW),
        ("%y = f32[1,8,128]{2,1,0} dynamic-slice(%x, %i)", 2 * ROW),
        (
            "%r = f32[8,128]{1,0:T(8,128)S(1)} fusion(%x, %i), kind=kLoop, calls=%sliced\n"
            "  %y = f32[5,8,128]{2,1,0} fusion(%x, %r, %i), kind=kLoop, calls=%updated",
            2 * ROW,
        ),
        (
            "%s = ((f32[5,8,128]{2,1,0}), f32[1,8,128]{2,1,0:S(1)}, s32[]{:S(2)}) slice-start(%x)\n"
            "  %y = f32[1,8,128]{2,1,0:S(1)} slice-done(%s)",
            ROW,
        ),
        (
            "%s = (f32[5,8,128]{2,1,0:S(1)}, f32[5,8,128]{2,1,0}, u32[]{:S(2)}) copy-start(%x)\n"
            "  %y = f32[5,8,128]{2,1,0:S(1)} copy-done(%s)",
            STACK,
        ),
    ],
    ids="plain vmem bitcast sliced sliced_to_vmem slice updated sliced_ahead copied".split(),
)
def test_instructions_move_what_they_read_and_write(instruction, moved):
    assert hlo_traffic.traffic(TEXT.replace("INSTRUCTION", instruction)) == moved


@pytest.mark.parametrize(("experts", "read"), [(0, STACK), (1, ROW), (5, STACK), (8, STACK)])
def test_a_grouped_product_reads_one_layer_of_a_stack(experts, read):
    call = '%gmm.1 = f32[8,128]{1,0:S(1)} custom-call(%i, %x), custom_call_target="tpu_custom_call"'
    assert hlo_traffic.traffic(TEXT.replace("INSTRUCTION", call), experts) == read
    other = call.replace("%gmm.1", "%splash.1")
    assert hlo_traffic.traffic(TEXT.replace("INSTRUCTION", other), experts) == STACK
