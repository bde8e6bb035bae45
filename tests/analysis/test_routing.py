"""Measures of routing against loops over tokens, cases worked by hand, and limits."""

import functools
import itertools
import math
import operator

import jax
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from moe_jax.analysis import routing, routing_counts

N, A, E, G, V, BATCH = 192, 2, 6, 3, 11, 64


def decisions(seed=0, num_tokens=N, num_experts=E, per_token=A):
    """Random decisions whose experts depend on the label, and a few tokens without one."""
    rng = np.random.default_rng(seed)
    label_N = rng.integers(-1, G, num_tokens).astype(np.int32)
    logits_NE = rng.normal(size=(num_tokens, num_experts)) + 0.5 * np.eye(G, num_experts)[label_N]
    p_NE = np.exp(2 * logits_NE)
    p_NE /= p_NE.sum(axis=1, keepdims=True)
    order_NE = np.argsort(-p_NE, axis=1)
    sorted_NE = np.take_along_axis(p_NE, order_NE, 1).astype(np.float32)
    expert_NA = order_NE[:, :per_token].astype(np.int32)
    expert_NA[::17, -1] = num_experts  # unused slots
    return expert_NA, sorted_NE[:, :per_token], sorted_NE[:, : min(3, num_experts)], label_N


count = functools.partial(routing_counts.count, num_labels=G, num_experts=E)
vocabulary_counts = functools.partial(routing_counts.count_vocabulary, vocab_size=V, num_experts=E)


def looped_counts(expert_NA, weight_NA, probability_NP, label_N):
    """`count`, token by token."""
    P = probability_NP.shape[1]
    found = routing_counts.no_counts(G, E, A)
    for experts, weights, probabilities, label in zip(
        expert_NA, weight_NA, probability_NP, label_N, strict=True
    ):
        if label < 0:
            continue
        found.tokens_G[label] += 1
        chosen = [e for e in experts if e < E]
        for e in chosen:
            found.label_GE[label, e] += 1
        for i, j in itertools.product(chosen, chosen):
            found.pairs_EE[i, j] += 1
        if experts[0] < E:
            found.first_GE[label, experts[0]] += 1
        for sums, values in (
            (found.probability_PW, probabilities),
            (found.weight_AW, weights),
        ):
            for x, value in enumerate(values):
                sums[x] += divmod(round(float(value) * 2**20), 2**12)
        for r in range(P - 1):
            ratio = probabilities[r] / probabilities[r + 1]
            found.ratio_RB[r, min(int(16 * math.log2(ratio)), 255)] += 1
    return found


def assert_equal(counts, others):
    for mine, theirs in zip(jax.tree.leaves(counts), jax.tree.leaves(others), strict=True):
        np.testing.assert_array_equal(mine, theirs)


@pytest.fixture(scope="module")
def all_at_once():
    return count(*decisions())


def test_counts_are_what_a_loop_over_tokens_finds(all_at_once):
    assert_equal(all_at_once, looped_counts(*decisions()))
    assert all(leaf.dtype == np.int32 for leaf in jax.tree.leaves(all_at_once))


def test_batches_add_up_to_all_tokens_exactly_in_any_order(all_at_once):
    parts = [
        count(*(array[start : start + BATCH] for array in decisions()))
        for start in range(0, N, BATCH)
    ]
    for order in (parts, parts[::-1]):
        total = functools.reduce(operator.add, order, routing_counts.no_counts(G, E, A))
        assert_equal(total, all_at_once)
        assert all(leaf.dtype == np.int64 for leaf in jax.tree.leaves(total))


def test_eight_devices_count_what_one_counts(all_at_once):
    mesh = Mesh(np.array(jax.devices()), ("data",))
    spread = jax.device_put(decisions(), NamedSharding(mesh, PartitionSpec("data")))
    assert len(spread[0].sharding.device_set) == 8
    assert_equal(count(*spread), all_at_once)
    expert_NA, _, _, label_N = spread
    one = vocabulary_counts(np.asarray(label_N), np.asarray(expert_NA)[:, 0])
    np.testing.assert_array_equal(vocabulary_counts(label_N, expert_NA[:, 0]), one)


def test_padding_changes_nothing_and_sums_beyond_int32_are_exact(all_at_once):
    padded = [np.concatenate([array, array[:BATCH]]) for array in decisions()]
    padded[3][N:] = -1
    assert_equal(count(*padded), all_at_once)
    large = jax.tree.map(lambda leaf: np.full_like(leaf, 2**31 - 1), jax.device_get(all_at_once))
    assert (large + large).pairs_EE.max() == 2**32 - 2


