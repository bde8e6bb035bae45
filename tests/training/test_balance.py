"""The losses against formulas worked by hand."""

import dataclasses
import functools
import statistics

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe_jax import config as configs
from moe_jax.model import router
from moe_jax.model import routing as routing_data
from moe_jax.model.routing import RouterStats
from moe_jax.training import balance as rules

E, A = 4, 2


def stats_of(logits_LME):
    """Two batch shards per layer, as a step on two devices returns them."""

    def stats_of_shard(logits_ME):
        routing = router.softmax_topk(logits_ME, num_experts_per_tok=A, norm_topk_prob=True)
        return routing_data.statistics(routing, jnp.ones(logits_ME.shape[0], bool), jnp.array(0))

    L, M, E = logits_LME.shape
    return jax.vmap(jax.vmap(stats_of_shard))(logits_LME.reshape(L, 2, M // 2, E))


def balance(stats, scope, divide_by_k):
    return rules.load_balancing(
        rules.pooled(stats),
        num_experts_per_tok=A,
        scope=scope,
        divide_by_k=divide_by_k,
        form="switch",
    ).mean()


@pytest.mark.parametrize("scope", ["layer", "all_layers"])
def test_balance_loss_is_k_at_uniform_routing_and_1_divided_by_k(scope):
    # Every expert is chosen equally often, with near equal probabilities.
    logits_ME = 1e-4 * jnp.stack([jnp.roll(jnp.array([2.0, 1.0, 0, 0]), i) for i in range(4)])
    stats = stats_of(jnp.stack([logits_ME] * 3))
    np.testing.assert_allclose(balance(stats, scope, False), A, rtol=1e-3)
    np.testing.assert_allclose(balance(stats, scope, True), 1, rtol=1e-3)


def test_balance_loss_equals_the_double_sum_of_its_definition():
    logits_LME = jax.random.normal(jax.random.key(0), (3, 8, E))
    p_LME = np.asarray(jax.nn.softmax(logits_LME), np.float64)
    f_LE, P_LE = np.zeros((3, E)), p_LME.mean(axis=1)
    for layer in range(3):
        for token in range(8):
            for expert in np.argsort(-p_LME[layer, token])[:A]:
                f_LE[layer, expert] += 1 / 8
    stats = stats_of(logits_LME)
    by_layer = np.mean([E * sum(f_LE[i] * P_LE[i]) for i in range(3)])
    np.testing.assert_allclose(balance(stats, "layer", False), by_layer, rtol=1e-5)
    pooled = E * sum(f_LE.mean(axis=0) * P_LE.mean(axis=0))
    np.testing.assert_allclose(balance(stats, "all_layers", False), pooled, rtol=1e-5)


def test_all_layers_scope_does_not_see_layers_that_collapse_onto_different_experts():
    """The blind spot of the pooled loss: each layer uses two experts, both layers use all."""
    one = jnp.tile(jnp.array([9.0, 9.0, -9, -9]), (8, 1))
    stats = stats_of(jnp.stack([one, one[:, ::-1]]))
    np.testing.assert_allclose(balance(stats, "all_layers", True), 1, rtol=1e-3)
    np.testing.assert_allclose(balance(stats, "layer", True), E / A, rtol=1e-3)


def test_z_loss_is_the_mean_squared_logsumexp():
    logits_LME = jax.random.normal(jax.random.key(0), (3, 8, E))
    z = np.log(np.exp(np.asarray(logits_LME, np.float64)).sum(axis=-1)) ** 2
    np.testing.assert_allclose(rules.router_z(stats_of(logits_LME)).mean(), z.mean(), rtol=1e-5)


@pytest.mark.parametrize("name", [name for name, rule in rules.RULES.items() if rule.loss])
def test_each_loss_has_a_gradient_by_the_logits_of_every_layer_and_shard(name):
    """The gradient is that of differences, by the logits themselves: no second softmax."""
    logits_LME = jax.random.normal(jax.random.key(0), (2, 8, E))

    @jax.jit
    def loss(logits_LME):
        settings = configs.Balance(load_balancing_coefficient=0.0)
        settings = dataclasses.replace(settings, **{rules.RULES[name].coefficient: 1.0})
        how = {"num_experts_per_tok": A, "num_tokens": 8}
        return rules.router_losses(stats_of(logits_LME), settings, **how)[0]

    gradient_LME = jax.grad(loss)(logits_LME)
    assert (np.abs(gradient_LME) > 1e-6).any(axis=-1).all()
    direction_LME = jax.random.normal(jax.random.key(1), logits_LME.shape)
    up, down = (loss(logits_LME + step * direction_LME) for step in (1e-2, -1e-2))
    np.testing.assert_allclose(jnp.vdot(gradient_LME, direction_LME), (up - down) / 2e-2, rtol=2e-2)


BALANCE = configs.Balance(load_balancing_coefficient=0.5, router_z_coefficient=0.0)


def made_up(seed=0, L=3, S=2, E=E):
    """Sums of L layers and S batch shards with different numbers of tokens."""
    rng = np.random.default_rng(seed)
    tokens_S = np.arange(7, 7 + S)
    counts_LSE = rng.multinomial(A * tokens_S, np.full(E, 1 / E), size=(L, S))
    p_LSE = rng.dirichlet(np.ones(E), size=(L, S)) * tokens_S[:, None]
    weight_LSE, load_LSE = rng.uniform(1, 2, size=(2, L, S, E))
    z_LS, entropy_LS = rng.uniform(1, 2, size=(2, L, S))
    num_tokens_LS = np.tile(tokens_S, (L, 1))
    return RouterStats(
        counts_LSE, p_LSE, weight_LSE, load_LSE, z_LS, entropy_LS, num_tokens_LS, 0 * num_tokens_LS
    )


def of_probabilities(p_ME):
    """Sums of one layer, one shard, with these probabilities."""
    p_ME = np.asarray(p_ME, np.float32)
    entropy_M = -np.sum(p_ME * np.log(np.where(p_ME > 0, p_ME, 1)), axis=1)
    stats = made_up(L=1, S=1, E=p_ME.shape[1])
    return dataclasses.replace(
        stats,
        probability_sum_E=p_ME.sum(axis=0)[None, None],
        entropy_sum=entropy_M.sum()[None, None],
        num_tokens=np.array([[len(p_ME)]]),
    )


def test_mutual_information_is_0_for_equal_tokens_and_log_E_for_one_expert_each():
    equal = of_probabilities([[0.5, 0.3, 0.2, 0]] * 8)
    np.testing.assert_allclose(rules.mutual_information(equal), 0, atol=1e-6)
    one_each = of_probabilities(np.eye(E)[np.arange(8) % E])
    np.testing.assert_allclose(rules.mutual_information(one_each), np.log(E), rtol=1e-6)


def test_mutual_information_is_that_of_the_joint_distribution_of_token_and_expert():
    p_ME = np.random.default_rng(0).dirichlet(np.ones(E), size=8)
    joint = p_ME / 8
    by_hand = np.sum(joint * np.log(joint / (joint.sum(axis=0) / 8)))
    np.testing.assert_allclose(rules.mutual_information(of_probabilities(p_ME)), by_hand, rtol=1e-5)


def test_squared_form_is_0_at_uniform_probabilities_and_by_hand_elsewhere():
    def squared(p_ME):
        settings = {"num_experts_per_tok": A, "scope": "layer", "divide_by_k": True}
        stats = rules.pooled(of_probabilities(p_ME))
        return rules.load_balancing(stats, form="squared", **settings).mean()

    np.testing.assert_allclose(squared(np.full((8, E), 1 / E)), 0, atol=1e-12)
    by_hand = 0.25**2 + 0.05**2 + 0.05**2 + 0.25**2
    np.testing.assert_allclose(squared([[0.5, 0.3, 0.2, 0]] * 8), by_hand, rtol=1e-5)


def test_importance_loss_is_the_squared_coefficients_of_variation():
    stats = made_up(S=1)
    by_hand = [
        statistics.variance(x[0]) / statistics.mean(x[0]) ** 2
        + statistics.variance(y[0]) / statistics.mean(y[0]) ** 2
        for x, y in zip(stats.weight_sum_E.tolist(), stats.load_sum_E.tolist(), strict=True)
    ]
    np.testing.assert_allclose(rules.importance(stats)[:, 0], by_hand, rtol=1e-5)
    even = dataclasses.replace(
        stats, weight_sum_E=np.full((3, 1, E), 2.0), load_sum_E=np.full((3, 1, E), 4.0)
    )
    np.testing.assert_array_equal(rules.importance(even), 0)
    np.testing.assert_array_equal(rules.importance(made_up(E=1)), 0)


def test_orthogonality_is_0_for_orthonormal_columns_and_by_hand_elsewhere():
    rng = np.random.default_rng(0)
    orthonormal_DE = np.linalg.qr(rng.normal(size=(8, E)))[0]
    skewed_DE = np.array([[1.0, 0.5, 0, 0], [0, 2.0, 0, 0]])
    # The products of columns are 1, 0.5 (twice) and 4.25, against 1, 0 and 1, and 0 against 1.
    penalties = (
        rules.orthogonality(jnp.float32(orthonormal_DE)[None]),
        rules.orthogonality(jnp.float32(skewed_DE)[None]),
    )
    np.testing.assert_allclose(penalties[0], 0, atol=1e-5)
    np.testing.assert_allclose(penalties[1], 0 + 2 * 0.5 + 3.25 + 1 + 1)


@pytest.mark.parametrize(("over_layers", "layers"), [("mean", 1), ("sum", 3)])
def test_penalties_of_microbatches_add_up_to_those_of_all_layers(over_layers, layers):
    kernels = {"0": np.zeros((2, 8, E)), "1": np.zeros((1, 8, E)), "2": 9 * np.ones((1, 8, E))}
    params = {"blocks": {slot: {"moe": {"router": {"kernel": x}}} for slot, x in kernels.items()}}
    params["blocks"]["2"] = {"mlp": params["blocks"]["2"]["moe"]}  # no router
    settings = configs.Balance(orthogonality_coefficient=0.5, over_layers=over_layers)
    total, terms = rules.penalties(params, settings, accumulation_steps=4)
    np.testing.assert_allclose(4 * terms["router_orthogonality"], E)
    np.testing.assert_allclose(4 * total, 0.5 * layers * E)
    assert rules.penalties(params, configs.Balance()) == (0, {})


@functools.partial(jax.jit, static_argnames=("names", "values"))
def router_losses(stats, num_tokens, coefficients_L=None, names=(), values=()):
    settings = dataclasses.replace(BALANCE, **dict(zip(names, values, strict=True)))
    return rules.router_losses(
        stats,
        settings,
        num_experts_per_tok=A,
        num_tokens=num_tokens,
        coefficients_L=coefficients_L,
    )


def test_the_total_is_the_sum_of_the_parts_times_their_coefficients():
    stats, coefficients_L = made_up(), np.array([0.1, 0.2, 0.7])
    names = ("router_z_coefficient", "importance_coefficient", "mutual_information_coefficient")
    total, parts = router_losses(stats, 15, None, names, (3.0, 5.0, 7.0))
    others = (
        3 * parts["router_z_loss"] + 5 * parts["importance_loss"] - 7 * parts["mutual_information"]
    )
    np.testing.assert_allclose(total, 0.5 * parts["load_balancing_loss"] + others, rtol=1e-5)
    np.testing.assert_allclose(
        parts["router_z_loss"], stats.z_sum.sum(axis=1).mean() / 15, rtol=1e-6
    )
    f_LE, P_LE = (x.sum(axis=1) / 15 for x in (stats.tokens_per_expert_E, stats.probability_sum_E))
    loss_L = E / A * np.sum(f_LE * P_LE, axis=1)
    total, _ = router_losses(stats, 15, coefficients_L, names, (3.0, 5.0, 7.0))
    np.testing.assert_allclose(total, np.mean(coefficients_L * loss_L) + others, rtol=1e-5)


def test_over_the_device_is_the_mean_of_each_shards_own_loss_where_it_has_tokens():
    stats = made_up(S=3)
    shard = [jax.tree.map(lambda x, i=i: x[:, i : i + 1], stats) for i in range(3)]
    empty = jax.tree.map(lambda x: np.concatenate([x, 0 * x[:, :1]], axis=1), stats)
    names = ("load_balancing_over", "importance_coefficient", "mutual_information_coefficient")
    _, parts = router_losses(empty, 24, None, names, ("device", 1.0, 1.0))
    alone = [router_losses(s, s.num_tokens[0, 0], None, names, ("global", 1, 1))[1] for s in shard]
    for name in ("load_balancing_loss", "importance_loss", "mutual_information"):
        by_hand = np.mean([one[name] for one in alone])
        np.testing.assert_allclose(parts[name], by_hand, rtol=1e-5)
    # A mean over tokens is one over all of them, whatever the shards.
    np.testing.assert_allclose(
        parts["router_z_loss"], stats.z_sum.sum(axis=1).mean() / 24, rtol=1e-6
    )
