"""The doctor's checks: all that runs here is right, and a wrong kernel is found and named."""

import jax
import jax.numpy as jnp
import pytest

from moe_jax.commands import doctor
from moe_jax.ops import grouped_matmul, implementations, verify


@pytest.fixture
def wrong_kernel(monkeypatch):
    """A product whose weight gradient forgets the first row of each group."""
    table = dict(grouped_matmul.IMPLEMENTATIONS)
    right = table["host"].function

    @jax.custom_vjp
    def forgetful(x_MD, weights, group_sizes_E):
        return right(x_MD, weights, group_sizes_E)

    def backward(residuals, gradients):
        x_MD, weights, group_sizes_E = residuals
        of_rows = jax.vjp(lambda x: right(x, weights, group_sizes_E), x_MD)[1](gradients)
        x_MD = x_MD.at[jnp.cumsum(group_sizes_E) - group_sizes_E].set(0)
        of_weights = jax.vjp(lambda w: right(x_MD, w, group_sizes_E), weights)[1](gradients)
        return *of_rows, *of_weights, None

    forgetful.defvjp(lambda *arguments: (right(*arguments), arguments), backward)
    table["host"] = implementations.Implementation(forgetful)
    monkeypatch.setitem(verify.CASES, "grouped_matmul", (verify.CASES["grouped_matmul"][0], table))
    monkeypatch.setattr(grouped_matmul, "IMPLEMENTATIONS", table)
    verify.check.cache_clear()
    yield
    verify.check.cache_clear()


def test_all_that_can_run_here_is_right():
    found = list(verify.checks())
    assert {check.op for check in found} == {"grouped_matmul", "attention", "cross_entropy"}
    assert {check.status for check in found} == {"ok", "not here"}
    assert {c.implementation: c.status for c in found}["megablox"] == "not here"


def test_a_wrong_gradient_is_found_and_refused(wrong_kernel):
    assert verify.check("grouped_matmul", "host").status == "wrong"
    with pytest.raises(
        ValueError, match="grouped_matmul implementation='auto' on this machine: wrong"
    ):
        verify.verify("grouped_matmul", "auto")


@pytest.mark.parametrize(
    ("name", "complaint"), [("nope", "is unknown"), ("splash", "runs on tpu, not on cpu")]
)
def test_an_implementation_that_cannot_run_is_refused_before_it_is_tried(name, complaint):
    with pytest.raises(ValueError, match=f"attention implementation='{name}' {complaint}; use"):
        verify.verify("attention", name)


def test_doctor_names_the_first_blas_that_tells_its_kernels(monkeypatch):
    """numpy's is the first that is loaded; Accelerate, for example, names no processor."""
    of_numpy = {"user_api": "blas", "internal_api": "openblas", "version": "0.3"}
    loaded = [
        {"user_api": "openmp", "internal_api": "openmp", "architecture": "none", "version": "1"},
        of_numpy | {"architecture": "Haswell"},
        of_numpy | {"architecture": "SkylakeX"},
    ]
    monkeypatch.setattr(doctor.threadpoolctl, "threadpool_info", lambda: loaded)
    assert doctor._blas() == ["openblas 0.3 with kernels for Haswell"]
    monkeypatch.setattr(doctor.threadpoolctl, "threadpool_info", lambda: [of_numpy])
    assert doctor._blas() == []
