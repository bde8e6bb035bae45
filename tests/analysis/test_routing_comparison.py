"""Two routers on one text, against loops over its tokens, and committees over its labels."""

import dataclasses

import numpy as np
import pytest

from moe_jax.analysis import (
    committee,
    decisions,
    routing,
    routing_comparison,
    routing_counts,
    routing_summary,
)
from tests.analysis import test_decisions

N, E, k = 400, 5, 2
FACTS = dataclasses.replace(test_decisions.FACTS, num_tokens=N, layers=(1,))


def recorded(expert_NA, unit_N=None):
    """Decisions whose stretches are the units, which alternate between the two labels."""
    unit_N = np.arange(N) // 8 if unit_N is None else unit_N
    tokens, own = np.zeros(N, FACTS.token_dtype), np.zeros(N, FACTS.layer_dtype)
    tokens["label"], own["expert"] = unit_N % 2, expert_NA
    return decisions.Decisions(None, FACTS, {}, tokens, {1: own})


@pytest.fixture(scope="module")
def drawn():
    rng = np.random.default_rng(0)
    ours = rng.permuted(np.tile(np.arange(E), (N, 1)), axis=1)[:, :k]
    theirs = np.where(rng.random((N, 1)) < 0.6, ours[:, ::-1], (ours + 1) % E)
    return ours, theirs


def test_agreement_is_that_of_loops_and_its_interval_is_over_units(drawn):
    ours, theirs = drawn
    [row] = routing_comparison.compare(recorded(ours), recorded(theirs)).values()
    shared = np.array([len(set(a) & set(b)) for a, b in zip(*drawn, strict=True)])
    assert row["top_k"] == shared.mean() / k and row["top_1"] == (ours[:, 0] == theirs[:, 0]).mean()
    assert (row["n"], row["units"]) == (N, N // 8)
    means = shared.reshape(-1, 8).mean(axis=1) / k  # units of one size: the usual standard error
    half = 1.959964 * means.std(ddof=1) / len(means) ** 0.5
    assert row["top_k_interval"] == pytest.approx((row["top_k"] - half, row["top_k"] + half))
    joint_EE = routing_counts.count_joint(*drawn, num_experts=E)
    matching = routing.stability(joint_EE, N * k)
    assert row["matched"] == pytest.approx(matching.agreement)
    assert row["matched_chance"] == matching.chance


def test_renamed_experts_agree_after_matching_only(drawn):
    ours, _ = drawn
    renamed = np.array([3, 4, 0, 1, 2])[ours]
    [row] = routing_comparison.compare(recorded(ours), recorded(renamed)).values()
    assert row["matched"] == 1 and row["matched_interval"] == (1, 1) and row["top_1"] == 0


def test_unused_slots_agree_with_nothing(drawn):
    ours = np.where(np.arange(N)[:, None] < 100, drawn[0], E)
    [row] = routing_comparison.compare(recorded(ours), recorded(ours)).values()
    assert row["top_1"] == row["top_k"] == row["matched"] == 0.25


def test_few_units_have_no_interval():
    assert routing.interval(np.ones(19), np.ones(19)) is None
    assert routing.interval(np.ones(20), np.ones(20)) == (1, 1)


def test_intervals_of_units_of_unlike_sizes_hold_the_mean_95_times_in_100():
    rng, held = np.random.default_rng(1), 0
    for _ in range(400):
        size_U = rng.integers(1, 30, 60)
        sum_U = rng.binomial(size_U, rng.beta(2, 2, 60))
        low, high = routing.interval(sum_U, size_U)
        held += low <= 0.5 <= high
    assert 0.91 <= held / 400 <= 0.98


def test_the_committees_of_a_folder_are_those_of_its_stretches(drawn):
    ours = drawn[0].copy()
    unit_N = np.arange(N) // 8
    ours[:, 0] = np.where(unit_N % 2, 1, 4)  # an expert for each label
    ours[:, 1] = 0  # and one for both
    found = recorded(ours)
    # Zeros as inputs and targets join stretches: only the labels cut them.
    np.testing.assert_array_equal(found.stretches(), unit_N)
    [row] = routing_summary.committees(found, permutations=99).values()
    count_UE = np.array([np.bincount(ours[unit_N == u].ravel(), minlength=E) for u in range(50)])
    labels = np.arange(50) % 2
    assert row == committee.committee(count_UE, labels, num_labels=2, size=k, draws=99)
    assert row.members == (0,) and row.p_divergence == 0.01 and row.n == 50
    one = dataclasses.replace(found, _tokens=np.zeros(N, FACTS.token_dtype))
    assert routing_summary.committees(one, permutations=99) == {}
