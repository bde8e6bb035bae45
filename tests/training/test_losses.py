"""The losses against formulas worked by hand."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe_jax.model import router
from moe_jax.training import losses

E, A = 4, 2


def stats_of(logits_LME):
    """Two batch shards per layer, as a step on two devices returns them."""

    def stats_of_shard(logits_ME):
        routing = router.softmax_topk(logits_ME, num_experts_per_tok=A, norm_topk_prob=True)
        return router.statistics(routing, jnp.ones(logits_ME.shape[0], bool), jnp.array(0))

    L, M, E = logits_LME.shape
    return jax.vmap(jax.vmap(stats_of_shard))(logits_LME.reshape(L, 2, M // 2, E))


def balance(stats, scope, divide_by_k):
    return losses.load_balancing_loss(
        stats, num_experts_per_tok=A, scope=scope, divide_by_k=divide_by_k
    )


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
    np.testing.assert_allclose(losses.router_z(stats_of(logits_LME)).mean(), z.mean(), rtol=1e-5)
