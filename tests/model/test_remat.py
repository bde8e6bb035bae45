"""Every policy gives the same loss and gradients; what is kept costs memory."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe_jax import model
from moe_jax.model import remat

CONFIG = model.ModelConfig(
    vocab_size=32,
    hidden_size=16,
    intermediate_size=64,
    num_hidden_layers=4,
    num_attention_heads=2,
    num_experts=4,
    layers=("dense", "moe") * 2,
    remat="none",
)
PARAMS = model.init(CONFIG, jax.random.key(0))
TOKENS_BT = jax.random.randint(jax.random.key(1), (2, 96), 0, 32)


def compiled(policy):
    config = dataclasses.replace(CONFIG, remat=policy)

    def loss(params):
        return jnp.mean(jnp.sin(model.apply(params, TOKENS_BT, config).logits_BTV))

    return jax.jit(jax.value_and_grad(loss)).lower(PARAMS).compile()


FEW = ("full", "save_dots", "none")  # in the order of what they keep
ALL = ("full", "save_experts", "save_dots", "none", "offload_experts", "offload_dots")


@pytest.mark.parametrize("policies", [FEW, pytest.param(ALL, marks=pytest.mark.long)])
def test_a_policy_changes_memory_but_neither_loss_nor_gradients(policies):
    """To rounding: XLA fuses what is computed again otherwise than what is kept."""
    assert set(ALL) == {"none", *remat.SAVED}
    steps = {policy: compiled(policy) for policy in policies}
    expected = steps["none"](PARAMS)
    for step in steps.values():
        jax.tree.map(
            lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-7),
            step(PARAMS),
            expected,
        )
    size = [
        steps[name].memory_analysis().temp_size_in_bytes for name in policies if name in ALL[:4]
    ]
    assert size == sorted(set(size))


def test_a_name_that_no_policy_knows_is_a_mistake():
    with pytest.raises(AssertionError, match="gate_upp"):
        remat.named("gate_upp", jnp.ones(2))
