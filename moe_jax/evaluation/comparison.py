"""Intervals of means over items, and two models on the same items: bootstrap and exact tests."""

import dataclasses
import math
from collections.abc import Sequence

import numpy as np

DRAWS = 1000
FEWEST = 20  # items for a bootstrap, whose intervals are too narrow with fewer
STANDARD_ERRORS = 1.959964  # on either side, for 95 %


def interval(values_N: np.ndarray, *, seed: int = 0) -> list[float] | None:
    """The 95 % interval of the mean; None if there are too few values.

    Values of 0 and 1 have Wilson's score interval (Journal of the American Statistical Association
    22, 1927), which holds for any number of them, also if all are equal. Otherwise items are drawn
    with replacement (Efron, "Bootstrap methods", Annals of Statistics 7, 1979; percentile method).
    """
    if np.isin(values_N, (0, 1)).all():
        return _wilson(values_N)
    return None if len(values_N) < FEWEST else middle(means(values_N, seed))


def _wilson(values_N: np.ndarray) -> list[float]:
    n, share, z = len(values_N), float(np.mean(values_N)), STANDARD_ERRORS
    centre = (share + z**2 / (2 * n)) / (1 + z**2 / n)
    half = z / (1 + z**2 / n) * math.sqrt(share * (1 - share) / n + (z / (2 * n)) ** 2)
    return [max(0.0, centre - half), min(1.0, centre + half)]


def middle(values: Sequence[float] | np.ndarray) -> list[float]:
    """The range of the middle 95 % of the values."""
    return np.percentile(values, [2.5, 97.5]).tolist()


def means(values_N: np.ndarray, seed: int, draws: int = DRAWS) -> np.ndarray:
    """[draws, …]: means of as many values, or rows, as there are, drawn with replacement."""
    rng, N = np.random.default_rng(seed), len(values_N)
    at_once = max(1, 2**20 // N)  # all draws of a million items would take gigabytes
    parts = (min(at_once, draws - start) for start in range(0, draws, at_once))
    return np.concatenate([values_N[rng.integers(0, N, (n, N))].mean(axis=1) for n in parts])


@dataclasses.dataclass(frozen=True)
class Comparison:
    """The values of a model minus those of another one, on the same items.

    interval: of the mean difference, by a bootstrap over the items (paired).
    p_bootstrap: two-sided; the share of draws around 0 that are as far from 0 as the difference is.
      Both are None for fewer than 20 items.
    p_mcnemar: `mcnemar`'s, for values of 0 and 1; None for others.
    better, worse: the number of items with a larger and with a smaller value.
    """

    difference: float
    interval: list[float] | None
    p_bootstrap: float | None
    p_mcnemar: float | None
    n: int
    better: int
    worse: int


def compare(ours_N: np.ndarray, theirs_N: np.ndarray, *, seed: int = 0) -> Comparison:
    """Compares two models by their values on the same items, in the same order.

    The p-value is that of a paired bootstrap whose draws are moved to a mean of 0 (Efron and
    Tibshirani, "An introduction to the bootstrap", 1993, algorithm 16.2); it is at least
    1 / (draws + 1).

    Raises: ValueError for different numbers of items.
    """
    if len(ours_N) != len(theirs_N):
        raise ValueError(f"{len(ours_N)} items cannot be paired with {len(theirs_N)}")
    differences_N = np.asarray(ours_N, np.float64) - np.asarray(theirs_N, np.float64)
    difference, between, p = float(differences_N.mean()), None, None
    if len(differences_N) >= FEWEST:
        drawn = means(differences_N, seed)
        as_far = np.abs(drawn - difference) >= abs(difference) - 1e-12
        between, p = middle(drawn), float((as_far.sum() + 1) / (DRAWS + 1))
    better, worse = int((differences_N > 0).sum()), int((differences_N < 0).sum())
    is_binary = np.isin([ours_N, theirs_N], (0, 1)).all()
    return Comparison(
        difference,
        between,
        p,
        mcnemar(better, worse) if is_binary else None,
        len(differences_N),
        better,
        worse,
    )


def mcnemar(better: int, worse: int) -> float:
    """The two-sided p-value of McNemar's exact test (Psychometrika 12, 1947).

    Under the null hypothesis each of the items that only one of the two models has right is equally
    likely to be either's: a binomial distribution with probability 1/2.
    """
    n = better + worse
    tail = sum(math.comb(n, k) for k in range(min(better, worse) + 1))
    return min(1.0, 2 * tail / 2**n)
