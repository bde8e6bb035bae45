"""Reading the text of TPU's own compiler, for functions counted by hand."""

import functools
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas.ops.tpu.megablox.gmm import gmm, tgmm
from jax.experimental.pallas.ops.tpu.splash_attention import (
    splash_attention_kernel,
    splash_attention_mask,
)
from jax.sharding import PartitionSpec as P

from moe_jax.dryrun import hlo
from moe_jax.model.routing import router_logits
from moe_jax.parallel import mesh as meshes

pytestmark = pytest.mark.long

M, K, N, E = 256, 512, 512, 8  # K = N, so that a product can be fed to the next
ONE = 2 * M * K * N


def shape(*sizes, dtype=jnp.bfloat16, spec=None):
    return sizes, dtype, spec or P()


def compile_for(devices, function, *arguments, **sizes):
    """`function` of arrays of these shapes, compiled for the first devices of a topology."""
    sizes = [sizes.get(axis, 1) for axis in meshes.AXES]
    grid = np.array(devices[: math.prod(sizes)]).reshape(sizes)
    auto = (jax.sharding.AxisType.Auto,) * len(meshes.AXES)
    mesh = jax.sharding.Mesh(grid, meshes.AXES, axis_types=auto)
    arrays = [
        jax.ShapeDtypeStruct(sizes, dtype, sharding=jax.NamedSharding(mesh, spec))
        for sizes, dtype, spec in arguments
    ]
    with jax.set_mesh(mesh):
        return jax.jit(function).trace(*arrays).lower(lowering_platforms=("tpu",)).compile()


@pytest.fixture(scope="module")
def v5p(libtpu):
    return functools.partial(compile_for, libtpu("v5p:2x2x1"))


def times(x, w, number):
    for _ in range(number):
        x = jnp.sin(x) @ w
    return x


def scanned(x, w, trips, inner=1):
    return jax.lax.scan(lambda x, _: (times(x, w, inner), None), x, length=trips)[0]


def nested(x, w):
    return jax.lax.scan(lambda x, _: (scanned(times(x, w, 1), w, 5), None), x, length=3)[0]


def counted_down(x, w):
    def body(state):
        i, x = state
        return i - 2, times(x, w, 1)

    return jax.lax.while_loop(lambda state: state[0] > 3, body, (12, x))[1]


def one_of_two(x, w):
    return jax.lax.cond(x[0, 0] > 0, lambda: times(x, w, 2), lambda: times(x, w, 3))


def gradient_of_scan(x, w):
    return jax.grad(lambda *xw: scanned(*xw, 7).astype(jnp.float32).sum(), argnums=(0, 1))(x, w)


def batched(x, w):
    return jnp.einsum("bmk,kbn->bnm", jnp.sin(x.reshape(16, 16, K)), w.reshape(K, 16, 32))


@pytest.mark.parametrize(
    ("function", "expected"),
    [
        (lambda x, w: x + 1, 0),
        (lambda x, w: x @ w, ONE),
        (functools.partial(scanned, trips=7, inner=2), 14 * ONE),
        (nested, 3 * (1 + 5) * ONE),
        (counted_down, 5 * ONE),
        (gradient_of_scan, 3 * 7 * ONE),
        (batched, 2 * 16 * 16 * K * 32),
        (one_of_two, 3 * ONE),
    ],
    ids="none plain scan nested downwards gradient batched conditional".split(),
)
def test_products_are_counted_as_by_hand(v5p, function, expected):
    text = v5p(function, shape(M, K), shape(K, N)).as_text()
    assert hlo.product_flops(text) == expected


def test_router_logits_and_their_gradients_keep_the_highest_precision(v5p):
    """XLA's default on a TPU would round their factors to bfloat16."""

    def step(x_MK, w_KE):
        return jax.value_and_grad(lambda *xw: jnp.sin(router_logits(*xw)).sum(), (0, 1))(x_MK, w_KE)

    text = v5p(step, shape(M, K), shape(K, E, dtype=jnp.float32)).as_text()
    products = [line for line in text.splitlines() if re.search(r" (convolution|dot)\(", line)]
    assert len(products) == 3
    assert all("operand_precision={highest,highest}" in line for line in products)


