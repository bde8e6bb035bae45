"""Spreads rows over sources with given shares: exact over long stretches, random within 64 rows.

Row n has a point in [0, 1), and the source whose interval holds the point gives the row. The points
are the van der Corput sequence in base 2 with nested scrambling (Owen, "Randomly permuted
(t,m,s)-nets and (t,s)-sequences", 1995): each aligned window of 2^j rows has one point in each of
2^j equal intervals. The number of an interval's points among the first n is therefore a sum of
divisions (`before`), and differs from n times the share by a few rows for any n. In each window of
WINDOW rows the points have another random order, so that a device or microbatch that gets every
k-th row of a batch gets all sources.
"""

import math
from collections.abc import Sequence

import numpy as np

from moe_jax.data.recent import Recent

BITS = 52  # of a point: a share has no more in its float64
WINDOW = 64  # rows: a window's order changes counts by at most 16 rows, for a share of one half


class Spread:
    """The sources, by index, of an endless sequence of rows."""

    def __init__(self, weights: Sequence[float], key: Sequence[int]):
        """`weights` are at least 0 and need not sum to 1; `key` seeds the order."""
        ends = np.cumsum(weights, dtype=np.float64)
        self._ends = np.rint(ends / ends[-1] * 2.0**BITS).astype(np.int64)
        self._key = tuple(key)
        rounds = np.random.SeedSequence([*key, 0]).generate_state(8, np.uint64)
        self._rounds = [(a, b & ~np.uint64(1)) for a, b in rounds.reshape(4, 2)]
        bounds = [0, *self._ends.tolist()]
        # For each bound, remainders and moduli: the points below it are those of the rows n with
        # n = remainder (mod modulus) for one of its pairs.
        self._classes = [self._classes_below(bound) for bound in bounds]
        self._window = Recent(self._plan_window, 64)

    def source(self, n: int) -> tuple[int, int]:
        """The source of row n, and how many of the rows before n are that source's."""
        window, at = divmod(n, WINDOW)
        sources, before = self._window(window)
        return int(sources[at]), int(before[at])

    def before(self, source: int, n: int) -> int:
        """The number of the source's rows among the first n."""
        window, at = divmod(n, WINDOW)
        whole = self._points_before(source, window * WINDOW)
        return (
            whole + int(np.count_nonzero(self._window(window)[0][:at] == source)) if at else whole
        )

    def rows_until(self, source: int, number: int) -> float:
        """The least n with `before(source, n) == number`; infinite for a source without share."""
        start = self._ends[source - 1] if source else 0
        if self._ends[source] == start:
            return math.inf if number else 0
        low, high = 0, max(1, number)
        while self.before(source, high) < number:
            low, high = high, 2 * high
        while low < high:
            middle = (low + high) // 2
            low, high = (
                (middle + 1, high) if self.before(source, middle) < number else (low, middle)
            )
        return low

    def _plan_window(self, window: int) -> tuple[np.ndarray, np.ndarray]:
        rng = np.random.Generator(np.random.Philox(np.random.SeedSequence([*self._key, 1, window])))
        n = np.arange(window * WINDOW, (window + 1) * WINDOW, dtype=np.uint64)
        points = _reversed(self._scrambled(n)).astype(np.int64)
        sources = np.searchsorted(self._ends, points, side="right")[rng.permutation(WINDOW)]
        before = np.empty(WINDOW, np.int64)
        for source in np.unique(sources).tolist():
            there = sources == source
            first = self._points_before(source, window * WINDOW)
            before[there] = first + np.arange(np.count_nonzero(there))
        return sources, before

    def _points_before(self, source: int, n: int) -> int:
        return self._below(source + 1, n) - self._below(source, n)

    def _below(self, bound: int, n: int) -> int:
        """The number of the first n points that are below a bound, given by its index."""
        remainders, moduli = self._classes[bound]
        return int(((n - remainders + moduli - 1) // moduli).sum())

    def _classes_below(self, bound: int) -> tuple[np.ndarray, np.ndarray]:
        """The points below `bound` are those of the disjoint intervals that its binary digits give:
        for each digit 1, the points with the same digits before it and a 0 there."""
        if bound == 2**BITS:
            return np.zeros(1, np.int64), np.ones(1, np.int64)
        n = self._row_of(int(_reversed(np.array([bound], np.uint64))[0]))
        digits = [j for j in range(BITS) if bound >> (BITS - 1 - j) & 1]
        remainders = [(n % 2**j) | (~(n >> j) & 1) << j for j in digits]
        return np.array(remainders, np.int64), np.array([2 << j for j in digits], np.int64)

    def _scrambled(self, n: np.ndarray) -> np.ndarray:
        """A permutation of [0, 2^BITS) in which bit j depends on bits 0 to j only, and flips with
        bit j: the bits of a point from its first digit on."""
        for add, multiply in self._rounds:
            n = n + add  # modulo 2^64
            n = n ^ (n * multiply)
        return n & np.uint64(2**BITS - 1)

    def _row_of(self, scrambled: int) -> int:
        """The inverse of `_scrambled`, found bit by bit."""
        n = 0
        for j in range(BITS):
            got = int(self._scrambled(np.array([n], np.uint64))[0])
            n |= ((got ^ scrambled) >> j & 1) << j
        return n


def _reversed(x: np.ndarray) -> np.ndarray:
    """The last BITS bits of each number in the reverse order."""
    bits = np.unpackbits(x.astype("<u8").view(np.uint8).reshape(-1, 8), axis=1, bitorder="little")
    whole = np.packbits(bits, axis=1).view(">u8").reshape(-1).astype(np.uint64)
    return whole >> np.uint64(64 - BITS)
