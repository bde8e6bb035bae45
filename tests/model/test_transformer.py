"""The forward pass: the tree, documents, causality, fast path against reference, dtypes, meshes."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe_jax import model
from moe_jax.model import rope, transformer
from moe_jax.model.config import DENSE, MOE
from moe_jax.parallel import mesh as meshes
from moe_jax.parallel import sharding

DENSE_CONFIG = model.ModelConfig(
    vocab_size=64,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=3,
    num_attention_heads=4,
    num_key_value_heads=2,
)
MIXED_CONFIG = DENSE_CONFIG.to_moe(num_experts=4, num_experts_per_tok=2, layers=(DENSE, MOE, MOE))
TOKENS_BT = jax.random.randint(jax.random.key(1), (8, 16), 0, 64)


@functools.cache
def params_of(config):
    return jax.jit(model.init, static_argnums=0)(config, jax.random.key(0))


apply = jax.jit(model.apply, static_argnames=("config", "return_routing"))


def test_the_parameter_tree_is_the_documented_one():
    shapes = jax.tree.map(jnp.shape, params_of(MIXED_CONFIG))
    attention = {
        "norm": {"scale": (32,)},
        "wq": (32, 4, 8),
        "wk": (32, 2, 8),
        "wv": (32, 2, 8),
        "wo": (4, 8, 32),
    }
    mlp = {"norm": {"scale": (32,)}, "gate": (32, 48), "up": (32, 48), "down": (48, 32)}
    moe = {
        "norm": {"scale": (32,)},
        "router": {"kernel": (32, 4)},
        "experts": {"gate": (4, 32, 48), "up": (4, 32, 48), "down": (4, 48, 32)},
    }

    def stacked(repeats, tree):
        return jax.tree.map(
            lambda shape: (repeats, *shape), tree, is_leaf=lambda node: isinstance(node, tuple)
        )

    assert shapes == {
        "embed": {"tokens": (64, 32)},
        "unembed": (32, 64),
        "final_norm": {"scale": (32,)},
        "blocks": {
            "0": stacked(1, {"attention": attention, "mlp": mlp}),
            "1": stacked(2, {"attention": attention, "moe": moe}),
        },
    }
    tied = dataclasses.replace(DENSE_CONFIG, tie_word_embeddings=True)
    assert "unembed" not in params_of(tied)


def test_a_layer_and_an_expert_do_not_depend_on_how_many_others_there_are():
    more = dataclasses.replace(
        MIXED_CONFIG, num_experts=6, num_hidden_layers=4, layers=(DENSE, MOE, MOE, MOE)
    )
    few, many = params_of(MIXED_CONFIG)["blocks"]["1"], params_of(more)["blocks"]["1"]
    np.testing.assert_array_equal(few["attention"]["wq"], many["attention"]["wq"][:2])
    np.testing.assert_array_equal(few["moe"]["experts"]["up"], many["moe"]["experts"]["up"][:2, :4])
    kernel = many["moe"]["router"]["kernel"][:2, :, :4]
    np.testing.assert_array_equal(few["moe"]["router"]["kernel"], kernel)


@pytest.mark.parametrize("config", [DENSE_CONFIG, MIXED_CONFIG], ids=["dense", "mixed"])
def test_a_packed_document_has_the_logits_it_has_alone(config):
    """Masks, positions and routing: nothing of one segment reaches another, or the future."""
    params = params_of(config)
    first, second = TOKENS_BT[:2, :10], TOKENS_BT[2:4, :6]
    packed = apply(
        params,
        jnp.concatenate([first, second], axis=1),
        config,
        positions_BT=jnp.tile(jnp.concatenate([jnp.arange(10), jnp.arange(6)]), (2, 1)),
        segment_ids_BT=jnp.tile(jnp.array([1] * 10 + [2] * 6), (2, 1)),
    ).logits_BTV
    np.testing.assert_allclose(packed[:, :10], apply(params, first, config).logits_BTV, atol=1e-6)
    np.testing.assert_allclose(packed[:, 10:], apply(params, second, config).logits_BTV, atol=1e-6)
    changed = TOKENS_BT.at[:, -1].set((TOKENS_BT[:, -1] + 1) % 64)
    before, after = (apply(params, t, config).logits_BTV for t in (TOKENS_BT, changed))
    np.testing.assert_allclose(before[:, :-1], after[:, :-1], atol=1e-6)
    assert not np.allclose(before[:, -1], after[:, -1])


def test_grouped_query_attention_equals_multi_head_attention_with_repeated_heads():
    params = params_of(DENSE_CONFIG)
    repeated = jax.tree.map(lambda x: x, params)
    attention = repeated["blocks"]["0"]["attention"]
    for name in ("wk", "wv"):
        attention[name] = jnp.repeat(attention[name], 2, axis=2)
    full = dataclasses.replace(DENSE_CONFIG, num_key_value_heads=4)
    np.testing.assert_allclose(
        apply(params, TOKENS_BT, DENSE_CONFIG).logits_BTV,
        apply(repeated, TOKENS_BT, full).logits_BTV,
        atol=1e-6,
    )


def test_rows_beyond_learned_positions_are_refused_wherever_they_are_embedded():
    """Under jit an index out of range would be clamped: all tokens beyond share a position."""
    config = dataclasses.replace(
        DENSE_CONFIG, position_embedding="learned", max_position_embeddings=15
    )
    shared = transformer.Shared(jnp.zeros((8, 16), jnp.int32), jnp.ones((8, 16), jnp.int32))
    params = jax.eval_shape(functools.partial(model.init, config), jax.random.key(0))
    for forward in (
        lambda params: model.apply(params, TOKENS_BT, config),
        lambda params: transformer.hidden_states(params, TOKENS_BT, shared, config),
    ):
        with pytest.raises(ValueError, match="rows of 16 tokens are beyond the model's 15 learned"):
            jax.eval_shape(forward, params)
    model.apply(params_of(config), TOKENS_BT[:1, :15], config)


def test_rotary_scores_depend_on_the_distance_only():
    x_BTNH = jax.random.normal(jax.random.key(0), (1, 2, 1, 8))

    def score(first, second):
        q_BTNH = rope.rotate(x_BTNH, jnp.array([[first, second]]), DENSE_CONFIG)
        return jnp.vdot(q_BTNH[0, 0], q_BTNH[0, 1])

    np.testing.assert_allclose(score(3, 7), score(103, 107), rtol=1e-4)
    assert abs(score(3, 7) - score(3, 8)) > 1e-3


def test_a_way_to_stretch_waves_is_added_to_the_table_from_outside(monkeypatch):
    still = rope.Rope(("rope_scaling_factor",), lambda frequency, config: 0 * frequency)
    monkeypatch.setitem(rope.ROPES, "still", still)
    config = dataclasses.replace(DENSE_CONFIG, rope_type="still", rope_scaling_factor=2.0)
    x_BTNH = jax.random.normal(jax.random.key(0), (1, 2, 1, 8))
    np.testing.assert_array_equal(rope.rotate(x_BTNH, jnp.array([[3, 7]]), config), x_BTNH)


@pytest.mark.parametrize("remat", ["none", "full"])
def test_the_fast_path_equals_the_reference_in_value_and_gradient(remat):
    params = params_of(MIXED_CONFIG)

    @functools.partial(jax.jit, static_argnums=1)
    def value_and_grad(params, config):
        return jax.value_and_grad(
            lambda p: jnp.sum(jnp.sin(model.apply(p, TOKENS_BT, config).logits_BTV))
        )(params)

    fast, slow = (
        value_and_grad(params, dataclasses.replace(MIXED_CONFIG, remat=r, grouped_matmul=name))
        for r, name in ((remat, "blocked"), ("none", "reference"))
    )
    # Sums of some hundred float32 terms in another order.
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4), fast, slow)


def test_router_statistics_come_in_the_order_of_the_layers():
    output = apply(params_of(MIXED_CONFIG), TOKENS_BT, MIXED_CONFIG, return_routing=True)
    assert output.router.tokens_per_expert_E.shape == (2, 1, 4)
    np.testing.assert_array_equal(output.router.tokens_per_expert_E.sum(axis=-1), 8 * 16 * 2)
    chosen = output.router.routing.expert_index_MA
    assert chosen.shape == (2, 8, 16, 2)
    for layer in range(2):
        counts = np.bincount(np.asarray(chosen[layer]).ravel(), minlength=4)
        np.testing.assert_array_equal(output.router.tokens_per_expert_E[layer, 0], counts)
    assert apply(params_of(DENSE_CONFIG), TOKENS_BT, DENSE_CONFIG).router is None


def test_bfloat16_compute_keeps_parameters_and_logits_in_float32():
    config = dataclasses.replace(MIXED_CONFIG, dtype="bfloat16")
    exact = apply(params_of(MIXED_CONFIG), TOKENS_BT, MIXED_CONFIG).logits_BTV
    rounded = apply(params_of(MIXED_CONFIG), TOKENS_BT, config).logits_BTV
    assert rounded.dtype == jnp.float32
    # bfloat16 has 8 bits: some percent of the spread after three layers.
    assert 0 < jnp.abs(rounded - exact).max() < 0.1 * jnp.abs(exact).max()


@pytest.mark.parametrize("sizes", [(8, 1, 1, 1), (1, 8, 1, 1), (1, 2, 2, 2), (1, 2, 2, 1, 2)])
def test_logits_and_gradients_on_a_mesh_equal_one_device(sizes):
    params = params_of(MIXED_CONFIG)

    def value_and_grad(params, tokens_BT):
        def loss(params):
            output = model.apply(params, tokens_BT, MIXED_CONFIG)
            spread = output.router.probability_sum_E.sum(axis=1)
            return jnp.mean(jnp.sin(output.logits_BTV)) + 1e-3 * jnp.sum(spread**2), output

        return jax.value_and_grad(loss, has_aux=True)(params)

    (_, alone), grads_alone = jax.jit(value_and_grad)(params, TOKENS_BT)
    mesh = meshes.make(dict(zip(meshes.AXES, sizes, strict=False)))
    with jax.set_mesh(mesh):
        sharded = jax.device_put(params, sharding.shardings(params, mesh))
        tokens_BT = jax.device_put(TOKENS_BT, jax.NamedSharding(mesh, sharding.BATCH))
        (_, output), grads = jax.jit(value_and_grad)(sharded, tokens_BT)
    np.testing.assert_allclose(output.logits_BTV, alone.logits_BTV, atol=1e-5)
    shards = sharding.batch_shards(mesh.shape)
    counts = output.router.tokens_per_expert_E
    assert counts.shape == (2, shards, 4)
    np.testing.assert_array_equal(counts.sum(axis=1), alone.router.tokens_per_expert_E.sum(axis=1))
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6), grads, grads_alone
    )
