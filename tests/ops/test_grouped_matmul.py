"""Each kernel against autodiff of the slow reference, on awkward groups."""

import functools
import re
import time
from unittest import mock

import hypothesis
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import strategies as st

from moe_jax.ops import (
    grouped_blocked,
    grouped_gpu,
    grouped_host,
    grouped_matmul,
    grouped_tpu,
    implementations,
    permute,
)

M, D, F, E = 50, 24, 40, 4  # multiples of no tile
GROUPS = {
    "even": (12, 12, 12, 12),
    "ragged": (1, 32, 7, 10),
    "empty": (0, 27, 0, 23),
    "all to one": (0, 0, 50, 0),
    "all to the last": (0, 0, 0, 50),
    "rows beyond the sum": (5, 0, 9, 3),
    "nothing": (0, 0, 0, 0),
}
KERNELS = {
    "megablox": grouped_tpu.megablox(interpret=True),
    "triton": grouped_gpu.triton(interpret=True),
    "ragged_dot": grouped_tpu.RAGGED_DOT,
    "host": grouped_host.HOST,
}
FUNCTIONS = {
    "blocked": grouped_blocked.products,
    **{name: functools.partial(grouped_matmul._product, k) for name, k in KERNELS.items()},
}


@pytest.fixture(autouse=True)
def tiles_smaller_than_the_arrays(monkeypatch):
    monkeypatch.setattr(grouped_gpu, "_ROWS", 16)
    monkeypatch.setattr(grouped_gpu, "_COLUMNS", 16)
    monkeypatch.setattr(grouped_host, "_TASK_ROWS", 8)
    monkeypatch.setattr(grouped_host, "_ALONE", 0)
    for tiling in ("tiling", "gradient_tiling"):
        monkeypatch.setattr(grouped_tpu, tiling, lambda *sizes: (16, 16, 16))


def normal(*shapes, dtype=jnp.float32):
    keys = jax.random.split(jax.random.key(0), len(shapes))
    return [jax.random.normal(k, s, dtype) for k, s in zip(keys, shapes, strict=True)]


def pairs(number: int, **options):
    """Rows, and matrices with the gradients of their products."""
    shapes = [(M, D), *[(E, D, F)] * number, *[(M, F)] * number]
    x_MD, *rest = normal(*shapes, **options)
    return x_MD, tuple(rest[:number]), tuple(rest[number:])


def value_and_gradients(function, x_MD, weights, gradients, sizes_E):
    ys, pull = jax.vjp(lambda x, w: function(x, w, sizes_E), x_MD, weights)
    return ys, pull(gradients)


def through(function):
    return functools.partial(value_and_gradients, function)


COMPILED = {name: jax.jit(through(function)) for name, function in FUNCTIONS.items()}
REFERENCE = jax.jit(through(grouped_matmul.reference))


def assert_close(tree, expected, tolerance=2e-5):
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=tolerance, atol=tolerance),
        tree,
        expected,
    )


# Two matrices by default, which take every path that one does.
@pytest.mark.parametrize("number", [pytest.param(1, marks=pytest.mark.long), 2])
@pytest.mark.parametrize("groups", GROUPS.values(), ids=GROUPS)
@pytest.mark.parametrize("name", FUNCTIONS)
def test_every_kernel_equals_autodiff_of_the_reference(name, groups, number):
    """With NaN in all rows beyond the sum of the groups, of which nothing may be seen."""
    x_MD, weights, gradients = pairs(number)
    sizes_E = jnp.array(groups)
    used_M1 = (jnp.arange(M) < sum(groups))[:, None]

    def beyond(fill):
        x, *rows = (jnp.where(used_M1, rows, fill) for rows in (x_MD, *gradients))
        return x, weights, tuple(rows), sizes_E

    assert_close(COMPILED[name](*beyond(jnp.nan)), REFERENCE(*beyond(0.0)))


def test_the_reference_equals_numpy():
    x_MD, (w_EDF,), gradients = pairs(1)
    groups = GROUPS["ragged"]
    (y_MF,), _ = REFERENCE(x_MD, (w_EDF,), gradients, jnp.array(groups))
    by_hand = [x @ w_EDF[e] for x, e in zip(x_MD, np.repeat(np.arange(E), groups), strict=True)]
    np.testing.assert_allclose(y_MF, by_hand, rtol=1e-5, atol=1e-5)


def test_a_single_expert_is_a_plain_product():
    x_MD, w_DF = normal((M, D), (D, F))
    y_MF = grouped_matmul.grouped_matmul(x_MD, w_DF[None], jnp.array([M]))
    np.testing.assert_allclose(y_MF, x_MD @ w_DF, rtol=1e-5, atol=1e-5)


