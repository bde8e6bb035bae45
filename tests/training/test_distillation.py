"""The divergence from a teacher against the formula, and on eight devices against one."""

import jax
import jax.numpy as jnp
import numpy as np

from moe_jax import config as configs
from moe_jax import model
from moe_jax.config.objectives import Distillation
from moe_jax.data.batches import Batch
from moe_jax.model import transformer
from moe_jax.ops import cross_entropy
from moe_jax.parallel import mesh as meshes
from moe_jax.training import objective
from moe_jax.training.distillation import distillation_loss
from moe_jax.training.state import RouterState


def distillation(x_BTD, unembed_DV, y_BTC, teacher_CV, weight_BT, temperature):
    return distillation_loss(
        x_BTD, unembed_DV, y_BTC, teacher_CV, weight_BT, temperature=temperature
    )


def distillation_case(B=8, T=4, D=8, C=16, V=32):
    keys = jax.random.split(jax.random.key(0), 4)
    shapes = ((B, T, D), (D, V), (B, T, C), (C, V))
    arrays = [jax.random.normal(k, s) for k, s in zip(keys, shapes, strict=True)]
    return *arrays, (jnp.arange(B * T) % 3 > 0).reshape(B, T) / 20


def test_distillation_is_the_divergence_from_the_teacher_and_0_from_itself(monkeypatch):
    # Chunks of 5 tokens, one of 2.
    monkeypatch.setitem(cross_entropy.CHUNK_LOGITS, "cpu", 2 * 5 * 32)
    value, slope = jax.jit(jax.value_and_grad(distillation, argnums=(0, 1)), static_argnums=5)(
        *distillation_case(), 2.0
    )
    x, w, y, v, weight = (np.asarray(a, np.float64) for a in distillation_case())
    p, q = (np.exp(a - np.log(np.exp(a).sum(-1, keepdims=True))) for a in (x @ w / 2, y @ v / 2))
    by_hand = 2.0**2 * np.sum(weight * np.sum(q * np.log(q / p), axis=-1))
    np.testing.assert_allclose(value, by_hand, rtol=1e-5)
    # The gradient by the logits is that of cross-entropy with the teacher's shares: T (p - q).
    by_hand = 2.0 * weight[..., None] * (p - q)
    np.testing.assert_allclose(slope[0], by_hand @ w.T, atol=1e-5)
    np.testing.assert_allclose(slope[1], np.einsum("btd,btv->dv", x, by_hand), atol=1e-5)
    x, w, *_, weight = distillation_case()
    np.testing.assert_allclose(distillation(x, w, x, w, weight, 2.0), 0, atol=1e-6)


def test_distillation_on_eight_devices_is_that_on_one():
    function = jax.value_and_grad(distillation, argnums=(0, 1))
    alone = jax.jit(function, static_argnums=5)(*distillation_case(), 1.0)
    with jax.set_mesh(meshes.make({"data": 2, "fsdp": 2, "expert": 1, "tensor": 2})):
        spread = jax.jit(function, static_argnums=5)(*distillation_case(), 1.0)
    for a, b in zip(jax.tree.leaves(spread), jax.tree.leaves(alone), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6)


def test_distillation_alone_has_the_value_and_the_gradient_of_the_divergence():
    config = model.ModelConfig(
        vocab_size=32,
        hidden_size=8,
        intermediate_size=8,
        num_hidden_layers=1,
        num_attention_heads=2,
        remat="none",
    )
    alone = Distillation(source="t", coefficient=1.0, temperature=2.0, cross_entropy_coefficient=0)
    run = configs.Run(model=config, objective=configs.Objective(distillation=alone))
    params, teacher = (
        jax.jit(lambda key: model.init(config, key))(jax.random.key(seed)) for seed in range(2)
    )
    batch = Batch.of_rows(jax.random.randint(jax.random.key(2), (2, 9), 0, 32))

    def by_itself(params):
        x, y = (objective.hidden_states(p, batch, None, config)[0] for p in (params, teacher))
        w, v = transformer.unembedding(params), transformer.unembedding(teacher)
        return distillation_loss(x, w, y, v, batch.weights_BT / 16, temperature=2.0)

    context = objective.Context(
        run, params, batch, RouterState(), {"teacher": (config, teacher)}, lambda function: None
    )
    loss = objective.next_token(context)
    (value, measured), slope = jax.jit(
        lambda params: jax.value_and_grad(loss, has_aux=True)(params, batch, None)
    )(params)
    expected, direction = jax.jit(jax.value_and_grad(by_itself))(params)
    assert value == expected == measured.terms["distillation_loss"] > 1e-3
    assert measured.loss > 1  # the cross-entropy is still measured
    for a, b in zip(jax.tree.leaves(slope), jax.tree.leaves(direction), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-9)
