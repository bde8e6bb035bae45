"""Sums by bin, as a CPU adds them and as a GPU does."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe_jax.ops import bins, implementations

M, A, E = 40, 3, 7


@pytest.fixture(params=["cpu", "gpu"], autouse=True)
def platform(request, monkeypatch):
    monkeypatch.setattr(implementations, "platform", lambda: request.param)


def test_sums_leave_out_what_is_beyond_the_last_bin():
    random = np.random.default_rng(0)
    index_MA = random.integers(0, E + 2, (M, A))
    values_MA = random.normal(size=(M, A)).astype(np.float32)
    expected = [values_MA[index_MA == e].sum() for e in range(E)]
    sums_E = bins.sum_by_bin(jnp.asarray(values_MA), jnp.asarray(index_MA), E)
    np.testing.assert_allclose(sums_E, expected, rtol=1e-5, atol=1e-6)
    counts_E = bins.count_by_bin(jnp.asarray(index_MA), E)
    assert counts_E.dtype == jnp.int32
    assert counts_E.tolist() == [int((index_MA == e).sum()) for e in range(E)]


def test_a_sum_of_a_million_values_is_one_to_a_millionth():
    values_R = np.random.default_rng(0).uniform(1, 3, 2**20).astype(np.float32)
    index_R = np.arange(2**20) % 2
    exact_E = np.bincount(index_R, weights=values_R)
    sums_E = jax.jit(lambda *arrays: bins.sum_by_bin(*arrays, 2))(values_R, index_R)
    np.testing.assert_allclose(sums_E, exact_E, rtol=1e-6)


def test_what_is_chosen_has_the_gradient_of_a_gather():
    values_ME = jax.random.normal(jax.random.key(0), (M, E))
    index_MA = jax.lax.top_k(values_ME, A)[1]
    grad_MA = jax.random.normal(jax.random.key(1), (M, A))
    found, transpose = jax.vjp(lambda v: bins.chosen(v, index_MA), values_ME)
    exact, exact_transpose = jax.vjp(lambda v: jnp.take_along_axis(v, index_MA, 1), values_ME)
    np.testing.assert_array_equal(found, exact)
    np.testing.assert_array_equal(transpose(grad_MA)[0], exact_transpose(grad_MA)[0])
