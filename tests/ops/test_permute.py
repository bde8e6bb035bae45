"""Capacity slots against a greedy loop; the gradients of dispatch and combine with empty slots."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe_jax.ops import permute

M, A, E, D = 24, 2, 4, 3


def choices(seed=0):
    """Two different experts a token, the first ones crowded on expert 0."""
    rng = np.random.default_rng(seed)
    first_M = rng.choice(E, size=M, p=[0.6, 0.2, 0.1, 0.1])
    second_M = (first_M + rng.integers(1, E, size=M)) % E
    return np.stack([first_M, second_M], axis=1)


def greedy(expert_MA, valid_M, capacity):
    """Keeps assignments and gives them slots one by one, first choices first."""
    slot_MA, used_E = np.full((M, A), E * capacity), [0] * E
    for a in range(A):
        for m in range(M):
            e = expert_MA[m, a]
            if valid_M[m] and used_E[e] < capacity:
                slot_MA[m, a] = e * capacity + used_E[e]
                used_E[e] += 1
    return slot_MA, used_E


@pytest.mark.parametrize("capacity", [1, 5, 9, M * A])
def test_slots_are_filled_as_by_a_greedy_loop(capacity):
    expert_MA, valid_M = choices(), np.arange(M) % 5 > 0
    limit_G = jnp.array([capacity])
    plan = permute.fill_slots(jnp.array(expert_MA), jnp.array(valid_M), E, capacity, limit_G)
    slot_MA, used_E = greedy(expert_MA, valid_M, capacity)
    np.testing.assert_array_equal(plan.row_MA, slot_MA)
    np.testing.assert_array_equal(plan.group_sizes_E, used_E)
    assignment_R = np.full(E * capacity, M * A)
    for number, slot in enumerate(slot_MA.ravel()):
        if slot < E * capacity:
            assignment_R[slot] = number
    np.testing.assert_array_equal(plan.assignment_R, assignment_R)


@pytest.mark.parametrize("key", [None, jax.random.key(0)], ids=["position", "random"])
def test_groups_fill_slots_of_their_own_up_to_their_limit_as_if_each_were_alone(key):
    expert_MA, valid_M, C = choices(), np.arange(M) % 5 > 0, 5
    limit_G = jnp.array([5, 2, 4])
    plan = permute.fill_slots(jnp.array(expert_MA), jnp.array(valid_M), E, C, limit_G, key)
    kept_E = np.zeros(E, int)
    for g, limit in enumerate(limit_G):
        own = slice(g * M // 3, (g + 1) * M // 3)
        alone = permute.fill_slots(expert_MA[own], jnp.array(valid_M[own]), E, C, limit[None], key)
        row_MA = np.asarray(alone.row_MA)
        there_MA = (row_MA // C * 3 + g) * C + row_MA % C
        np.testing.assert_array_equal(
            plan.row_MA[own], np.where(row_MA < E * C, there_MA, 3 * E * C)
        )
        kept_E += np.asarray(alone.group_sizes_E)
    np.testing.assert_array_equal(plan.group_sizes_E, kept_E)


def test_random_selection_keeps_as_many_but_not_always_the_earliest():
    expert_MA, valid_M = jnp.array(choices()), jnp.ones(M, bool)
    four_G = jnp.array([4])
    by_position = permute.fill_slots(expert_MA, valid_M, E, 4, four_G)
    kept = []
    for seed in range(40):
        plan = permute.fill_slots(expert_MA, valid_M, E, 4, four_G, jax.random.key(seed))
        np.testing.assert_array_equal(plan.group_sizes_E, by_position.group_sizes_E)
        row_MA = np.asarray(plan.row_MA)
        np.testing.assert_array_equal(
            np.where(row_MA < 16, row_MA // 4, expert_MA), expert_MA, "a slot of another expert"
        )
        kept.append(row_MA[:, 0] < 16)
    crowd = np.asarray(expert_MA)[:, 0] == 0  # the first choices of a full expert
    share_M = np.mean(kept, axis=0)[crowd]
    expected = 4 / crowd.sum()
    # 40 draws of a coin: five standard deviations.
    assert (abs(share_M - expected) < 5 * np.sqrt(expected * (1 - expected) / 40)).all()


def test_gradients_with_empty_slots_and_dropped_tokens_are_those_of_plain_indexing():
    plan = permute.fill_slots(jnp.array(choices()), jnp.ones(M, bool), E, 5, jnp.array([5]))
    x_MD = jax.random.normal(jax.random.key(0), (M, D))
    weight_MA = jax.random.uniform(jax.random.key(1), (M, A))
    kept_R = (plan.assignment_R < M * A)[:, None]
    token_R = jnp.where(kept_R[:, 0], plan.assignment_R // A, 0)
    number_R = jnp.where(kept_R[:, 0], plan.assignment_R, 0)

    def ours(x_MD, weight_MA):
        rows_RD = permute.dispatch(x_MD, plan) * permute.dispatch_weight(weight_MA, plan)[:, None]
        return jnp.sum(jnp.cos(permute.combine(jnp.sin(rows_RD), plan)))

    def plain(x_MD, weight_MA):
        rows_RD = x_MD[token_R] * weight_MA.ravel()[number_R][:, None] * kept_R
        return jnp.sum(jnp.cos(jnp.zeros_like(x_MD).at[token_R].add(jnp.sin(rows_RD))))

    fast, slow = (jax.value_and_grad(f, argnums=(0, 1))(x_MD, weight_MA) for f in (ours, plain))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), fast, slow)


def test_more_assignments_than_can_be_numbered_are_refused():
    index_MA = jax.ShapeDtypeStruct((2**20, 8), jnp.int32)
    with pytest.raises(ValueError, match="use more microbatches"):
        jax.eval_shape(lambda index: permute.sort_by_expert(index, 256), index_MA)
    jax.eval_shape(lambda index: permute.sort_by_expert(index, 255), index_MA)
