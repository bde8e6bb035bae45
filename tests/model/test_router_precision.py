"""Every product that gives router logits is one of float32 at highest precision, and its gradients.

Otherwise a TPU multiplies in bfloat16: visible in the text that is lowered, for any backend.
"""

import dataclasses
import re

import jax
import jax.numpy as jnp
import pytest

from moe_jax import model
from moe_jax.model import attention, moe, router

B, T, D, E = 2, 8, 16, 6
CONFIG = model.ModelConfig(
    vocab_size=32,
    hidden_size=D,
    intermediate_size=24,
    num_hidden_layers=1,
    num_attention_heads=2,
    num_experts=E,
    dtype="bfloat16",
)
FIELDS = {"expert_choice": {"dispatch": "capacity"}, "group_topk": {"num_expert_groups": 3}}
CASES = {
    **{name: {"router": name, **FIELDS.get(name, {})} for name in router.ROUTERS},
    "merged": {"dispatch": "merge", "merge_segment_length": 4},
}
PRODUCT = re.compile(
    r"dot_general .*?(?:precision = \[(\w+), \w+\].*?)?: \(tensor<\S*x(\w+)>, tensor<\S*x(\w+)>\)"
)


def feed_forward(x_BTD, params, config):
    valid_BT = jnp.ones((B, T), bool)
    return moe.moe(x_BTD, params["moe"], valid_BT, config, key=jax.random.key(0), training=True)[0]


def attention_experts(x_BTD, params, config):
    positions_BT = jnp.tile(jnp.arange(T), (B, 1))
    rest = positions_BT, jnp.ones_like(positions_BT), config
    return attention.attention(x_BTD, params["attention"], *rest)[0]


def with_gradients(layer, config):
    """The layer's value and gradients, and what they are of."""
    params = jax.eval_shape(lambda: model.init(config, jax.random.key(0)))["blocks"]["0"]
    params = jax.tree.map(lambda w: jax.ShapeDtypeStruct(w.shape[1:], w.dtype), params)

    def loss(x_BTD, params):
        return jnp.sum(layer(x_BTD, params, config).astype(jnp.float32) ** 2)

    x_BTD = jax.ShapeDtypeStruct((B, T, D), jnp.bfloat16)
    return jax.jit(jax.value_and_grad(loss, argnums=(0, 1))), (x_BTD, params)


def of_floats(text):
    """The precisions of a text's products of float32."""
    found = PRODUCT.findall(text)
    assert len(found) == text.count("dot_general ")
    return [precision for precision, *dtypes in found if dtypes == ["f32", "f32"]]


@pytest.mark.parametrize("name", CASES)
def test_router_logits_are_products_at_highest_precision(name):
    """The logits and their two gradients: all other products are of bfloat16."""
    config = dataclasses.replace(CONFIG, grouped_matmul="reference", **CASES[name])
    function, arguments = with_gradients(feed_forward, config)
    found = of_floats(function.lower(*arguments).as_text())
    assert set(found) == {"HIGHEST"} and len(found) % 3 == 0


def test_the_shares_of_attention_experts_are_too():
    config = dataclasses.replace(CONFIG, num_attention_experts=3, attention="reference")
    function, arguments = with_gradients(attention_experts, config)
    assert of_floats(function.lower(*arguments).as_text()) == ["HIGHEST"] * 3
