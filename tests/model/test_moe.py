"""Capacity dispatch against dropless and against its shards; forced balance; drop rates."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe_jax import model
from moe_jax.model import moe
from moe_jax.model.routing import capacity, virtual_drop_rate
from moe_jax.parallel import mesh as meshes

B, T, D, E, A = 8, 16, 16, 4, 2
DROPLESS = model.ModelConfig(
    vocab_size=32,
    hidden_size=D,
    intermediate_size=24,
    num_hidden_layers=1,
    num_attention_heads=2,
    num_experts=E,
    num_experts_per_tok=A,
)
CAPACITY = dataclasses.replace(DROPLESS, dispatch="capacity", min_capacity=1)
PARAMS = jax.tree.map(lambda w: w[0], model.init(DROPLESS, jax.random.key(0))["blocks"]["0"]["moe"])
X_BTD = jax.random.normal(jax.random.key(1), (B, T, D))
VALID_BT = jnp.arange(T) < jnp.array([T, 10, T, 3, T, T, 0, T])[:, None]


def layer(config, x_BTD=X_BTD, valid_BT=VALID_BT, key=None):
    @jax.jit
    def value_and_gradients(x_BTD, params):
        def loss(x_BTD, params):
            y_BTD, stats = moe.moe(x_BTD, params, valid_BT, config, key=key)
            return jnp.sum(jnp.sin(y_BTD) * valid_BT[..., None]), (y_BTD, stats)

        (_, out), gradients = jax.value_and_grad(loss, argnums=(0, 1), has_aux=True)(x_BTD, params)
        return *out, gradients

    return value_and_gradients(x_BTD, PARAMS)


def test_with_room_for_all_capacity_equals_dropless():
    y_BTD, stats, gradients = layer(dataclasses.replace(CAPACITY, capacity_factor=float(E)))
    dropless = layer(DROPLESS)
    assert stats.num_dropped[0] == 0
    np.testing.assert_allclose(y_BTD[VALID_BT], dropless[0][VALID_BT], rtol=1e-5, atol=1e-6)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), gradients, dropless[2]
    )


def test_what_does_not_fit_is_dropped_and_counted():
    y_BTD, stats, _ = layer(dataclasses.replace(CAPACITY, capacity_factor=0.25))
    C = capacity(B * T * A, E, 0.25, 1)
    load_E = stats.tokens_per_expert_E[0]
    assert stats.num_dropped[0] == np.maximum(load_E - C, 0).sum() > 0
    untouched_BT = (np.abs(y_BTD) == 0).all(axis=-1)  # both assignments of a token dropped
    assert untouched_BT[VALID_BT].any() and untouched_BT[~VALID_BT].all()


@pytest.mark.parametrize("priority", ["position", "random"])
def test_on_a_mesh_each_batch_shard_has_its_own_capacity(priority):
    """Equal to the layer on each shard's rows alone, one after the other."""
    config = dataclasses.replace(CAPACITY, capacity_factor=0.5, token_priority=priority)
    key = jax.random.key(3) if priority == "random" else None
    with jax.set_mesh(meshes.make({"data": 1, "fsdp": 2, "expert": 2, "tensor": 2})):
        y_BTD, stats, _ = layer(config, key=key)
    for shard in range(4):
        rows = slice(2 * shard, 2 * shard + 2)
        own_key = None if key is None else jax.random.fold_in(key, shard)
        alone_BTD, alone, _ = layer(config, X_BTD[rows], VALID_BT[rows], own_key)
        np.testing.assert_allclose(y_BTD[rows], alone_BTD, rtol=1e-5, atol=1e-6)
        assert stats.num_dropped[shard] == alone.num_dropped[0]


def test_forced_balance_loads_every_expert_alike_and_has_the_gradient_of_the_router():
    config = dataclasses.replace(DROPLESS, router="forced_balance")
    _, stats, (_, gradients) = layer(config, valid_BT=jnp.ones((B, T), bool))
    np.testing.assert_array_equal(stats.tokens_per_expert_E[0], B * T * A // E)
    assert np.abs(gradients["router"]["kernel"]).max() > 0


def test_virtual_drop_rate_by_hand():
    """16 assignments, 4 experts: C = ceil(1.25 * 4) = 5; then 4 + 0, and all but 5 of one."""
    load_LE = np.array([[9, 3, 3, 1], [16, 0, 0, 0], [4, 4, 4, 4]])
    np.testing.assert_allclose(virtual_drop_rate(load_LE, 1.25), [4 / 16, 11 / 16, 0])
    np.testing.assert_allclose(virtual_drop_rate(jnp.array(load_LE), 1.25)[0], 4 / 16)
