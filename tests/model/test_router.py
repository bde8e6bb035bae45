"""The routing decision on arrays written by hand."""

import jax
import jax.numpy as jnp
import numpy as np

from moe_jax.model import router


def test_softmax_then_top_k_with_and_without_renormalisation():
    logits_ME = jnp.log(jnp.array([[0.1, 0.2, 0.4, 0.3]]))
    plain = router.route(logits_ME, num_experts_per_tok=2, norm_topk_prob=False)
    np.testing.assert_array_equal(plain.expert_index_MA, [[2, 3]])
    np.testing.assert_allclose(plain.weight_MA, [[0.4, 0.3]], rtol=1e-6)
    renormalised = router.route(logits_ME, num_experts_per_tok=2, norm_topk_prob=True)
    np.testing.assert_allclose(renormalised.weight_MA, [[4 / 7, 3 / 7]], rtol=1e-6)


def test_renormalised_weights_are_the_softmax_over_the_chosen_logits():
    logits_ME = jax.random.normal(jax.random.key(0), (32, 8))
    routing = router.route(logits_ME, num_experts_per_tok=3, norm_topk_prob=True)
    chosen_MA = jnp.take_along_axis(logits_ME, routing.expert_index_MA, axis=1)
    np.testing.assert_allclose(routing.weight_MA, jax.nn.softmax(chosen_MA), rtol=1e-5)


def test_ties_go_to_the_lowest_index():
    routing = router.route(jnp.zeros((3, 5)), num_experts_per_tok=2, norm_topk_prob=True)
    np.testing.assert_array_equal(routing.expert_index_MA, [[0, 1]] * 3)


def test_statistics_count_assignments_of_valid_tokens_only():
    logits_ME = jnp.array([[5.0, 1.0, 0.0], [0.0, 5.0, 1.0], [9.0, 0.0, 8.0]])
    routing = router.route(logits_ME, num_experts_per_tok=2, norm_topk_prob=True)
    stats = router.statistics(routing, jnp.array([True, True, False]), jnp.array(0))
    np.testing.assert_array_equal(stats.tokens_per_expert_E, [1, 2, 1])
    assert stats.num_tokens == 2
    np.testing.assert_allclose(
        stats.probability_sum_E, routing.probabilities_ME[:2].sum(axis=0), rtol=1e-6
    )
    z = np.log(np.exp(np.asarray(logits_ME[:2], np.float64)).sum(axis=1)) ** 2
    np.testing.assert_allclose(stats.z_sum, z.sum(), rtol=1e-5)