def test_a_batch_whose_counts_could_overflow_is_refused():
    with pytest.raises(ValueError, match="262145 tokens in one call are more than 262144; count"):
        jax.eval_shape(count, *(np.repeat(a[:1], 2**18 + 1, axis=0) for a in decisions()))


def test_the_largest_batch_overflows_nowhere():
    """All tokens certain, with the largest gate: the sums of words stay below 2^31."""
    most = routing_counts.MOST_TOKENS
    assert (routing_counts.LARGEST * 2**20) // 2**12 * most < 2**31
    assert most * (2**12 - 1) < 2**31 and most < 2**24


def test_means_of_gates_come_back_from_fixed_point(all_at_once):
    _, weight_NA, probability_NP, label_N = decisions()
    found, counted = routing.gates(all_at_once), label_N >= 0
    exact_P = probability_NP[counted].astype(np.float64).mean(axis=0)
    np.testing.assert_allclose(found.probability_P, exact_P, atol=5e-7)
    np.testing.assert_allclose(found.weight_A, weight_NA[counted].mean(axis=0), atol=1e-6)
    np.testing.assert_allclose(found.of_means_R, exact_P[:-1] / exact_P[1:], rtol=1e-5)
    ratio_NR = probability_NP[counted][:, :-1] / probability_NP[counted][:, 1:]
    exact_RQ = np.percentile(ratio_NR, [25, 50, 75], axis=0).T
    np.testing.assert_allclose(found.quartiles_RQ, exact_RQ, rtol=2 ** (1 / 16) - 1)


def test_gates_by_hand():
    """Probabilities 1/2, 1/4, 1/8: both ratios are 2, at the lower end of bin 16."""
    counts = routing_counts.no_counts(1, 4, 1)
    counts.tokens_G[0], counts.ratio_RB[:, 16] = 8, 8
    counts.probability_PW[:] = [[8 * 128, 0], [8 * 64, 0], [8 * 32, 0]]  # 2^19 = 128 · 2^12
    found = routing.gates(counts)
    assert found.probability_P.tolist() == [0.5, 0.25, 0.125]
    assert found.of_means_R.tolist() == [2, 2]
    np.testing.assert_allclose(found.quartiles_RQ, 2 ** (1 + np.array([[1, 2, 3]] * 2) / 64))
    counts.ratio_RB[0] = np.eye(256, dtype=int)[255] * 8  # certain tokens: the last bin
    assert routing.gates(counts).quartiles_RQ[0].tolist() == [2**16] * 3


def test_two_experts_have_one_ratio():
    expert_NA, weight_NA, probability_NP, label_N = decisions(num_experts=2, per_token=1)
    expert_NA = np.minimum(expert_NA, 1)
    counts = routing_counts.count(
        expert_NA, weight_NA, probability_NP, label_N, num_labels=G, num_experts=2
    )
    assert routing.gates(counts).quartiles_RQ.shape == (1, 3)


def test_shares_and_specialisation_by_hand():
    """Two tokens of label 0 go to experts {0, 1} and {0, 2}; one of label 1 to {1, 2}."""
    label_GE, tokens_G = np.array([[2, 1, 1], [0, 1, 1]]), np.array([2, 1])
    assert routing.share(label_GE).tolist() == [[0.5, 0.25, 0.25], [0, 0.5, 0.5]]
    assert routing.specialisation(label_GE, tokens_G).tolist() == [[1, 0.5, 0.5], [0, 1, 1]]
    assert routing.share(np.zeros((1, 2))).tolist() == [[0, 0]]
    np.testing.assert_allclose(routing.effective_experts(label_GE), [2**1.5, 2])


def test_specialisation_of_even_routing_is_k_of_E_and_of_one_expert_is_1():
    every_pair = np.array(list(itertools.combinations(range(E), A)), np.int32)
    counts = routing_counts.count(
        every_pair, np.ones_like(every_pair, np.float32), np.ones((15, 3), np.float32),
        np.zeros(15, np.int32), num_labels=1, num_experts=E,
    )  # fmt: skip
    found = routing.specialisation(counts.label_GE, counts.tokens_G)
    np.testing.assert_allclose(found, A / E)
    off_diagonal = ~np.eye(E, dtype=bool)
    pairs_EE = routing.coactivation(counts.pairs_EE)
    np.testing.assert_allclose(pairs_EE[off_diagonal], (A - 1) / (E - 1))


