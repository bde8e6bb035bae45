"""Reading HLO text: functions counted by hand, and the text of TPU's compiler.

The TPU text here is recorded and shortened; test_hlo_tpu.py has the compiler write it.
"""

import functools

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import PartitionSpec as P

from moe_jax.dryrun import hlo
from moe_jax.ops import grouped_blocked, grouped_matmul
from moe_jax.parallel import mesh as meshes

M, K, N = 16, 24, 24  # K = N, so that a product can be fed to the next
ONE = 2 * M * K * N


def times(x, w, number):
    """`number` products one after the other, nonlinear in between so that none can be merged."""
    for _ in range(number):
        x = jnp.sin(x) @ w
    return x


def scanned(x, w, trips, inner=1):
    return jax.lax.scan(lambda x, _: (times(x, w, inner), None), x, length=trips)[0]


def nested(x, w):
    return jax.lax.scan(lambda x, _: (scanned(times(x, w, 1), w, 5), None), x, length=3)[0]


def one_of_two(x, w):
    return jax.lax.cond(x[0, 0] > 0, lambda: times(x, w, 2), lambda: times(x, w, 3))


def one_of_four_in_a_loop(x, w):
    branches = [functools.partial(times, w=w, number=n) for n in (1, 4, 2, 0)]

    def step(x, i):
        return jax.lax.switch(i + (x[0, 0] > 0), branches, x), None

    return jax.lax.scan(step, x, jnp.arange(6) % 3)[0]


def batched(x, w):
    return jnp.einsum("bmk,bkn->bmn", jnp.stack([x, x + 1, x + 2]), jnp.stack([w, w + 1, w + 2]))


def over_two_axes(x, w):
    return jnp.einsum("mhk,hkn->mn", x.reshape(M, 4, 6), w.reshape(4, 6, N))


@pytest.mark.parametrize(
    ("function", "expected"),
    [
        (lambda x, w: x + 1, 0),
        (lambda x, w: x @ w, ONE),
        (lambda x, w: x @ w.T + times(x, w, 2), 3 * ONE),
        (over_two_axes, ONE),
        (batched, 3 * ONE),
        (functools.partial(scanned, trips=7), 7 * ONE),
        (functools.partial(scanned, trips=7, inner=2), 14 * ONE),
        (nested, 3 * (1 + 5) * ONE),
        (jax.grad(lambda x, w: scanned(x, w, 7).sum()), 2 * 7 * ONE),
        (one_of_two, 3 * ONE),
        (one_of_four_in_a_loop, 6 * 4 * ONE),
    ],
    ids=(
        "none plain three contracted-pair batched scan scan-of-two nested gradient "
        "conditional conditional-in-a-loop"
    ).split(),
)
def test_products_are_counted_as_by_hand(function, expected):
    """A conditional counts as the branch that costs most."""
    compiled = jax.jit(function).lower(jnp.ones((M, K)), jnp.ones((K, N))).compile()
    assert hlo.product_flops(compiled.as_text()) == expected


def test_a_loop_of_unknown_length_around_products_is_refused():
    def until_small(x, body):
        return jax.lax.while_loop(lambda x: x[0, 0] > 1, body, x)

    def text(body):
        return jax.jit(functools.partial(until_small, body=body)).lower(x).compile().as_text()

    x = jnp.ones((M, M))
    with pytest.raises(ValueError, match=r"the trip count of loop [\w.\-]+ is not known"):
        hlo.product_flops(text(lambda x: x @ x))
    assert hlo.product_flops(text(jnp.sin)) == 0  # without products its length does not matter


def test_a_loop_of_unknown_length_counts_as_often_as_its_name_expects():
    def products(x, n):
        with jax.named_scope(grouped_blocked.expected_trips(3)):
            return jax.lax.fori_loop(0, n, lambda i, x: x @ x, x)

    text = jax.jit(products).lower(jnp.ones((M, M)), 5).compile().as_text()
    assert hlo.product_flops(text) == 3 * 2 * M**3


