"""Paired differences over seeds with Student's t, and Holm's correction for several tests."""

import dataclasses
import math
from collections.abc import Sequence

import numpy as np
from scipy import special

from moe_jax.report import comparisons


@dataclasses.dataclass(frozen=True)
class Paired:
    """The mean of paired differences.

    interval: 95 %, Student's t. p: of the two-sided t-test that the mean is 0. Both are None for
    fewer than two pairs.
    """

    mean: float
    interval: tuple[float, float] | None
    p: float | None
    number: int


def paired(differences: Sequence[float]) -> Paired:
    """The mean of the differences of each seed, with its interval and test.

    Raises: ValueError for no differences.
    """
    n = len(differences)
    if not n:
        raise ValueError("there is no seed that all groups of the comparison have")
    mean, half = float(np.mean(differences)), comparisons.spread(differences)
    if half is None:
        return Paired(mean, None, None, n)
    error = float(np.std(differences, ddof=1)) / math.sqrt(n)
    t = abs(mean) / error if error else math.inf if mean else 0.0
    p = 2 * float(special.stdtr(n - 1, -t))
    return Paired(mean, (mean - half, mean + half), p, n)


def holm(p_values: Sequence[float]) -> list[float]:
    """The p-values corrected so that all tests together err with the level at most (Holm, "A simple
    sequentially rejective multiple test procedure", Scandinavian Journal of Statistics 6, 1979)."""
    corrected, largest = [0.0] * len(p_values), 0.0
    for rank, place in enumerate(sorted(range(len(p_values)), key=p_values.__getitem__)):
        largest = max(largest, min(1.0, (len(p_values) - rank) * p_values[place]))
        corrected[place] = largest
    return corrected