def test_load_measures_by_hand():
    count_LE = np.array([[4, 4, 0, 0], [1, 1, 1, 1], [597, 399, 3, 1], [1, 0, 0, 0]])
    np.testing.assert_allclose(routing.effective_experts(count_LE)[[0, 1, 3]], [2, 4, 1])
    np.testing.assert_allclose(routing.busiest_share(count_LE), [1, 0.5, 0.996, 1])
    assert routing.rarely_used(count_LE) == 2 + 0 + 2 + 3


@pytest.mark.parametrize(
    ("effective", "busiest"), [(6.11, 0.529), (2.53, 0.944), (6.31, 0.488)], ids=["FS", "NU", "DU"]
)
def test_the_published_effective_experts_fit_the_published_load_of_the_two_busiest(
    effective, busiest
):
    """The most even load on 8 experts with this share on two has the most effective experts. The
    released models' means must lie below that, and above the number of two experts alone."""
    load_E = np.array([busiest / 2] * 2 + [(1 - busiest) / 6] * 6) * 1e6
    assert 1 / busiest < effective < routing.effective_experts(load_E)
    np.testing.assert_allclose(routing.busiest_share(load_E), busiest)


def test_js_divergence_by_hand_in_bits():
    """(1, 0) and (1/2, 1/2): half of log2(4/3) and of 1/2 log2(2/3) + 1/2 log2(2)."""
    by_hand = 0.5 * math.log2(4 / 3) + 0.25 * math.log2(2 / 3) + 0.25
    found = routing.js_divergence(
        np.array([[7, 0], [3, 3], [5, 0]]), np.array([[2, 2], [9, 9], [0, 8]])
    )
    np.testing.assert_allclose(found, [by_hand, 0, 1], atol=1e-12)
    assert math.isnan(routing.js_divergence(np.zeros(2), np.ones(2)))
    count_GE = np.random.default_rng(0).integers(1, 50, (G, E))
    both_GG = routing.label_divergences(count_GE)
    for g, h in itertools.product(range(G), range(G)):
        p, q = count_GE[g] / count_GE[g].sum(), count_GE[h] / count_GE[h].sum()
        m = (p + q) / 2
        loop = sum(
            a * math.log2(a / c) + b * math.log2(b / c) for a, b, c in zip(p, q, m, strict=True)
        )
        assert both_GG[g, h] == pytest.approx(loop / 2, abs=1e-12)


def test_js_divergence_of_two_samples_of_one_load_is_what_the_page_says():
    """(E - 1)/(4 n) nats, from the second-order expansion of the divergence: 2.8 n in bits."""
    two = np.random.default_rng(0).multinomial(1000, [0.1, 0.2, 0.3, 0.4], (2, 2000))
    assert routing.js_divergence(*two).mean() == pytest.approx(3 / (2.8 * 1000), rel=0.05)


def test_shared_experts_by_hand_and_in_batches():
    expert_NA = np.array([[0, 1], [2, 3], [4, 5], [1, 0]])
    final_NA = np.array([[1, 0], [2, 4], [0, 1], [1, 2]])
    shared = routing_counts.count_shared
    assert shared(expert_NA, final_NA).tolist() == [2, 1, 0, 1]
    assert shared(expert_NA[:, :1], final_NA[:, :1]).tolist() == [0, 1, 0, 1]
    halves = [shared(expert_NA[h], final_NA[h]) for h in (slice(2), slice(2, 4))]
    assert np.concatenate(halves).tolist() == [2, 1, 0, 1]
    with pytest.raises(ValueError, match="same number of experts per token"):
        shared(expert_NA, final_NA[:, :1])


def test_independent_routers_share_k_of_E_of_their_experts():
    rng = np.random.default_rng(0)
    drawn = [rng.permuted(np.tile(np.arange(E), (20_000, 1)), axis=1)[:, :A] for _ in range(2)]
    shared = routing_counts.count_shared
    assert shared(*drawn).mean() / A == pytest.approx(A / E, abs=0.01)
    assert (shared(drawn[0], drawn[0][:, ::-1]) == A).all()


