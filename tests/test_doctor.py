"""The self-check: all that runs here is right, and a wrong kernel is found and named."""

import dataclasses

import jax.numpy as jnp
import pytest

from moe_jax import doctor
from moe_jax.ops import grouped_matmul, implementations


@pytest.fixture
def wrong_kernel(monkeypatch):
    """A product whose weight gradient forgets the first row of each group."""
    table = dict(grouped_matmul.IMPLEMENTATIONS)
    kernel = table["blocked"].function.args[0]

    def forgetful(x_MD, gradients, group_sizes_E):
        first_E = jnp.cumsum(group_sizes_E) - group_sizes_E
        return kernel.weight_gradient(x_MD.at[first_E].set(0), gradients, group_sizes_E)

    function = table["blocked"].function.func
    broken = dataclasses.replace(kernel, weight_gradient=forgetful)
    table["blocked"] = implementations.Implementation(lambda *a: function(broken, *a))
    monkeypatch.setitem(doctor.CASES, "grouped_matmul", (doctor.CASES["grouped_matmul"][0], table))
    monkeypatch.setattr(grouped_matmul, "IMPLEMENTATIONS", table)
    doctor.check.cache_clear()
    yield
    doctor.check.cache_clear()


def test_all_that_can_run_here_is_right():
    found = list(doctor.checks())
    assert {check.op for check in found} == {"grouped_matmul", "attention", "cross_entropy"}
    assert {check.status for check in found} == {"ok", "not here"}
    assert {c.implementation: c.status for c in found}["megablox"] == "not here"


def test_a_wrong_gradient_is_found_and_refused(wrong_kernel):
    assert doctor.check("grouped_matmul", "blocked").status == "wrong"
    with pytest.raises(
        ValueError, match="grouped_matmul implementation='auto' on this machine: wrong"
    ):
        doctor.verify("grouped_matmul", "auto")


@pytest.mark.parametrize(
    ("name", "complaint"), [("nope", "is unknown"), ("splash", "runs on tpu, not on cpu")]
)
def test_an_implementation_that_cannot_run_is_refused_before_it_is_tried(name, complaint):
    with pytest.raises(ValueError, match=f"attention implementation='{name}' {complaint}; use"):
        doctor.verify("attention", name)
