"""The routing decision on arrays written by hand."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe_jax import model
from moe_jax.model import router
from moe_jax.model.routing import Groups, statistics


def test_softmax_then_top_k_with_and_without_renormalisation():
    logits_ME = jnp.log(jnp.array([[0.1, 0.2, 0.4, 0.3]]))
    plain = router.softmax_topk(logits_ME, num_experts_per_tok=2, norm_topk_prob=False)
    np.testing.assert_array_equal(plain.expert_index_MA, [[2, 3]])
    np.testing.assert_allclose(plain.weight_MA, [[0.4, 0.3]], rtol=1e-6)
    renormalised = router.softmax_topk(logits_ME, num_experts_per_tok=2, norm_topk_prob=True)
    np.testing.assert_allclose(renormalised.weight_MA, [[4 / 7, 3 / 7]], rtol=1e-6)


def test_renormalised_weights_are_the_softmax_over_the_chosen_logits():
    logits_ME = jax.random.normal(jax.random.key(0), (32, 8))
    routing = router.softmax_topk(logits_ME, num_experts_per_tok=3, norm_topk_prob=True)
    chosen_MA = jnp.take_along_axis(logits_ME, routing.expert_index_MA, axis=1)
    np.testing.assert_allclose(routing.weight_MA, jax.nn.softmax(chosen_MA), rtol=1e-5)


def test_ties_go_to_the_lowest_index():
    routing = router.softmax_topk(jnp.zeros((3, 5)), num_experts_per_tok=2, norm_topk_prob=True)
    np.testing.assert_array_equal(routing.expert_index_MA, [[0, 1]] * 3)


def test_statistics_count_assignments_of_valid_tokens_only():
    logits_ME = jnp.array([[5.0, 1.0, 0.0], [0.0, 5.0, 1.0], [9.0, 0.0, 8.0]])
    routing = router.softmax_topk(logits_ME, num_experts_per_tok=2, norm_topk_prob=True)
    stats = statistics(routing, jnp.array([True, True, False]), jnp.array(0))
    np.testing.assert_array_equal(stats.tokens_per_expert_E, [1, 2, 1])
    assert stats.num_tokens == 2
    np.testing.assert_allclose(
        stats.probability_sum_E, routing.probabilities_ME[:2].sum(axis=0), rtol=1e-6
    )
    z = np.log(np.exp(np.asarray(logits_ME[:2], np.float64)).sum(axis=1)) ** 2
    np.testing.assert_allclose(stats.z_sum, z.sum(), rtol=1e-5)


def config_of(**fields):
    sizes = dict.fromkeys(
        "vocab_size hidden_size intermediate_size num_hidden_layers num_attention_heads".split(), 1
    )
    return model.ModelConfig(**sizes, head_dim=2, **fields)


def test_top_k_then_softmax_is_the_renormalised_softmax():
    logits_ME = jax.random.normal(jax.random.key(0), (32, 8))
    one = router.topk_softmax(logits_ME, num_experts_per_tok=3)
    other = router.softmax_topk(logits_ME, num_experts_per_tok=3, norm_topk_prob=True)
    np.testing.assert_array_equal(one.expert_index_MA, other.expert_index_MA)
    np.testing.assert_allclose(one.weight_MA, other.weight_MA, rtol=1e-5)


def test_switch_is_top_1_weighted_by_its_probability():
    logits_ME = jax.random.normal(jax.random.key(0), (32, 8))
    config = config_of(num_experts=8, num_experts_per_tok=1, norm_topk_prob=False)
    row = router.ROUTERS[config.router]
    routing = row.route(logits_ME, router.Inputs(None, None, {}), **row.values(config))
    best_M1 = jax.nn.softmax(logits_ME).max(axis=1, keepdims=True)
    np.testing.assert_allclose(routing.weight_MA, best_M1, rtol=1e-6)


def test_gate_normalisation_by_hand():
    """Wei et al., arXiv 2406.06563: softmax(lambda (z - mean z) / std z)."""
    logits = np.array([[1.0, 2.0, 4.0, 9.0], [-3.0, 0.0, 0.5, 0.25]])
    for scale in (0.5, 1.0, 2.0):
        routing = router.softmax_topk(
            jnp.array(logits), num_experts_per_tok=2, norm_topk_prob=True, gate_norm_std=scale
        )
        deviation = logits.std(axis=1, ddof=1, keepdims=True)
        z = np.exp(scale * (logits - logits.mean(axis=1, keepdims=True)) / deviation)
        want = z / z.sum(axis=1, keepdims=True)
        np.testing.assert_allclose(routing.probabilities_ME, want, rtol=1e-5)


def test_the_bias_of_sigmoid_scores_decides_who_is_chosen_but_not_with_what_weight():
    logits_ME = jnp.array([[0.0, 1.0, 2.0, 3.0]])
    routing = router.sigmoid_topk(
        logits_ME,
        jnp.array([1.0, 0, 0, 0]),
        num_experts_per_tok=2,
        norm_topk_prob=False,
        routed_scaling_factor=2.5,
    )
    np.testing.assert_array_equal(routing.expert_index_MA, [[0, 3]])
    scores = 1 / (1 + np.exp([0.0, -3.0]))
    np.testing.assert_allclose(routing.weight_MA[0], 2.5 * scores, rtol=1e-6)


def test_noise_is_of_its_own_deviation_and_absent_without_a_key():
    M, E = 4096, 4
    logits_ME, noise_ME = jnp.zeros((M, E)), jnp.log(jnp.expm1(jnp.full((M, E), 0.49)))
    noisy = router.noisy_topk(logits_ME, noise_ME, jax.random.key(0), num_experts_per_tok=2)
    deviation = 0.5  # softplus(noise) + 0.01; the bound is 5 standard errors
    assert abs(noisy.logits_ME.std() - deviation) < 5 * deviation / np.sqrt(2 * M * E)
    clean = router.noisy_topk(logits_ME, noise_ME, None, num_experts_per_tok=2)
    np.testing.assert_array_equal(clean.logits_ME, logits_ME)
    assert clean.load_ME is None


def test_the_gate_of_two_layers_is_linear_tanh_linear():
    row = router.ROUTERS["noisy_topk_mlp"]
    shapes = {name: leaf.shape(16, 4) for name, leaf in row.leaves.items()}
    assert shapes == {"kernel": (16, 4), "noise": (16, 4), "output": (4, 4)}
    draw = np.random.default_rng(0).normal
    leaves = {name: draw(size=shape).astype(np.float32) for name, shape in shapes.items()}
    x_MD = draw(size=(8, 16)).astype(np.float32)
    inputs = router.Inputs(x_MD, Groups(np.ones(8, bool)), leaves, key=None)
    routing = row.route(x_MD @ leaves["kernel"], inputs, num_experts_per_tok=2)
    want_ME = np.tanh(x_MD @ leaves["kernel"]) @ leaves["output"]
    np.testing.assert_allclose(routing.logits_ME, want_ME, rtol=1e-5, atol=1e-5)
    np.testing.assert_array_equal(routing.expert_index_MA, np.argsort(-want_ME)[:, :2])
    np.testing.assert_allclose(np.sum(routing.weight_MA, axis=1), 1, rtol=1e-6)


def test_the_load_of_noisy_routing_is_the_chance_to_be_chosen():
    """Against counting over fresh noise of the one expert, the noise of the others kept."""
    E, A, draws = 5, 2, 20_000
    clean_E = jnp.array([0.3, -0.2, 0.1, 0.0, 0.5])
    noise_E = jnp.array([0.2, -1.0, 0.0, 0.5, -0.5])
    routing = router.noisy_topk(
        clean_E[None], noise_E[None], jax.random.key(1), num_experts_per_tok=A
    )
    deviation_E = np.log1p(np.exp(noise_E)) + 0.01
    for e in range(E):
        others = np.delete(np.asarray(routing.logits_ME[0]), e)
        fresh = clean_E[e] + deviation_E[e] * jax.random.normal(jax.random.key(e), (draws,))
        share = float((fresh > np.sort(others)[-A]).mean())
        p = float(routing.load_ME[0, e])
        assert abs(share - p) < 5 * np.sqrt(p * (1 - p) / draws) + 1e-4


def test_experts_choose_their_best_valid_tokens():
    probabilities_ME = jnp.array([[0.9, 0.1], [0.8, 0.2], [0.3, 0.7], [0.4, 0.6], [0.99, 0.01]])
    valid_M = jnp.array([True, True, True, True, False])
    routing = router.expert_choice(
        jnp.log(probabilities_ME), valid_M, 2, tokens_per_expert=3, norm_topk_prob=False
    )
    none = 2
    want = [[0, none], [0, none], [none, 1], [none, 1], [none, none]]
    np.testing.assert_array_equal(routing.expert_index_MA, want)
    want = [[0.9, 0], [0.8, 0], [0, 0.7], [0, 0.6], [0, 0]]
    np.testing.assert_allclose(routing.weight_MA, want, rtol=1e-6)
    stats = statistics(routing, valid_M, jnp.array(0))
    np.testing.assert_array_equal(stats.tokens_per_expert_E, [2, 2])


def test_one_expert_of_each_group_then_the_best_groups():
    """Groups are e mod 3: {0, 3}, {1, 4}, {2, 5}; their best are 3, 1 and 2."""
    probabilities_ME = jnp.array([[0.05, 0.20, 0.25, 0.30, 0.15, 0.05]])
    routing = router.group_topk(
        jnp.log(probabilities_ME), num_experts_per_tok=2, norm_topk_prob=False, num_expert_groups=3
    )
    np.testing.assert_array_equal(routing.expert_index_MA, [[3, 2]])
    np.testing.assert_allclose(routing.weight_MA, [[0.30, 0.25]], rtol=1e-6)


def test_statistics_sum_weights_and_entropies():
    logits_ME = jax.random.normal(jax.random.key(0), (6, 4))
    valid_M = jnp.array([True] * 5 + [False])
    routing = router.softmax_topk(logits_ME, num_experts_per_tok=2, norm_topk_prob=True)
    stats = statistics(routing, valid_M, jnp.array(0))
    p_ME = np.asarray(routing.probabilities_ME[:5], np.float64)
    np.testing.assert_allclose(stats.entropy_sum, -(p_ME * np.log(p_ME)).sum(), rtol=1e-5)
    weight_E = np.zeros(4)
    np.add.at(weight_E, np.asarray(routing.expert_index_MA[:5]), routing.weight_MA[:5])
    np.testing.assert_allclose(stats.weight_sum_E, weight_E, rtol=1e-5)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"router": "expert_choice"}, "set dispatch='capacity'"),
        ({"router": "group_topk", "num_expert_groups": 3}, "not divisible by num_expert_groups=3"),
        ({"router": "group_topk"}, "more than num_expert_groups=1"),
        ({"num_expert_groups": 2}, "has no effect .*: sigmoid_topk, group_topk"),
        ({"router": "sigmoid_topk", "num_expert_groups": 4, "num_groups_per_tok": 1}, "among the"),
        ({"router": "topk_softmax", "gate_norm_std": 1.0}, "gate_norm_std=1.0 has no effect"),
        ({"router": "topk_softmax", "norm_topk_prob": False}, "norm_topk_prob=False has no effect"),
        ({"routed_scaling_factor": 2.0}, "reads it: sigmoid_topk"),
        ({"router_parameters": {"heat": 1.0}}, "'heat', but router='softmax_topk' takes none"),
        ({"router": "topk_softmax", "dispatch": "merge"}, "dispatch='merge' weighs"),
    ],
)
def test_routers_that_cannot_be_are_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        config_of(num_experts=8, **{"num_experts_per_tok": 4, **fields})


def test_a_routers_leaf_begins_as_its_row_says_and_no_other_parameter_of_its_name(monkeypatch):
    leaves = {"kernel": router.KERNEL, "gate": router.Leaf(lambda D, E: (E,))}
    toy = router.Router(lambda logits, inputs, **values: None, leaves=leaves)
    monkeypatch.setitem(router.ROUTERS, "toy", toy)
    config = config_of(num_experts=4, router="toy")
    moe = model.init(config, jax.random.key(0))["blocks"]["0"]["moe"]
    assert moe["router"]["gate"].shape == (1, 4) and not moe["router"]["gate"].any()
    assert moe["experts"]["gate"].all() and moe["router"]["kernel"].all()