def test_coactivation_counts_all_pairs_of_a_set():
    """Tokens {0, 1, 2} and {0, 3, 1}: 0 and 2 are together once, though two places apart."""
    expert_NA = np.array([[0, 1, 2], [0, 3, 1]])
    pairs_EE = routing_counts.count_joint(expert_NA, expert_NA, num_experts=5)
    found = routing.coactivation(pairs_EE)
    assert found[0].tolist() == [1, 1, 0.5, 0.5, 0]
    assert found[2].tolist() == [1, 1, 1, 0, 0]  # not symmetric
    assert found[4].tolist() == [0] * 5  # no tokens


def test_a_heatmap_begins_with_the_strongest_pairs():
    coactivation_EE = np.eye(5)
    coactivation_EE[3, 1], coactivation_EE[0, 4] = 0.9, 0.7
    assert routing.most_coactive(coactivation_EE, 4).tolist() == [1, 3, 0, 4]
    assert sorted(routing.most_coactive(coactivation_EE, 9)) == [0, 1, 2, 3, 4]


def test_vocabulary_counts_are_those_of_a_loop_and_ignore_missing_ids():
    rng = np.random.default_rng(1)
    id_N, expert_N = rng.integers(-1, V, N), rng.integers(0, E + 1, N)
    found = np.zeros((V, E), int)
    for i, e in zip(id_N, expert_N, strict=True):
        if i >= 0 and e < E:
            found[i, e] += 1
    np.testing.assert_array_equal(vocabulary_counts(id_N, expert_N), found)


def test_vocabulary_specialisation_by_hand():
    count_VE = np.array([[9, 1, 0], [0, 0, 0], [0, 20, 0], [1, 1, 2], [0, 10, 0]])
    found = routing.vocabulary(count_VE)
    assert found.mean == pytest.approx((0.9 + 1 + 0.5 + 1) / 4)
    assert found.num_ids == 4
    assert found.mean_frequent == pytest.approx((0.9 + 1 + 1) / 3)
    assert found.id_I.tolist() == [2, 4, 0]  # equal shares: the more frequent first
    assert found.expert_I.tolist() == [1, 1, 0]
    assert found.share_I.tolist() == [1, 1, 0.9]
    assert found.occurrences_I.tolist() == [20, 10, 10]
    assert math.isnan(routing.vocabulary(np.zeros((2, 3), int)).mean)


def test_vocabulary_specialisation_of_random_routing_is_at_its_chance_level():
    """Not 1/E: of two occurrences, one expert has half at least."""
    rng = np.random.default_rng(2)
    count_VE = rng.multinomial(np.full(4000, 2), [1 / 4] * 4)
    found = routing.vocabulary(count_VE)
    assert found.chance == pytest.approx(5 / 8, abs=0.01)  # both at one expert: 1/4
    assert found.mean == pytest.approx(found.chance, abs=0.02)
    always = routing.vocabulary(np.diag([100] * 4))
    assert always.mean == 1 and always.chance < 0.5


def test_stability_finds_the_permutation_of_experts():
    expert_NA = decisions()[0][:, :1]
    permutation_E = np.array([3, 0, 5, 1, 2, 4])
    joint_EE = routing_counts.count_joint(expert_NA, permutation_E[expert_NA], num_experts=E)
    found = routing.stability(joint_EE, N)
    assert found.agreement == 1 and found.n == N
    assert found.matched_E.tolist() == permutation_E.tolist()


def test_stability_is_that_of_the_best_of_all_permutations():
    joint_EE = np.random.default_rng(3).integers(0, 30, (5, 5))
    n = int(joint_EE.sum())
    best = max(sum(joint_EE[i, p[i]] for i in range(5)) for p in itertools.permutations(range(5)))
    found = routing.stability(joint_EE, n)
    assert found.agreement == best / n
    loads = joint_EE.sum(axis=1) / n, joint_EE.sum(axis=0) / n
    chance = max(
        sum(loads[0][i] * loads[1][p[i]] for i in range(5))
        for p in itertools.permutations(range(5))
    )
    assert found.chance == pytest.approx(chance)


def test_stability_of_independent_routers_is_at_its_chance_level():
    rng = np.random.default_rng(4)
    draw = [rng.permuted(np.tile(np.arange(E), (20_000, 1)), axis=1)[:, :A] for _ in range(2)]
    found = routing.stability(routing_counts.count_joint(*draw, num_experts=E), 20_000 * A)
    assert found.chance == pytest.approx(A / E, abs=0.01)
    assert found.agreement == pytest.approx(found.chance, abs=0.02)