def test_a_loop_of_unknown_length_around_products_is_refused(v5p):
    def until_small(x):
        return jax.lax.while_loop(lambda x: x[0, 0] > 1, lambda x: x @ x, x)

    with pytest.raises(ValueError, match=r"the trip count of loop [\w.\-]+ is not known"):
        hlo.product_flops(v5p(until_small, shape(K, K)).as_text())


GROUPED = shape(1024, K), shape(E, K, N), shape(E, dtype=jnp.int32)


def test_megablox_counts_the_products_without_those_that_tiles_add(v5p):
    def step(x_MK, w_EKN, sizes_E):
        def layer(x_MK, _):
            y_MN = gmm(jnp.sin(x_MK), w_EKN, sizes_E, x_MK.dtype)
            return y_MN, tgmm(x_MK.T, y_MN, sizes_E, x_MK.dtype)

        return jax.lax.scan(layer, x_MK, length=3)

    text = v5p(step, *GROUPED).as_text()
    assert hlo.kernel_calls(text) == {"gmm": 3, "tgmm": 3}
    assert hlo.product_flops(text) == 6 * 2 * 1024 * K * N


def test_ragged_dot_runs_as_kernels_but_for_its_weight_gradient_of_old(v5p):
    def step(x_MK, w_EKN, sizes_E):
        def loss(x_MK, w_EKN):
            y_MN = jax.lax.ragged_dot(jnp.sin(x_MK), w_EKN, sizes_E)
            return jnp.square(y_MN.astype(jnp.float32)).sum()

        return jax.grad(loss, argnums=(0, 1))(x_MK, w_EKN)

    text = v5p(step, *GROUPED).as_text()
    dense = jax.__version_info__ < (0, 12)  # the weight gradient is a product for each expert
    products = 2 + (E if dense else 1)
    assert hlo.kernel_calls(text)["ragged-dot-none"] == (2 if dense else 3)
    assert hlo.product_flops(text) == products * 2 * 1024 * K * N


def test_splash_attention_counts_what_it_is_said_to_cost(v5p):
    T, H, N_HEADS = 256, 128, 4

    def loss(q_NTH, k_NTH, v_NTH):
        mask = splash_attention_mask.MultiHeadMask([splash_attention_mask.CausalMask((T, T))] * 4)
        kernel = splash_attention_kernel.make_splash_mha(mask, head_shards=1, q_seq_shards=1)
        out = jax.lax.map(lambda q_NTH: kernel(q_NTH, k_NTH, v_NTH), jnp.stack([q_NTH, -q_NTH]))
        return out.astype(jnp.float32).sum()

    heads = (shape(N_HEADS, T, H),) * 3
    text = v5p(jax.grad(loss, argnums=(0, 1, 2)), *heads).as_text()
    calls = {"splash_mha_dkv_no_residuals", "splash_mha_dq_no_residuals"}
    assert hlo.kernel_calls(text) == dict.fromkeys(calls | {"splash_mha_fwd_residuals"}, 2)
    with pytest.raises(ValueError, match="kernel splash_mha_[a-z_]+ has no cost estimate"):
        hlo.product_flops(text)
    blocks = 3 * 2 * 128 * 128 * H * N_HEADS  # of 2 x 2 blocks those under the diagonal
    kernels = {"_fwd_": 2 * blocks, "_dq_": 3 * blocks, "_dkv_": 4 * blocks}
    assert hlo.product_flops(text, kernels=kernels) == 2 * 9 * blocks


X = 1024 * 1024 * 2  # bytes of what each device has
RING = [(0, 1), (1, 0)]


