"""Router losses over an accumulation window are those of one batch; averages are not."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax

from moe_jax import model
from moe_jax.config import Run
from moe_jax.config.sections import Balance, Optimizer, Training
from moe_jax.parallel import mesh as meshes
from moe_jax.parallel import sharding
from moe_jax.training import optimizer, step
from moe_jax.training.state import TrainState

V, B, T, N = 32, 32, 8, 4
CONFIG = model.ModelConfig(
    vocab_size=V,
    hidden_size=8,
    intermediate_size=8,
    num_hidden_layers=2,
    num_attention_heads=2,
    num_experts=4,
    remat="none",
    initializer_range=0.3,  # so that experts are used unevenly
)
PARTS = ("load_balancing_loss", "router_z_loss", "importance_loss", "mutual_information")
BALANCE = Balance(
    load_balancing_coefficient=0.5,
    router_z_coefficient=0.01,
    importance_coefficient=0.3,
    mutual_information_coefficient=0.2,
)
TX = optimizer.adamw(Optimizer(gradient_clip_norm=1e9), 10)


def batch():
    lengths_B = np.random.default_rng(0).integers(0, T + 1, size=B)
    tokens_BT = jax.random.randint(jax.random.key(0), (B, T + 1), 0, V)
    return {
        "tokens": tokens_BT[:, :-1],
        "targets": tokens_BT[:, 1:],
        "segment_ids": (jnp.arange(T) < lengths_B[:, None]).astype(jnp.int32),
        "positions": jnp.tile(jnp.arange(T), (B, 1)),
    }


@functools.cache
def initial():
    create = jax.jit(lambda key: TrainState.create(model.init(CONFIG, key), TX))
    return create(jax.random.key(1))


def step_of(accumulation_steps, over, mesh=None):
    """The metrics of a step, and its gradients, which are ten times Adam's first moments."""
    settings = Run(
        model=CONFIG,
        training=Training(batch_size=B, accumulation_steps=accumulation_steps),
        balance=dataclasses.replace(BALANCE, load_balancing_over=over),
    )
    train_step = step.make_train_step(settings, TX)
    state, shardings = initial(), None
    if mesh is not None:
        state_shardings = sharding.shardings(state, mesh)
        state, shardings = jax.device_put(state, state_shardings), (state_shardings, None)
    after, metrics = jax.jit(train_step, out_shardings=shardings)(state, batch())
    gradients = jax.tree.map(lambda x: 10 * np.asarray(x), optax.tree.get(after.opt_state, "mu"))
    return metrics, gradients


def parts_of(metrics):
    return np.array([getattr(metrics.router, name) for name in PARTS])


def relative_error(gradients, others):
    difference = jax.tree.map(np.subtract, gradients, others)
    return float(optax.tree.norm(difference) / optax.tree.norm(others))


def test_a_window_is_as_one_batch_on_one_device_and_on_eight_and_averages_are_not():
    metrics, gradients = step_of(1, "global")
    mesh = meshes.make({"data": 2, "fsdp": 2, "expert": 2, "tensor": 1})
    with jax.set_mesh(mesh):
        on_mesh = step_of(N, "window", mesh)
    for in_window, gradients_in_window in (step_of(N, "window"), on_mesh):
        np.testing.assert_allclose(in_window.loss, metrics.loss, rtol=1e-6)
        np.testing.assert_allclose(parts_of(in_window), parts_of(metrics), rtol=1e-5)
        np.testing.assert_array_equal(in_window.tokens_per_expert_LE, metrics.tokens_per_expert_LE)
        assert relative_error(gradients_in_window, gradients) < 2e-6

    averaged, gradients_averaged = step_of(N, "global")
    errors = dict(zip(PARTS, np.abs(parts_of(averaged) / parts_of(metrics) - 1), strict=True))
    assert errors.pop("router_z_loss") < 1e-6  # a mean over tokens
    assert min(errors.values()) > 1e-2
    assert relative_error(gradients_averaged, gradients) > 0.1
