"""Intervals and tests of two models on the same items, by hand and by simulation."""

import math

import numpy as np
import pytest

from moe_jax.evaluation import comparison, outcomes


@pytest.mark.parametrize(
    ("better", "worse", "p"),
    [
        (0, 0, 1),
        (1, 0, 1),  # 2 · 1/2
        (5, 0, 2 / 32),
        (8, 2, 2 * (1 + 10 + 45) / 1024),
        (3, 3, 1),
    ],
)
def test_mcnemars_exact_test_by_hand(better, worse, p):
    assert comparison.mcnemar(better, worse) == pytest.approx(p)
    assert comparison.mcnemar(worse, better) == pytest.approx(p)


def test_mcnemars_test_of_many_items_is_near_the_normal_one():
    """With continuity correction: z = (|b − c| − 1) / sqrt(b + c)."""
    z = (2100 - 1900 - 1) / math.sqrt(4000)
    assert comparison.mcnemar(2100, 1900) == pytest.approx(math.erfc(z / math.sqrt(2)), rel=0.01)


def test_an_interval_by_brute_force_and_by_its_seed():
    """The draws of two values have means of 0, 1/2 and 1 with probabilities 1/4, 1/2 and 1/4."""
    values = np.array([0.0, 1.0])
    draws = comparison.means(values, seed=0, draws=4000)
    np.testing.assert_allclose(
        np.bincount((2 * draws).astype(int)) / 4000, [0.25, 0.5, 0.25], atol=0.03
    )
    many = np.random.default_rng(0).random(50)
    assert comparison.interval(many, seed=1) == comparison.interval(many, seed=1)
    assert comparison.interval(many, seed=1) != comparison.interval(many, seed=2)
    assert comparison.interval(many[:19]) is None


def test_the_interval_of_a_share_is_wilsons_for_any_number_of_items():
    """By hand for 15 of 15: 1 / (1 + z² / 15) to 1; 3 of 4: statsmodels gives 0.3006 to 0.9544."""
    low, high = comparison.interval(np.ones(15))
    assert low == pytest.approx(1 / (1 + 1.959964**2 / 15)) and high == pytest.approx(1)
    found = comparison.interval(np.array([1.0, 1, 1, 0]))
    assert found == pytest.approx([0.30064, 0.95441], abs=1e-5)


def test_few_items_have_only_the_exact_test():
    found = comparison.compare(np.ones(3), np.zeros(3))
    assert (found.interval, found.p_bootstrap, found.p_mcnemar) == (None, None, 0.25)


def test_the_interval_is_about_two_standard_errors_wide():
    values = np.random.default_rng(1).normal(size=400)
    low, high = comparison.interval(values)
    error = values.std() / math.sqrt(len(values))
    assert (high - low) / (2 * 1.96 * error) == pytest.approx(1, abs=0.1)


def test_pairing_finds_what_two_intervals_do_not():
    """One model is better by 0.01 on each of items that differ much."""
    theirs = np.random.default_rng(2).random(30)
    found = comparison.compare(theirs + 0.01, theirs)
    assert found.interval == pytest.approx([0.01, 0.01])
    assert found.p_bootstrap == pytest.approx(1 / (comparison.DRAWS + 1))
    assert found.p_mcnemar is None and (found.n, found.better, found.worse) == (30, 30, 0)
    low, high = comparison.interval(theirs + 0.01)
    assert low < theirs.mean() < high


def test_a_comparison_of_right_and_wrong_has_mcnemars_p():
    ours, theirs = np.array([1, 1, 1, 1, 1, 0, 0.0]), np.array([0, 0, 0, 0, 0, 0, 1.0])
    found = comparison.compare(ours, theirs)
    assert (found.difference, found.better, found.worse) == (pytest.approx(4 / 7), 5, 1)
    assert found.p_mcnemar == pytest.approx(2 * (1 + 6) / 64)


def test_a_model_compared_with_itself_has_no_difference():
    values = np.array([1.0, 0, 1] * 7)
    found = comparison.compare(values, values)
    assert found == comparison.Comparison(0, [0, 0], 1, 1, n=21, better=0, worse=0)


def test_without_a_difference_small_p_values_are_rare():
    """About one in twenty of 200 pairs of equally good models has p < 0.05."""
    rng = np.random.default_rng(3)
    ps = [
        comparison.compare(rng.random(40), rng.random(40), seed=i).p_bootstrap for i in range(200)
    ]
    assert 0.02 <= np.mean(np.array(ps) < 0.05) <= 0.10


def test_different_items_cannot_be_paired():
    with pytest.raises(ValueError, match="2 items cannot be paired with 3"):
        comparison.compare(np.zeros(2), np.zeros(3))


def test_a_report_has_all_items_and_each_label():
    values = {"accuracy": np.array([1.0, 0, 1, 1])}
    found = outcomes.Outcomes(("b", "a", "", "b"), values, {"contexts_cut": 0}).report()
    assert (found["n"], found["accuracy"]) == (4, 0.75)
    assert {label: (row["n"], row["accuracy"]) for label, row in found["labels"].items()} == {
        "a": (1, 0),
        "b": (2, 1),
    }
    assert found["labels"]["a"]["accuracy_interval"] == comparison.interval(np.zeros(1))
