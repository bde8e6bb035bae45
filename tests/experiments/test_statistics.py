"""Paired differences and Holm's correction: by hand and against scipy.stats."""

import pytest
from scipy import stats

from moe_jax.experiments import statistics


def test_the_interval_of_three_differences_is_that_of_students_t():
    """Mean 2, deviation 1, error 1/√3, and t(2) at 97.5 % is 4.303."""
    found = statistics.paired([1.0, 2.0, 3.0])
    assert found.mean == 2.0 and found.number == 3
    assert found.interval == pytest.approx((2 - 4.302653 / 3**0.5, 2 + 4.302653 / 3**0.5))
    assert found.p == pytest.approx(stats.ttest_1samp([1, 2, 3], 0).pvalue)


def test_a_p_below_the_level_and_an_interval_without_zero_are_the_same_test():
    for shift in (0.0, 1.0, 2.4, 2.5, 10.0):
        found = statistics.paired([shift - 1, shift, shift + 1])
        assert (found.p < 0.05) == (not found.interval[0] <= 0 <= found.interval[1])


def test_one_seed_has_no_interval_and_equal_differences_have_no_width():
    assert statistics.paired([0.3]) == statistics.Paired(0.3, None, None, 1)
    assert statistics.paired([0.0, 0.0]).p == 1.0
    assert statistics.paired([0.5, 0.5]).p == 0.0
    with pytest.raises(ValueError, match="no seed"):
        statistics.paired([])


def test_holm_multiplies_the_smallest_by_the_number_of_tests_and_keeps_the_order():
    """0.01 · 3, 0.03 · 2, and 0.04 · 1, which may not be below the one before it."""
    assert statistics.holm([0.04, 0.01, 0.03]) == pytest.approx([0.06, 0.03, 0.06])
    assert statistics.holm([0.9, 0.6]) == [1.0, 1.0]
    assert statistics.holm([]) == []
