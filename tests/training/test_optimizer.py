"""Schedules at points known by hand, what decays, what is clipped."""

import jax.numpy as jnp
import numpy as np
import optax
import pytest

from moe_jax import config as configs
from moe_jax.training import optimizer


def settings(**changes):
    section = configs.default().optimizer
    section.update(learning_rate=1.0, final_learning_rate_ratio=0.1, **changes)
    return section


def rates(section, num_steps):
    schedule = optimizer.schedule(section, num_steps)
    return np.array([float(schedule(step)) for step in range(num_steps + 1)])


def test_cosine_rises_linearly_and_falls_along_a_half_cosine():
    rate = rates(settings(schedule="cosine", warmup_steps=4), 14)
    np.testing.assert_allclose(rate[:5], [0.25, 0.5, 0.75, 1.0, 1.0], rtol=1e-6)
    along = np.arange(11) / 10
    np.testing.assert_allclose(rate[4:], 0.1 + 0.9 * (1 + np.cos(np.pi * along)) / 2, rtol=1e-5)


def test_wsd_is_constant_until_a_linear_decay():
    rate = rates(settings(schedule="wsd", warmup_steps=2, decay_steps=5), 12)
    np.testing.assert_allclose(rate[:2], [0.5, 1.0])
    np.testing.assert_allclose(rate[2:8], 1.0)
    np.testing.assert_allclose(rate[7:], np.linspace(1.0, 0.1, 6), rtol=1e-6)


@pytest.mark.parametrize("name", ["cosine", "wsd"])
def test_without_warmup_the_first_step_has_the_peak_rate(name):
    assert rates(settings(schedule=name, warmup_steps=0, decay_steps=0), 3)[0] == 1.0


def test_weight_decay_leaves_norm_scales_alone():
    params = {"wq": jnp.ones(2), "norm": {"scale": jnp.ones(2)}}
    tx = optimizer.adamw(settings(weight_decay=0.5, warmup_steps=0), 10)
    zero = {"wq": jnp.zeros(2), "norm": {"scale": jnp.zeros(2)}}
    updates, _ = tx.update(zero, tx.init(params), params)
    np.testing.assert_allclose(updates["wq"], -0.5)
    np.testing.assert_array_equal(updates["norm"]["scale"], 0)


def test_gradients_are_clipped_by_their_global_norm():
    """Adam is blind to a constant scale, so the clip is seen in its first moment."""
    tx = optimizer.adamw(settings(gradient_clip_norm=1.0), 10)
    params = {"a": jnp.zeros(1), "b": jnp.zeros(1)}
    _, state = tx.update({"a": jnp.array([30.0]), "b": jnp.array([40.0])}, tx.init(params), params)
    moment = optax.tree.get(state, "mu")
    np.testing.assert_allclose(moment["a"] / 0.1, 0.6, rtol=1e-5)
    np.testing.assert_allclose(moment["b"] / 0.1, 0.8, rtol=1e-5)
