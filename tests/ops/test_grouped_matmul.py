"""The fast product against the reference, in value and gradient, on awkward groups."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe_jax.ops import grouped_matmul, permute

M, D, F, E = 48, 8, 12, 4
GROUPS = {
    "even": (12, 12, 12, 12),
    "ragged": (1, 30, 7, 10),
    "empty": (0, 25, 0, 23),
    "all to one": (0, 0, 48, 0),
    "all to the last": (0, 0, 0, 48),
    "rows beyond the sum": (5, 0, 9, 3),
    "nothing": (0, 0, 0, 0),
}


@functools.partial(jax.jit, static_argnames="implementation")
def value_and_gradients(x_MD, w_EDF, sizes_E, implementation):
    def loss(x_MD, w_EDF):
        y_MF = grouped_matmul.grouped_matmul(x_MD, w_EDF, sizes_E, implementation=implementation)
        return jnp.sum(jnp.sin(y_MF)), y_MF

    (_, y_MF), gradients = jax.value_and_grad(loss, argnums=(0, 1), has_aux=True)(x_MD, w_EDF)
    return y_MF, gradients


@pytest.mark.parametrize("groups", GROUPS.values(), ids=GROUPS)
def test_blocked_equals_the_reference_and_numpy(groups):
    x_MD = jax.random.normal(jax.random.key(0), (M, D))
    w_EDF = jax.random.normal(jax.random.key(1), (E, D, F))
    sizes_E = jnp.array(groups)
    fast = value_and_gradients(x_MD, w_EDF, sizes_E, "blocked")
    slow = value_and_gradients(x_MD, w_EDF, sizes_E, "reference")
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5), fast, slow)

    expert_M = np.repeat(np.arange(E), groups)
    by_hand = np.zeros((M, F), np.float32)
    for row, expert in enumerate(expert_M):
        by_hand[row] = np.asarray(x_MD[row]) @ np.asarray(w_EDF[expert])
    np.testing.assert_allclose(fast[0], by_hand, rtol=1e-5, atol=1e-5)


def test_a_single_expert_is_a_plain_product():
    x_MD = jax.random.normal(jax.random.key(0), (M, D))
    w_EDF = jax.random.normal(jax.random.key(1), (1, D, F))
    y_MF = grouped_matmul.grouped_matmul(x_MD, w_EDF, jnp.array([M]))
    np.testing.assert_allclose(y_MF, x_MD @ w_EDF[0], rtol=1e-5, atol=1e-5)


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
