"""The standing committee against cases worked by hand and planted loads."""

import itertools

import numpy as np
import pytest

from moe_jax.analysis import committee, routing

G = 3  # labels


def test_gini_by_hand():
    """0 for even shares, 1 - 1/E for one expert; (1, 3)/4: |1/4 - 3/4| / (2 · 2 · 1/2) · ..."""
    count_XE = np.array([[2, 2, 2, 2], [0, 8, 0, 0], [5, 1, 0, 2]])
    looped = [sum(abs(a - b) for a in row for b in row) / (2 * 4 * row.sum()) for row in count_XE]
    np.testing.assert_allclose(committee.gini(count_XE), looped)
    np.testing.assert_allclose(committee.gini(count_XE)[:2], [0, 0.75])


def test_jaccard_by_hand():
    top_GE = np.array([[1, 1, 0, 0], [1, 0, 1, 0], [1, 1, 0, 0]], bool)
    assert committee.mean_jaccard(top_GE) == pytest.approx((1 / 3 + 1 + 1 / 3) / 3)


def units(own_load, seed=0, num_units=60):
    """Documents whose tokens go to experts 0 and 1, and partly to three of the label's own."""
    rng = np.random.default_rng(seed)
    label_U = np.arange(num_units) % G
    load_UE = np.full((num_units, 16), 0.02)
    load_UE[:, :2] = 1
    for own in range(2, 5):
        load_UE[np.arange(num_units), own + 3 * label_U] = own_load
    load_UE /= load_UE.sum(axis=1, keepdims=True)
    return rng.multinomial(np.full(num_units, 50), load_UE), label_U


def test_a_committee_that_stands_in_all_labels_is_found():
    found = committee.committee(*units(0.5), num_labels=G, size=2, draws=199)
    assert set(found.members) == {0, 1}
    assert found.jaccard == found.shuffled == 1
    assert found.p_shared < 0.02  # random groups of 2 of 16 hardly overlap
    assert found.p_labels == 1  # the groups do not depend on the label
    assert found.p_divergence < 0.01  # but the rest of the load does
    assert found.share == pytest.approx(2 / (2 + 3 * 0.5 + 11 * 0.02), abs=0.05)
    assert found.n == 60


def test_labels_with_experts_of_their_own_have_no_committee():
    found = committee.committee(*units(3.0), num_labels=G, size=3, draws=199)
    assert found.members == () and found.share == found.jaccard == 0
    assert found.p_shared > 0.1  # random groups of 3 of 16 may well share none
    assert found.jaccard < found.shuffled and found.p_divergence < 0.01


def test_the_null_of_labels_by_hand():
    """Two documents use expert 0 and two expert 1. Of the six ways to give two of them a label, two
    keep the experts apart; in four, both labels have an even load and the same busiest expert."""
    count_UE, label_U = np.array([[5, 0], [5, 0], [0, 5], [0, 5]]), np.array([0, 0, 1, 1])
    found = committee.committee(count_UE, label_U, num_labels=2, size=1, draws=500)
    assert (found.jaccard, found.divergence, found.gini) == (0, 1, 0.5)
    assert found.shuffled == pytest.approx(4 / 6, abs=0.06)
    assert found.p_labels == found.p_divergence == pytest.approx(2 / 6, abs=0.06)
    assert found.chance == pytest.approx(1 / 2, abs=0.06)


def test_labels_without_experts_of_their_own_are_not_told_apart():
    found = committee.committee(*units(0.02), num_labels=G, size=2, draws=199)
    assert set(found.members) == {0, 1} and found.jaccard == 1
    assert found.p_labels == 1 and found.p_divergence > 0.05
    count_UE, label_U = units(0.02)
    count_GE = np.stack([count_UE[label_U == g].sum(axis=0) for g in range(G)])
    looped = [routing.js_divergence(a, b) for a, b in itertools.combinations(count_GE, 2)]
    assert found.divergence == pytest.approx(np.mean(looped))


def test_the_jaccard_of_random_groups_has_its_expected_value():
    """|S ∩ T| is hypergeometric for random S, T of 2 of 4: 1/6 share none, 4/6 one, 1/6 both."""
    rng = np.random.default_rng(5)
    count_UE = rng.permuted(np.tile([9, 8, 1, 1], (4, 1)), axis=1)
    found = committee.committee(count_UE, np.arange(4), num_labels=4, size=2, draws=500)
    assert found.chance == pytest.approx(4 / 6 / 3 + 1 / 6, abs=0.02)


def test_a_committee_of_one_label_is_refused():
    with pytest.raises(ValueError, match="give a size from 1 to 16 and text of two labels"):
        committee.committee(units(0.5)[0], np.zeros(60, int), num_labels=G, size=3)
