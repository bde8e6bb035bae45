"""Capacity dispatch against dropless and against its shards; forced balance; drop rates."""

import dataclasses
import fractions
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe_jax import model
from moe_jax.model import moe, router, transformer
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
            y_BTD, stats = moe.moe(x_BTD, params, valid_BT, config, key=key, training=True)
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
    C = capacity(int(VALID_BT.sum()) * A, E, 0.25, 1)
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


def test_rows_of_padding_change_neither_capacity_nor_drops():
    config = dataclasses.replace(CAPACITY, capacity_factor=0.75)
    y_BTD, stats, _ = layer(config)
    assert stats.num_dropped[0] > 0
    more_BTD, more_BT = jnp.concatenate([X_BTD, X_BTD]), jnp.concatenate([VALID_BT, 0 * VALID_BT])
    padded_BTD, padded, _ = layer(config, more_BTD, more_BT > 0)
    assert padded.num_dropped[0] == stats.num_dropped[0]
    np.testing.assert_allclose(padded_BTD[:B], y_BTD, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("fields", [{"token_priority": "random"}, {"router": "expert_choice"}])
def test_in_evaluation_each_row_has_its_own_capacity_on_any_mesh(fields):
    """A row gives what it gives alone."""
    config = dataclasses.replace(CAPACITY, capacity_factor=0.5, **fields)

    def forward():
        return jax.jit(lambda x, v: moe.moe(x, PARAMS, v, config, key=jax.random.key(3)))

    one = forward()
    alone = [one(X_BTD[b : b + 1], VALID_BT[b : b + 1]) for b in range(B)]
    with jax.set_mesh(meshes.make({"data": 1, "fsdp": 2, "expert": 2, "tensor": 2})):
        on_mesh = forward()(X_BTD, VALID_BT)
    for y_BTD, stats in (one(X_BTD, VALID_BT), on_mesh):
        dropped = sum(int(stats.num_dropped[0]) for _, stats in alone)
        assert stats.num_dropped.sum() == dropped
        for b in range(B):
            np.testing.assert_allclose(y_BTD[b], alone[b][0][0], rtol=1e-5, atol=1e-6)


def test_evaluation_drops_random_tokens_of_each_layer_always_the_same():
    config = dataclasses.replace(CAPACITY, capacity_factor=0.25, token_priority="random")
    attention = model.init(DROPLESS, jax.random.key(0))["blocks"]["0"]["attention"]
    attention = jax.tree.map(lambda w: 0 * w[0], attention)
    positions_BT = jnp.tile(jnp.arange(T), (B, 1))

    @jax.jit
    def untouched(index):
        block = {"attention": attention, "moe": PARAMS}
        shared = transformer.Shared(positions_BT, jnp.ones((B, T), jnp.int32))
        kind = config.block_kinds[0]
        y_BTD, _ = transformer.block(
            X_BTD, block, {"index": index}, shared, config=config, kind=kind
        )
        return (y_BTD == X_BTD).all(axis=-1)

    first_BT, second_BT = np.asarray(untouched(0)), np.asarray(untouched(1))
    np.testing.assert_array_equal(first_BT, untouched(0))
    assert (first_BT != second_BT).any()
    # The later half does not lose more than its share: 5 standard deviations of a coin.
    later, number = first_BT[:, T // 2 :].sum(), first_BT.sum()
    assert abs(later - number / 2) < 5 * np.sqrt(number) / 2


@pytest.mark.parametrize("factor", [1.0, 1.1, 1.15, 1.25, 0.7, 2.0, 1 / 3, 1.005, 4.999])
def test_capacity_is_the_exact_share_rounded_up(factor):
    exact = fractions.Fraction(str(factor)).limit_denominator(1000)
    for E in (1, 3, 8, 256, 512):
        n_X = np.array([1, 10, 30, 100, 999, 8192, 999_999, 2**20, 2**25])
        want = [max(1, math.ceil(exact * int(n) / E)) for n in n_X]
        assert [capacity(int(n), E, factor, 1) for n in n_X] == want
        np.testing.assert_array_equal(jax.jit(lambda n, E=E: capacity(n, E, factor, 1))(n_X), want)
    assert capacity(10, 1, 1.1, 4) == 11  # in floats 10 x 1.1 is a little more


TOP_1 = [
    {"router": name, **({"norm_topk_prob": norm} if "norm_topk_prob" in row.reads else {})}
    for name, row in router.ROUTERS.items()
    if row.learned and row.causal
    for norm in ((True, False) if "norm_topk_prob" in row.reads else (True,))
]


@pytest.mark.parametrize("fields", TOP_1, ids=str)
def test_a_top_1_router_has_a_gradient_unless_its_weights_sum_to_one(fields):
    """A run with one that has none is refused: `config.run`."""
    config = dataclasses.replace(DROPLESS, num_experts_per_tok=1, **fields)
    params = jax.tree.map(lambda w: 8 * w[0], model.init(config, jax.random.key(0))["blocks"]["0"])

    def loss(params):
        return jnp.sum(jnp.sin(moe.moe(X_BTD, params, VALID_BT, config)[0]))

    gradients = jax.jit(jax.grad(loss))(params["moe"])
    largest = np.abs(gradients["router"]["kernel"]).max()
    assert largest < 1e-3 if config.weight_is_constant else largest > 1  # p / p is rounded


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