@pytest.fixture(scope="module")
def small_blocks():
    """The blocked product in blocks of 16, 8 and 4 rows, so that groups here take all of them."""
    with mock.patch.object(grouped_blocked, "block_sizes", lambda M, E: [16, 8, 4]):
        arguments = (*pairs(2), jnp.array(GROUPS["even"]))
        return jax.jit(through(grouped_blocked.products)).lower(*arguments).compile()


@hypothesis.given(ends=st.lists(st.integers(0, M), min_size=E, max_size=E).map(sorted))
@hypothesis.example(ends=[17, 33, 33, M])  # one row over, an empty group between
@hypothesis.settings(deadline=None, max_examples=30)
def test_blocks_of_any_size_and_what_is_left_over_equal_the_reference(small_blocks, ends):
    arguments = (*pairs(2), jnp.diff(jnp.array(ends), prepend=0))
    assert_close(small_blocks(*arguments), REFERENCE(*arguments))


@pytest.mark.parametrize("groups", [(4096,), (512,) * 8, (256,) * 64, (9000, *[1] * 63), (3, 2)])
def test_a_group_is_padded_by_less_than_the_smallest_block(groups):
    M, sizes_E = sum(groups), jnp.array(groups)
    least = grouped_blocked.block_sizes(M, len(groups))[-1]
    assert least <= 32

    def visited(size):
        return grouped_blocked.over_blocks(
            lambda total, block: total + block.size, jnp.int32(0), M, len(groups), 0, size
        )

    visited_E = jax.jit(jax.vmap(visited))(sizes_E)
    np.testing.assert_array_equal(visited_E, -(-sizes_E // least) * least)


def test_the_host_computes_the_same_whichever_thread_does(monkeypatch):
    """Denormal numbers, which XLA takes for zero, and threads that it did not start may not."""
    matmul = np.matmul

    def slow(*arrays, **options):
        time.sleep(0.005)  # so that each thread gets some of the tasks
        return matmul(*arrays, **options)

    monkeypatch.setattr(np, "matmul", slow)
    x_MD, w_EDF = jnp.full((M, D), 1e-20), jnp.full((E, D, F), 1e-20)
    (y_MF,) = FUNCTIONS["host"](x_MD, (w_EDF,), jnp.array(GROUPS["ragged"]))
    assert len(np.unique(np.asarray(y_MF).view(np.int32))) == 1


@pytest.mark.parametrize("name", ["blocked", "host"])
def test_gradients_are_the_slopes_of_the_value(name):
    """Along a random direction, in float64, which only these take."""
    with jax.enable_x64(True):
        x_MD, weights, gradients = pairs(1, dtype=jnp.float64)
        step_x, (step_w,), _ = pairs(1, dtype=jnp.float64)
        step_x, step_w = step_x[::-1], step_w[::-1]
        sizes_E = jnp.array(GROUPS["empty"], jnp.int32)

        def loss(x_MD, w_EDF):
            (y_MF,) = FUNCTIONS[name](x_MD, (w_EDF,), sizes_E)
            return jnp.sum(jnp.sin(y_MF) * gradients[0])

        @jax.jit
        def slopes(x, w):
            dx, dw = jax.grad(loss, argnums=(0, 1))(x, w)
            ahead, behind = (loss(x + e * step_x, w + e * step_w) for e in (1e-5, -1e-5))
            return jnp.sum(dx * step_x) + jnp.sum(dw * step_w), (ahead - behind) / 2e-5

        slope, difference = slopes(x_MD, weights[0])
        np.testing.assert_allclose(slope, difference, rtol=1e-5)


@pytest.mark.parametrize("name", FUNCTIONS)
def test_bfloat16_is_as_exact_as_a_dense_product(name):
    """Both round operands that are the same and a float32 sum once: errors of equal size.

    The same root mean square but for the order of sums, so a twentieth more is enough.
    """
    x_MD, weights, gradients = pairs(1, dtype=jnp.bfloat16)
    C = 12  # rows of each group

    def dense(x_MD, w_EDF, grad_MF):
        x_ECD, grad_ECF = (a[: E * C].reshape(E, C, -1) for a in (x_MD, grad_MF))
        y_ECF = jnp.einsum("ecd,edf->ecf", x_ECD, w_EDF)
        dx_ECD = jnp.einsum("ecf,edf->ecd", grad_ECF, w_EDF)
        return y_ECF, dx_ECD, jnp.einsum("ecd,ecf->edf", x_ECD, grad_ECF)

    arguments = (x_MD, weights[0], gradients[0])
    exact = jax.jit(dense)(*(a.astype(jnp.float32) for a in arguments))
    (y_MF,), (dx_MD, (dw_EDF,)) = COMPILED[name](
        x_MD, weights, gradients, jnp.array(GROUPS["even"])
    )

    def error(array, exact):
        assert array.dtype == jnp.bfloat16
        array = np.asarray(array, np.float32).ravel()[: exact.size]
        return np.linalg.norm(array - np.asarray(exact).ravel())

    grouped = y_MF, dx_MD, dw_EDF
    for ours, plain, oracle in zip(grouped, jax.jit(dense)(*arguments), exact, strict=True):
        assert error(ours, oracle) <= 1.05 * error(plain, oracle)


@pytest.mark.filterwarnings("ignore:The Pallas Triton backend")
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_triton_kernels_lower_for_cuda_without_a_gpu(dtype):
    gpu = jax.sharding.AbstractDevice("NVIDIA H100 80GB HBM3", num_cores=None, platform="gpu")
    mesh = jax.sharding.AbstractMesh((), (), abstract_device=gpu)
    arguments = (*pairs(2, dtype=dtype), jnp.array(GROUPS["even"]))
    with jax.sharding.use_abstract_mesh(mesh):
        product = functools.partial(grouped_matmul._product, grouped_gpu.TRITON)
        traced = jax.jit(through(product)).trace(*arguments)
        text = traced.lower(lowering_platforms=("cuda",)).as_text()
    kernels = re.findall(r'\bir = "((?:[^"\\]|\\.)*)"', text)
    assert len(kernels) == text.count("__gpu$xla.gpu.triton") == 5  # two products, two gradients
    # Pallas lowers a choice between two literal numbers to one between booleans, with no word.
    assert not any("select" in kernel for kernel in kernels)


def test_auto_is_the_fastest_kernel_of_each_platform():
    def first(platform):
        table = grouped_matmul.IMPLEMENTATIONS
        return next(n for n in table if not implementations.why_not(table[n], platform))

    assert [first(p) for p in ("cpu", "gpu", "tpu")] == ["host", "triton", "megablox"]


@pytest.mark.parametrize("name", ["megablox", "triton", "ragged_dot"])
def test_what_cannot_run_here_is_refused_in_one_line(name):
    x_MD, (w_EDF,), _ = pairs(1)
    with pytest.raises(ValueError, match=f"{name}' runs on .pu, not on cpu; use 'auto'$") as caught:
        grouped_matmul.grouped_matmul(x_MD, w_EDF, jnp.array([M]), implementation=name)
    assert "\n" not in str(caught.value)


def test_an_unknown_implementation_is_refused():
    with pytest.raises(ValueError, match="implementation='fast' is unknown"):
        grouped_matmul.grouped_matmul(
            jnp.ones((2, 2)), jnp.ones((1, 2, 2)), jnp.array([2]), implementation="fast"
        )


def test_dispatch_groups_rows_by_expert_and_combine_brings_them_back():
    expert_index_MA = jax.random.randint(jax.random.key(0), (16, 2), 0, E)
    x_MD = jax.random.normal(jax.random.key(1), (16, D))
    permutation = permute.sort_by_expert(expert_index_MA, E)
    experts_R = np.asarray(expert_index_MA).ravel()[np.asarray(permutation.assignment_R)]
    assert (np.diff(experts_R) >= 0).all()
    np.testing.assert_array_equal(permutation.group_sizes_E, np.bincount(experts_R, minlength=E))
    rows_RD = permute.dispatch(x_MD, permutation)
    np.testing.assert_allclose(permute.combine(rows_RD, permutation), 2 * x_MD, rtol=1e-6)


def test_gradients_of_dispatch_and_combine_are_each_other():
    """Against autodiff of plain indexing, which makes scatter-adds."""
    expert_index_MA = jax.random.randint(jax.random.key(0), (16, 2), 0, E)
    permutation = permute.sort_by_expert(expert_index_MA, E)
    x_MD = jax.random.normal(jax.random.key(1), (16, D))
    weight_MA = jax.random.uniform(jax.random.key(2), (16, 2))

    def mixed(x_MD, weight_MA, dispatch, dispatch_weight, combine):
        rows_RD = jnp.sin(dispatch(x_MD)) * dispatch_weight(weight_MA)[:, None]
        return jnp.sum(jnp.cos(combine(rows_RD)))

    def gradient(*functions):
        return jax.grad(lambda x, w: mixed(x, w, *functions), argnums=(0, 1))(x_MD, weight_MA)

    ours = gradient(
        lambda x: permute.dispatch(x, permutation),
        lambda w: permute.dispatch_weight(w, permutation),
        lambda rows: permute.combine(rows, permutation),
    )
    plain = gradient(
        lambda x: x[permutation.assignment_R // 2],
        lambda w: w.ravel()[permutation.assignment_R],
        lambda rows: jnp.zeros_like(x_MD).at[permutation.assignment_R // 2].add(rows),
    )
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), ours, plain)