@pytest.mark.parametrize(
    "arguments",
    [
        {"padding": [(0, 0), (0, 0)]},
        {"padding": [(2, 1), (0, 3)], "window_strides": (2, 1)},
        {"padding": [(-1, 2), (1, -2)], "rhs_dilation": (1, 2)},
        {"padding": [(3, 3), (2, 2)], "lhs_dilation": (3, 2), "window_strides": (2, 3)},
        {"padding": [(1, 1), (0, 0)], "feature_group_count": 2},
        {"padding": [(1, 1), (1, 1)], "batch_group_count": 2},
    ],
    ids="valid padding cropped dilated feature-groups batch-groups".split(),
)
def test_a_convolution_counts_only_what_touches_real_elements(arguments):
    """A convolution of ones with ones sums up the number of products that were made."""
    features = 4 // arguments.get("feature_group_count", 1)
    convolve = functools.partial(
        jax.lax.conv_general_dilated, **{"window_strides": (1, 1), **arguments}
    )
    ones = jnp.ones((2, 4, 7, 9)), jnp.ones((6, features, 3, 2))
    compiled = jax.jit(convolve).lower(*ones).compile()
    assert hlo.product_flops(compiled.as_text()) == 2 * compiled(*ones).sum()


KERNELS = """
HloModule jit_step, is_scheduled=true

ENTRY %main.1 (q.1: bf16[4,256,128], g.1: s32[8], x.1: bf16[1024,256], w.1: bf16[8,256,512]) -> bf16[1024,512] {
  %q.1 = bf16[4,256,128]{2,1,0:T(8,128)(2,1)} parameter(0)
  %g.1 = s32[8]{0:T(128)} parameter(1)
  %x.1 = bf16[1024,256]{1,0:T(8,128)(2,1)} parameter(2)
  %w.1 = bf16[8,256,512]{2,1,0:T(8,128)(2,1)} parameter(3)
  %splash_mha_fwd_no_residuals.1 = (f32[128,128]{1,0:T(8,128)}, bf16[4,256,128]{2,1,0:T(8,128)(2,1)}) custom-call(%q.1), custom_call_target="tpu_custom_call", operand_layout_constraints={bf16[4,256,128]{2,1,0}}, frontend_attributes={kernel_metadata={
"xprof_metadata":"{\\"block_q\\": 128, \\"block_kv\\": 128}"
}}, metadata={op_name="jit(step)/splash_mha_fwd_no_residuals/pallas_call" stack_frame_id=7}, backend_config={"custom_call_config":{"body":"TUzvUgFN","needs_layout_passes":true}}
  %ragged-dot-metadata.1.clone = (s32[9]{0:T(128)}, s32[15]{0:T(128)}) custom-call(%g.1), custom_call_target="tpu_custom_call", backend_config={"custom_call_config":{"body":"bW9kdWxl"}}
  %buffer = bf16[1024,512]{1,0} custom-call(), custom_call_target="AllocateBuffer"
  ROOT %gmm.1.rhs = bf16[1024,512]{1,0:T(8,128)(2,1)} custom-call(%ragged-dot-metadata.1.clone, %x.1, /*index=5*/%w.1), custom_call_target="tpu_custom_call", metadata={op_name="jit(step)/transpose(jvp(moe))/jit(gmm)/pallas_call"}, backend_config={"custom_call_config":{"body":"TUzvUgFN","cost_estimate":{"flops":"268435456","transcendentals":"0","bytes_accessed":"7077888"}}}
}
"""  # noqa: E501 - recorded text, as the compiler wrote it


def test_kernels_count_by_their_estimate_or_by_what_one_gives():
    names = {"gmm": 1, "ragged-dot-metadata": 1, "splash_mha_fwd_no_residuals": 1}
    assert hlo.kernel_calls(KERNELS) == names
    with pytest.raises(ValueError, match="splash_mha_fwd_no_residuals has no cost estimate"):
        hlo.product_flops(KERNELS)
    assert hlo.product_flops(KERNELS, kernels={"dq|dkv": 5, "fwd": 7}) == 7 + 2 * 1024 * 256 * 512
    assert hlo.product_flops(KERNELS, kernels={"^gmm$": 11, "": 0}) == 11


