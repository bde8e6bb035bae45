"""Routing at its limits: values and gradients of a layer stay finite, and loads are right."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe_jax import model
from moe_jax.model import moe

B, T, D = 2, 8, 8


def sizes(num_experts, num_experts_per_tok, **more):
    return model.ModelConfig(
        vocab_size=32,
        hidden_size=D,
        intermediate_size=8,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_experts=num_experts,
        num_experts_per_tok=num_experts_per_tok,
        norm_topk_prob=num_experts_per_tok > 1,
        **more,
    )


NO_ROOM = {"dispatch": "capacity", "capacity_factor": 1e-6, "min_capacity": 1}
# (config, number of valid tokens in each row, the load of each expert or None if it may be any)
CASES = {
    "all tokens to the same experts by logits of 1e4": (sizes(4, 2), T, [16, 0, 16, 0]),
    "fewer tokens than experts": (sizes(64, 2), 1, None),
    "every expert for every token": (sizes(4, 4), T, [16] * 4),
    "one expert": (sizes(1, 1), T, [16]),
    "room for one token": (sizes(4, 2, **NO_ROOM), T, None),
    "no valid token": (sizes(4, 2), 0, [0] * 4),
}
LONG = ("one expert", "every expert for every token", "room for one token")


@pytest.mark.parametrize(
    "case", [pytest.param(c, marks=[pytest.mark.long] if c in LONG else []) for c in CASES]
)
def test_routing_at_its_limits_is_finite_in_value_and_gradient(case):
    config, num_valid, load_E = CASES[case]
    params = model.init(config, jax.random.key(0))["blocks"]["0"]["moe"]
    params = jax.tree.map(lambda w: w[0], params)
    x_BTD = jnp.abs(jax.random.normal(jax.random.key(1), (B, T, D)))
    valid_BT = jnp.broadcast_to(jnp.arange(T) < num_valid, (B, T))
    if "1e4" in case:
        params["norm"]["scale"] = jnp.full(D, 1.0)
        kernel_DE = jnp.array([1e4, -1e4, 2e4, -2e4]) * jnp.ones((D, 1))
        params["router"]["kernel"] = kernel_DE

    @jax.jit
    def value_and_gradients(x_BTD, params):
        def loss(x_BTD, params):
            y_BTD, stats = moe.moe(x_BTD, params, valid_BT, config, key=None, training=True)
            return jnp.sum(jnp.sin(y_BTD) * valid_BT[..., None]), (y_BTD, stats)

        return jax.value_and_grad(loss, argnums=(0, 1), has_aux=True)(x_BTD, params)

    (loss, (y_BTD, stats)), gradients = value_and_gradients(x_BTD, params)
    for leaf in jax.tree.leaves((loss, y_BTD[valid_BT], gradients)):
        assert np.isfinite(leaf).all()
    tokens_E = np.sum(stats.tokens_per_expert_E, axis=0)
    assert tokens_E.sum() == B * num_valid * config.num_experts_per_tok
    if load_E is not None:
        np.testing.assert_array_equal(tokens_E, load_E)
    if "room" in case:
        assert np.sum(stats.num_dropped) >= B * T * 2 - 8
