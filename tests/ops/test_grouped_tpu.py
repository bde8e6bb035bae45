"""The megablox tiles by counting, and the product that "auto" takes on TPUs, compiled for three."""

import hypothesis
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import strategies as st
from jax.experimental.pallas.ops.tpu.megablox.gmm import make_group_metadata

from moe_jax.dryrun import hlo
from moe_jax.ops import grouped_matmul, grouped_tpu, implementations

EIGHT = (65536, 2048, 7168, 8)  # M, D, F, E
SIXTY_FOUR = (32768, 2048, 1024, 64)


@jax.jit
def visits_of_16_rows(sizes_E):
    _, visits = make_group_metadata(
        group_sizes=sizes_E,
        m=96,
        tm=16,
        start_group=jnp.int32(0),
        num_nonzero_groups=sizes_E.size,
        visit_empty_groups=False,
    )
    return visits


@hypothesis.given(ends=st.lists(st.integers(0, 96), min_size=5, max_size=5).map(sorted))
@hypothesis.settings(deadline=None)
def test_no_groups_make_megablox_visit_more_rows_than_are_counted(ends):
    visits = visits_of_16_rows(jnp.diff(jnp.array(ends, jnp.int32), prepend=0))
    assert 16 * visits <= grouped_tpu.visited_rows(96, 5, 16)


def test_groups_that_all_share_a_tile_with_the_next_visit_as_many_rows_as_are_counted():
    visits = visits_of_16_rows(jnp.array([9, 8, 16, 17, 46], jnp.int32))
    assert 16 * visits == grouped_tpu.visited_rows(96, 5, 16)


@pytest.mark.parametrize("tiling", [grouped_tpu.tiling, grouped_tpu.gradient_tiling])
@pytest.mark.parametrize("itemsize", [2, 4])
def test_incomplete_tiles_add_a_tenth_at_8_experts_and_a_quarter_at_64(tiling, itemsize):
    for (M, D, F, E), most in ((EIGHT, 1.1), (SIXTY_FOUR, 1.25)):
        for K, N in ((D, F), (F, D)):
            tm, _, _ = tiling(M, K, N, E, itemsize)
            assert grouped_tpu.visited_rows(M, E, tm) <= most * M


def compiled(devices, M, D, F, E, dtype) -> str:
    """Value and gradients of two products that share their rows, and of one back."""
    mesh = jax.sharding.Mesh(
        np.array(devices)[:1], ("device",), axis_types=(jax.sharding.AxisType.Auto,)
    )

    def array(*shape, dtype=dtype):
        sharding = jax.NamedSharding(mesh, jax.P())
        return jax.ShapeDtypeStruct(shape, dtype, sharding=sharding)

    def step(x_MD, gate_and_up, down_EFD, sizes_E, grad_MD):
        def layer(x_MD, gate_and_up, down_EFD):
            gate_MF, up_MF = grouped_matmul.grouped_matmuls(x_MD, gate_and_up, sizes_E)
            return grouped_matmul.grouped_matmul(gate_MF * up_MF, down_EFD, sizes_E)

        y_MD, pull = jax.vjp(layer, x_MD, gate_and_up, down_EFD)
        return y_MD, pull(grad_MD)

    arguments = array(M, D), (array(E, D, F),) * 2, array(E, F, D), array(E, dtype=jnp.int32)
    with jax.set_mesh(mesh):
        traced = jax.jit(step).trace(*arguments, array(M, D))
        return traced.lower(lowering_platforms=("tpu",)).compile().as_text()


@pytest.mark.long
@pytest.mark.parametrize("topology", ["v5e:2x2", "v5p:2x2x1", "v6e:2x2"])
@pytest.mark.parametrize(
    ("sizes", "dtype"), [(EIGHT, "bfloat16"), (SIXTY_FOUR, "float32")], ids=["8", "64"]
)
def test_due_products_only_run_in_megablox_with_no_row_for_every_expert(
    libtpu, topology, sizes, dtype
):
    M, D, F, E = sizes
    text = compiled(libtpu(topology), M, D, F, E, dtype)
    calls = hlo.kernel_calls(text)
    assert sum(n for name, n in calls.items() if "tgmm" in name) == 3
    assert sum(n for name, n in calls.items() if "gmm" in name) == sum(calls.values()) == 9
    assert hlo.product_flops(text) == 9 * 2 * M * D * F
    assert not any({M, E} <= set(shape) for shape in hlo.buffer_shapes(text))


@pytest.mark.long
def test_ragged_dot_is_refused_where_its_weight_gradient_multiplies_by_every_expert(libtpu):
    M, D, F, E = 8192, 1024, 2048, 8
    sharding = jax.sharding.SingleDeviceSharding(libtpu("v5p:2x2x1")[0])
    arguments = (
        jax.ShapeDtypeStruct((M, D), jnp.bfloat16, sharding=sharding),
        (jax.ShapeDtypeStruct((M, F), jnp.bfloat16, sharding=sharding),),
        jax.ShapeDtypeStruct((E,), jnp.int32, sharding=sharding),
    )
    traced = jax.jit(grouped_tpu.RAGGED_DOT.weight_gradient).trace(*arguments)
    flops = hlo.product_flops(traced.lower(lowering_platforms=("tpu",)).compile().as_text())
    refused = implementations.why_not(grouped_matmul.IMPLEMENTATIONS["ragged_dot"], "tpu")
    assert flops == (E if refused else 1) * 2 * M * D * F