SIZES = {"data": 2, "fsdp": 2, "expert": 2, "tensor": 1}
X = 16 * 24 * 4  # bytes of what each device has
RING = [(0, 1), (1, 0)]


def in_a_scan(function, trips):
    return lambda x: jax.lax.scan(lambda x, _: (jnp.sin(function(x)), None), x, length=trips)[0]


@pytest.mark.parametrize(
    ("function", "expected"),
    [
        (jnp.sin, []),
        (lambda x: jax.lax.psum(x, "fsdp"), [("all-reduce", ("fsdp",), 1, X)]),
        (
            lambda x: jax.lax.psum(x, ("expert", "data")),
            [("all-reduce", ("data", "expert"), 1, X)],
        ),
        (
            lambda x: jax.lax.all_gather(x, "expert", tiled=True),
            [("all-gather", ("expert",), 1, 2 * X)],
        ),
        (
            lambda x: jax.lax.all_gather(x, ("data", "fsdp", "tensor"), tiled=True),
            [("all-gather", ("data", "fsdp"), 1, 4 * X)],
        ),
        (
            lambda x: jax.lax.psum_scatter(x, ("fsdp", "expert"), tiled=True),
            [("reduce-scatter", ("fsdp", "expert"), 1, X)],
        ),
        (
            lambda x: jax.lax.all_to_all(x, "expert", 0, 1, tiled=True),
            [("all-to-all", ("expert",), 1, X)],
        ),
        (
            lambda x: jax.lax.ppermute(x, "data", RING),
            [("collective-permute", ("data",), 1, X)],
        ),
        (
            in_a_scan(lambda x: jax.lax.ppermute(jax.lax.psum(x, "data"), "expert", RING), 5),
            [("all-reduce", ("data",), 5, 5 * X), ("collective-permute", ("expert",), 5, 5 * X)],
        ),
        (
            in_a_scan(in_a_scan(lambda x: jax.lax.psum(x, "fsdp"), 3), 4),
            [("all-reduce", ("fsdp",), 12, 12 * X)],
        ),
        (
            lambda x: jax.lax.psum(jnp.sin(jax.lax.psum(x, "fsdp"))[:4], "fsdp"),
            [("all-reduce", ("fsdp",), 2, X + X // 4)],
        ),
        (
            lambda x: jax.lax.cond(
                x[0, 0] > 0,
                lambda: in_a_scan(lambda x: jax.lax.psum(x, "fsdp"), 2)(x),
                lambda: jax.lax.psum(jax.lax.ppermute(x, "data", RING), "fsdp"),
            ),
            [("all-reduce", ("fsdp",), 2, 2 * X), ("collective-permute", ("data",), 1, X)],
        ),
    ],
    ids=(
        "none psum psum-2 gather gather-2 scatter exchange permute scan nested merged branches"
    ).split(),
)
def test_collectives_are_counted_as_by_hand_and_by_axis(function, expected):
    mesh = meshes.make(SIZES)
    mapped = jax.shard_map(function, mesh=mesh, in_specs=P(), out_specs=P(), check_vma=False)
    text = jax.jit(mapped).lower(jnp.ones((16, 24))).compile().as_text()
    assert hlo.collectives(text, SIZES) == tuple(hlo.Collective(*row) for row in expected)


@pytest.mark.parametrize(
    ("axes", "groups"),
    [
        ("", "replica_groups={{0},{1},{2},{3},{4},{5},{6},{7}}"),
        ("expert", "replica_groups={{0,1},{2,3},{4,5},{6,7}}"),
        ("data", "replica_groups={{5,1},{4,0},{2,6},{7,3}}"),
        ("data fsdp", "replica_groups={{0,2,4,6},{1,3,5,7}}"),
        ("data fsdp expert", "replica_groups={}"),
        ("expert", "replica_groups=[4,2]<=[8]"),
        ("fsdp expert", "replica_groups=[2,4]<=[8]"),
        ("data", "replica_groups=[4,2]<=[2,4]T(1,0)"),
        ("fsdp", "replica_groups=[4,2]<=[2,2,2]T(0,2,1)"),
        ("data expert", "replica_groups=mesh['data'=2,'fsdp'=2,'expert'=2] {'data','expert'}"),
        ("fsdp expert", "replica_groups=mesh['axis_0'=2,'axis_1'=4] {'axis_1'}"),
        ("fsdp", "replica_groups=mesh['axis_0'=8] {'axis_0':(2)2}"),
        ("data expert", "replica_groups=mesh['axis_0'=8] {'axis_0':(1)2,'axis_0':(4)2}"),
        ("data", "replica_groups=mesh['a'=4,'b'=2], device_ids=([2,4]T(1,0)) {'b'}"),
        ("fsdp expert", "replica_groups=mesh['a'=4,'b'=2], device_ids=(0,4,1,5,2,6,3,7) {'a'}"),
        ("expert", "source_target_pairs={{0,1},{1,0},{2,3},{3,2}}"),
        ("fsdp expert", "source_target_pairs={{0,1},{1,2},{2,3},{3,0}}"),
        ("?", "replica_groups={{0,1},{2,4},{3,5},{6,7}}"),
        ("?", "replica_groups={{0,1},{2,3}}"),
        ("?", "replica_groups=[8,2]<=[16]"),
    ],
)
def test_groups_of_every_spelling_are_told_as_axes(axes, groups):
    text = f"""
ENTRY %main.1 (x.1: f32[6]) -> f32[6] {{
  %x.1 = f32[6]{{0:T(256)}} parameter(0)
  ROOT %psum.7 = f32[6]{{0:T(256)}} all-reduce(%x.1), channel_id=1, {groups}, to_apply=%add
}}
"""
    assert hlo.collectives(text, SIZES) == (hlo.Collective("all-reduce", (*axes.split(),), 1, 24),)


TPU_COLLECTIVES = """
HloModule jit_step, is_scheduled=true

%start (param_0.1: bf16[8,4]) -> (bf16[8,4], bf16[8,8], s32[2], u32[]) {
  %param_0.1 = bf16[8,4]{1,0:T(8,128)(2,1)} parameter(0)
  %all-gather.27 = bf16[8,8]{1,0:T(8,128)(2,1)} all-gather(%param_0.1), channel_id=1, replica_groups=mesh['axis_0'=2,'axis_1'=2] {'axis_1'}, dimensions={1}
  ROOT %custom-call.2 = (bf16[8,4]{1,0}, bf16[8,8]{1,0}, s32[2]{0}, u32[]{:T(128)}) custom-call(%all-gather.27), custom_call_target="AsyncCollectiveStart"
}

%async_collective_fusion.118 (param_0.2: bf16[8,4], param_1.2: bf16[8,8], param_2.2: s32[2], param_3.2: u32[]) -> (bf16[8,8], bf16[8,8]) {
  %param_0.2 = bf16[8,4]{1,0:T(8,128)(2,1)} parameter(0)
  %param_1.2 = bf16[8,8]{1,0:T(8,128)(2,1)} parameter(1)
  %param_2.2 = s32[2]{0} parameter(2)
  %param_3.2 = u32[]{:T(128)} parameter(3)
  %convolution.31 = bf16[8,8]{1,0:T(8,128)(2,1)} convolution(%param_1.2, %param_1.2), dim_labels=bf_io->bf
  %all-gather.29 = bf16[8,8]{1,0:T(8,128)(2,1)} all-gather(%param_0.2), channel_id=1, replica_groups=mesh['axis_0'=2,'axis_1'=2] {'axis_1'}, dimensions={1}
  ROOT %tuple.55 = (bf16[8,8]{1,0}, bf16[8,8]{1,0}) tuple(%convolution.31, %all-gather.29)
}

%end (param_0.3: bf16[8,4], param_1.3: bf16[8,8]) -> bf16[8,8] {
  %param_0.3 = bf16[8,4]{1,0:T(8,128)(2,1)} parameter(0)
  %param_1.3 = bf16[8,8]{1,0:T(8,128)(2,1)} parameter(1)
  %all-gather.31 = bf16[8,8]{1,0:T(8,128)(2,1)} all-gather(%param_0.3), channel_id=1, replica_groups=mesh['axis_0'=2,'axis_1'=2] {'axis_1'}, dimensions={1}
  ROOT %custom-call.4 = bf16[8,8]{1,0:T(8,128)(2,1)} custom-call(%param_0.3, %param_1.3, %all-gather.31), custom_call_target="AsyncCollectiveDone"
}

%all-reduce-scatter.1.clone.1 (input.4: bf16[8,8]) -> bf16[8,4] {
  %input.4 = bf16[8,8]{1,0:T(8,128)(2,1)} parameter(0)
  %all-reduce.16 = bf16[8,8]{1,0:T(8,128)(2,1)} all-reduce(%input.4), channel_id=1, replica_groups={{0,2},{1,3}}, use_global_device_ids=true, to_apply=%add.4.clone
  %constant.266 = u32[] constant(0)
  ROOT %dynamic-slice.59 = bf16[8,4]{1,0:T(8,128)(2,1)} dynamic-slice(%all-reduce.16, %constant.266, %constant.266), dynamic_slice_sizes={8,4}
}

%gather (x.9: bf16[8,4]) -> bf16[8,8] {
  %x.9 = bf16[8,4]{1,0:T(8,128)(2,1)} parameter(0)
  ROOT %all-gather.1 = bf16[8,8]{1,0:T(8,128)(2,1)} all-gather(%x.9), channel_id=1, replica_groups={{0,2},{1,3}}, dimensions={0}
}

ENTRY %main.0_spmd (x.1: bf16[8,4]) -> bf16[8,8] {
  %x.1 = bf16[8,4]{1,0:T(8,128)(2,1)} parameter(0)
  %fusion.1 = (bf16[8,4]{1,0}, bf16[8,8]{1,0}, s32[2]{0}, u32[]{:T(128)}) fusion(%x.1), kind=kCustom, calls=%start
  %gte.1 = bf16[8,8]{1,0} get-tuple-element(%fusion.1), index=1
  %fusion.2 = (bf16[8,8]{1,0}, bf16[8,8]{1,0}) fusion(%x.1, %gte.1), kind=kOutput, calls=%async_collective_fusion.118
  %fusion.3 = bf16[8,8]{1,0:T(8,128)(2,1)} fusion(%x.1, %gte.1), kind=kCustom, calls=%end
  %fusion.101 = bf16[8,4]{1,0:T(8,128)(2,1)} fusion(%fusion.3), kind=kCustom, calls=%all-reduce-scatter.1.clone.1
  %collective-permute-start = (bf16[8,4]{1,0:T(8,128)(2,1)}, bf16[8,4]{1,0:T(8,128)(2,1)}, u32[]{:S(2)}, u32[]{:S(2)}) collective-permute-start(%fusion.101), channel_id=1, source_target_pairs={{0,2},{2,0},{1,3},{3,1}}
  %collective-permute-done = bf16[8,4]{1,0:T(8,128)(2,1)} collective-permute-done(%collective-permute-start)
  %all-gather-start = (bf16[8,4]{1,0}, bf16[16,4]{1,0}) all-gather-start(%collective-permute-done), channel_id=1, replica_groups=[2,2]<=[4], dimensions={0}
  %all-gather-done = bf16[16,4]{1,0} all-gather-done(%all-gather-start)
  %all-gather.2.cloned.1.call-start = ((bf16[8,4]{1,0}), bf16[8,8]{1,0}, u32[]{:S(2)}) call-start(%collective-permute-done), async_execution_thread="sparsecore", to_apply=%gather
  ROOT %all-gather.2.cloned.1.call-done = bf16[8,8]{1,0:T(8,128)(2,1)} call-done(%all-gather.2.cloned.1.call-start)
}
"""  # noqa: E501 - recorded text, as the compiler wrote it


def test_tpu_collectives_in_fusions_and_in_parts_are_counted_once():
    assert hlo.collectives(TPU_COLLECTIVES, {"data": 2, "fsdp": 2}) == (
        hlo.Collective("all-gather", ("data",), 1, 2 * 8 * 8),
        hlo.Collective("all-gather", ("fsdp",), 2, 2 * (8 * 8 + 16 * 4)),
        hlo.Collective("collective-permute", ("data",), 1, 2 * 8 * 4),
        hlo.Collective("reduce-scatter", ("data",), 1, 2 * 8 * 8),
    )
    assert hlo.product_flops(TPU_COLLECTIVES) == 2 * 8 * 8 * 8


BETWEEN_SLICES = """
HloModule jit_step, is_scheduled=true, num_partitions=4

ENTRY %main.0_spmd (x.1: f32[8,4]) -> f32[8,8] {
  %x.1 = f32[8,4]{1,0} parameter(0)
  %token.1 = token[] after-all()
  %sum.1 = (f32[8,4]{1,0}, u32[], token[]) send(%x.1, %token.1), channel_id=3, is_host_transfer=true, frontend_attributes={_xla_host_transfer_handler_name="xla_megascale_runtime",_xla_host_transfer_rendezvous="psum.1_0",_xla_megascale_transfer_type="ALL_REDUCE"}
  %sum.2 = token[] send-done(%sum.1), channel_id=3, is_host_transfer=true
  %sum.3 = (f32[8,4]{1,0}, u32[], token[]) recv(%sum.2), channel_id=4, is_host_transfer=true, frontend_attributes={_xla_host_transfer_handler_name="xla_megascale_runtime",_xla_host_transfer_rendezvous="psum.1_0",_xla_megascale_transfer_type="ALL_REDUCE"}
  %sum.4 = (f32[8,4]{1,0}, token[]) recv-done(%sum.3), channel_id=4, is_host_transfer=true
  %sum.5 = f32[8,4]{1,0} get-tuple-element(%sum.4), index=0
  ROOT %gather.1 = f32[8,8]{1,0} all-gather(%sum.5), channel_id=5, replica_groups={{0,1},{2,3}}, dimensions={1}
}
"""  # noqa: E501 - recorded of libtpu 0.0.42, and shortened


def test_what_goes_between_slices_is_counted_once_and_apart():
    """The text of two slices of four devices is one slice's, with one slice's groups."""
    assert hlo.collectives(BETWEEN_SLICES, {"data": 2, "fsdp": 2}) == (
        hlo.Collective("all-gather", ("fsdp",), 1, 8 * 8 * 4),
        hlo.Collective("all-reduce", hlo.SLICES, 1, 8 * 4 * 4),
    )


def test_memory_is_that_of_arguments_results_and_what_is_donated():
    def step(state, x):
        return state + jnp.sin(x) @ x.T, x[0]

    arguments = jnp.ones((64, 64)), jnp.ones((64, 32))
    memory = jax.jit(step, donate_argnums=0).lower(*arguments).compile().memory_analysis()
    assert memory.argument_size_in_bytes == 4 * (64 * 64 + 64 * 32)
    assert memory.output_size_in_bytes == 4 * (64 * 64 + 32) + 2 * 8  # and a tuple of two pointers
    assert memory.alias_size_in_bytes == 4 * 64 * 64
    assert memory.temp_size_in_bytes > 0
    assert memory.peak_memory_in_bytes > memory.argument_size_in_bytes


def test_products_that_the_host_computes_are_counted():
    M, D, F, E = 64, 16, 8, 4

    def product(x_MD, w_EDF):
        sizes_E = jnp.full(E, M // E)
        return grouped_matmul.grouped_matmul(x_MD, w_EDF, sizes_E, implementation="host").sum()

    gradients = jax.jit(jax.value_and_grad(product, argnums=(0, 1)))
    text = gradients.lower(jnp.ones((M, D)), jnp.ones((E, D, F))).compile().as_text()
    assert hlo.product_flops(text) == 3 * 2 * M * D * F
    assert hlo.product_flops(text, filled=0.5) == 3 * M * D * F