def every_collective(x):
    """Each collective stands in a loop of five, over either axis and over both."""

    def body(x, _):
        x = jnp.sin(jax.lax.psum(x, "data"))
        x = jax.lax.psum_scatter(x, "expert", tiled=True)
        x = jax.lax.all_gather(jnp.sin(x), "expert", tiled=True)
        x = jax.lax.all_to_all(jnp.sin(x), ("data", "expert"), 0, 1, tiled=True)
        x = jax.lax.ppermute(jnp.sin(x), "data", RING).reshape(1024, 1024)
        return x, None

    return jax.lax.scan(body, x, length=5)[0]


def test_collectives_are_counted_as_by_hand_and_by_axis(v5p):
    sizes = {"data": 2, "fsdp": 1, "expert": 2, "tensor": 1}

    def step(x):
        return jax.shard_map(every_collective, in_specs=P(), out_specs=P(), check_vma=False)(x)

    text = v5p(step, shape(1024, 1024), **sizes).as_text()
    rows = {(c.operation, c.axes): (c.count, c.bytes) for c in hlo.collectives(text, sizes)}
    assert rows == {
        ("all-reduce", ("data",)): (5, 5 * X),
        ("reduce-scatter", ("expert",)): (5, 5 * X),
        ("all-gather", ("expert",)): (5, 5 * X),
        ("all-to-all", ("data", "expert")): (5, 5 * X),
        ("collective-permute", ("data",)): (5, 5 * X),
    }


LAYERS, ROWS, D, F = 3, 32768, 2048, 4096


def partitioned(up_LDF, down_LFD, x_MD):
    """Residual MLPs, for the partitioner to say what is gathered where."""

    def layer(x_MD, weights):
        up_DF, down_FD = weights
        x_MD = x_MD + jnp.tanh(x_MD @ up_DF) @ down_FD
        return jax.lax.with_sharding_constraint(x_MD, P(("data", "fsdp"))), None

    return jax.lax.scan(layer, x_MD, (up_LDF, down_LFD))[0]


@pytest.mark.parametrize(
    ("topology", "sizes", "sign"),
    [
        ("v5e:4x4", {"data": 2, "fsdp": 8}, "AsyncCollectiveStart"),
        ("v6e:4x4", {"fsdp": 8, "tensor": 2}, "windowed_dot_general"),
    ],
)
def test_gathers_that_overlap_with_products_are_counted_once(libtpu, topology, sizes, sign):
    """v5e has a gather in each fusion that runs beside it; v6e makes a gather and its product one
    ring, a loop unrolled by two."""
    axes = dict.fromkeys(meshes.AXES, 1) | sizes
    compiled = compile_for(
        libtpu(topology),
        partitioned,
        shape(LAYERS, D, F, spec=P(None, "fsdp", "tensor")),
        shape(LAYERS, F, D, spec=P(None, "tensor", "fsdp")),
        shape(ROWS, D, spec=P(("data", "fsdp"))),
        **axes,
    )
    text = compiled.as_text()
    assert sign in text
    assert hlo.product_flops(text) == LAYERS * 2 * 2 * ROWS * D * F / 16
    rows = hlo.collectives(text, axes)
    weights = LAYERS * 2 * 2 * D * F // axes["tensor"]
    activations = LAYERS * 2 * ROWS * D * axes["tensor"] // 16
    reduced = sum(c.bytes for c in rows if c.axes == ("tensor",))
    gathered = sum(c.bytes for c in rows if c.axes == ("fsdp",))
    assert reduced == (activations if axes["tensor"] > 1 else 0)
    assert weights <= gathered < 1.1 * weights  # a ring sends a little more
    assert {c.axes for c in rows} <= {("fsdp",), ("tensor",)}
    memory = compiled.memory_analysis()
    arguments, outputs = memory.argument_size_in_bytes, memory.output_size_in_bytes
    assert arguments == (weights * 2 + activations * 16 // LAYERS) // 16
    assert outputs == activations // LAYERS
    assert memory.peak_memory_in_bytes > arguments + outputs
