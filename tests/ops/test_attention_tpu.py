"""The attention that "auto" takes on TPUs, compiled ahead of time for three of them."""

import functools

import jax
import numpy as np
import pytest

from moe_jax.dryrun import hlo
from moe_jax.ops import attention, attention_chunked, attention_kernels
from moe_jax.parallel import mesh as meshes
from moe_jax.parallel import sharding

pytestmark = pytest.mark.long

HEADS = jax.P(sharding.BATCH_AXES, None, "tensor")
N, K = 4, 2  # two query heads and one kv head on each device of the tensor axis


def compiled(devices, T: int, H: int, dtype: str, window: int | None = None) -> str:
    """Value and gradients of a batch of two rows, one for each device of the data axis."""
    mesh = jax.sharding.Mesh(
        np.array(devices).reshape(2, 1, 1, 2, 1),
        meshes.AXES,
        axis_types=(jax.sharding.AxisType.Auto,) * len(meshes.AXES),
    )

    def array(*shape, dtype=dtype, spec=HEADS):
        return jax.ShapeDtypeStruct(shape, dtype, sharding=jax.NamedSharding(mesh, spec))

    def step(q, k, v, segments_BT, grad_BTNH):
        attend = functools.partial(attention.attention, segment_ids_BT=segments_BT, window=window)
        y, transpose = jax.vjp(attend, q, k, v)
        return y, transpose(grad_BTNH)

    heads, kv_heads = array(2, T, N, H), array(2, T, K, H)
    segments = array(2, T, dtype="int32", spec=sharding.BATCH)
    with jax.set_mesh(mesh):
        traced = jax.jit(step).trace(heads, kv_heads, kv_heads, segments, heads)
        return traced.lower(lowering_platforms=("tpu",)).compile().as_text()


@pytest.mark.parametrize("topology", ["v5e:2x2", "v5p:2x2x1", "v6e:2x2"])
@pytest.mark.parametrize(
    ("T", "H", "dtype", "window"),
    [
        (2048, 128, "bfloat16", None),
        (2048, 64, "float32", None),
        (2048, 128, "bfloat16", 256),
        (8192, 128, "bfloat16", None),
        (8192, 128, "bfloat16", 4096),
        (384, 32, "float32", None),
        (384, 32, "float32", 100),
    ],
)
def test_splash_runs_as_kernels_and_executes_what_is_counted(libtpu, topology, T, H, dtype, window):
    text = compiled(libtpu(topology), T, H, dtype, window)
    calls, counted = hlo.kernel_calls(text), attention_kernels.splash_kernels(T, window)
    assert len(calls) == len(counted)
    for part in counted:
        assert sum(number for name, number in calls.items() if part in name) == 1
    flops = {part: products * 2 * H * N // 2 for part, products in counted.items()}
    assert hlo.product_flops(text, kernels=flops) == sum(flops.values())


@pytest.mark.parametrize("window", [None, 50])
def test_rows_that_splash_refuses_run_without_a_kernel(libtpu, window):
    text = compiled(libtpu("v5p:2x2x1"), 200, 64, "bfloat16", window)
    assert not hlo.kernel_calls(text)
    executed = attention_chunked.visited_pairs(200, window) * (2 + 5)
    assert hlo.product_flops(text) == executed * 2 * 64 * N // 2
