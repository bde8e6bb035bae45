"""The chunked loss against the plain one and finite differences; no buffer of all logits."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe_jax.dryrun import hlo
from moe_jax.ops import cross_entropy
from moe_jax.parallel import mesh as meshes
from moe_jax.parallel import sharding

B, T, D, V = 8, 12, 16, 40


@pytest.fixture(autouse=True)
def three_positions_at_a_time(monkeypatch):
    monkeypatch.setitem(cross_entropy.CHUNK_LOGITS, "cpu", 3 * B * V)


def inputs(dtype=jnp.float32):
    keys = jax.random.split(jax.random.key(0), 4)
    return (
        jax.random.normal(keys[0], (B, T, D)).astype(dtype),
        jax.random.normal(keys[1], (D, V)).astype(dtype),
        jax.random.randint(keys[2], (B, T), 0, V),
        (jax.random.uniform(keys[3], (B, T)) < 0.7) / 50,
    )


def value_and_gradients(implementation, z_coefficient=0.0, dtype=jnp.float32):
    x_BTD, unembed_DV, *rest = inputs(dtype)

    @functools.partial(jax.jit)
    @functools.partial(jax.value_and_grad, argnums=(0, 1), has_aux=True)
    def loss(x_BTD, unembed_DV):
        sums = cross_entropy.cross_entropy(
            x_BTD,
            unembed_DV,
            *rest,
            z_coefficient=z_coefficient,
            implementation=implementation,
        )
        return 3 * sums.total, (sums.nats, sums.z)

    return loss(x_BTD, unembed_DV)


def test_it_is_minus_the_log_probability_of_the_target_summed_by_weight():
    x_BTD, unembed_DV, targets_BT, weight_BT = (np.asarray(x, np.float64) for x in inputs())
    logits_BTV = x_BTD @ unembed_DV
    p_BTV = np.exp(logits_BTV) / np.exp(logits_BTV).sum(axis=-1, keepdims=True)
    target_BT1 = targets_BT.astype(int)[..., None]
    nats_BT = -np.log(np.take_along_axis(p_BTV, target_BT1, axis=-1))[..., 0]
    sums = cross_entropy.cross_entropy(*inputs())
    np.testing.assert_allclose(sums.nats, (nats_BT * weight_BT).sum(), rtol=1e-5)
    np.testing.assert_allclose(
        cross_entropy.token_losses(*inputs()[:3]), nats_BT, rtol=1e-4, atol=1e-5
    )


@pytest.mark.parametrize("z_coefficient", [0.0, 1e-2])
def test_chunks_equal_the_reference_in_value_and_gradient(z_coefficient):
    fast, slow = (value_and_gradients(name, z_coefficient) for name in ("chunked", "reference"))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), fast, slow)


def test_the_gradient_is_the_slope_of_the_value():
    (_, _), (grad_BTD, grad_DV) = value_and_gradients("chunked", 1e-2)
    x_BTD, unembed_DV, targets_BT, weight_BT = inputs()
    rng = np.random.default_rng(0)
    step_BTD, step_DV = rng.normal(size=x_BTD.shape), rng.normal(size=unembed_DV.shape)

    def value(h):  # in float64, by numpy
        logits_BTV = (x_BTD + h * step_BTD) @ (unembed_DV + h * step_DV)
        log_z_BT = np.log(np.exp(logits_BTV).sum(axis=-1))
        target_BT = np.take_along_axis(logits_BTV, np.asarray(targets_BT)[..., None], -1)[..., 0]
        return 3 * np.sum((log_z_BT - target_BT + 1e-2 * log_z_BT**2) * np.asarray(weight_BT))

    x_BTD, unembed_DV = np.asarray(x_BTD, np.float64), np.asarray(unembed_DV, np.float64)
    slope = (value(1e-5) - value(-1e-5)) / 2e-5
    np.testing.assert_allclose(
        np.sum(grad_BTD * step_BTD) + np.sum(grad_DV * step_DV), slope, rtol=1e-4
    )


def test_bfloat16_inputs_keep_float32_losses():
    """Both round x and the matrix alike; the chunked gradient of the matrix adds in float32."""
    (fast, _), fast_grads = value_and_gradients("chunked", dtype=jnp.bfloat16)
    (slow, _), slow_grads = value_and_gradients("reference", dtype=jnp.bfloat16)
    assert fast.dtype == jnp.float32 and fast_grads[1].dtype == jnp.bfloat16
    np.testing.assert_allclose(fast, slow, rtol=1e-5)
    for a, b in zip(fast_grads, slow_grads, strict=True):
        a, b = np.asarray(a, np.float32), np.asarray(b, np.float32)
        assert np.abs(a - b).max() < 0.02 * np.abs(b).max()


def test_no_buffer_holds_the_logits_of_all_positions():
    x_BTD, unembed_DV, *rest = inputs()

    def buffers(implementation):
        def loss(x_BTD, unembed_DV):
            sums = cross_entropy.cross_entropy(
                x_BTD, unembed_DV, *rest, implementation=implementation
            )
            return sums.total

        compiled = jax.jit(jax.grad(loss, argnums=(0, 1))).lower(x_BTD, unembed_DV).compile()
        return {int(np.prod(shape)) for shape in hlo.buffer_shapes(compiled.as_text())}

    assert B * T * V in buffers("reference")
    assert max(buffers("chunked")) < B * T * V


@pytest.mark.parametrize("sizes", [(1, 8, 1, 1), (1, 2, 2, 2)])
def test_on_a_mesh_value_and_gradient_are_those_of_one_device(sizes):
    alone = value_and_gradients("chunked", 1e-2)
    mesh = meshes.make(dict(zip(meshes.AXES, sizes, strict=False)))
    with jax.set_mesh(mesh):
        on_mesh = value_and_gradients("chunked", 1e-2)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), on_mesh, alone
    )
    assert sharding.spec_of("unembed") == jax.P("fsdp", ("tensor", "edp"))


def test_an_unknown_implementation_is_refused():
    with pytest.raises(ValueError, match="implementation='fused' is unknown"):
        cross_entropy.cross_entropy(*inputs(), implementation="fused")
