"""The row plan: a stateless map from any row number g to the pieces of records in that row.

A record of n tokens (begin, text, end) holds n - 1 (input, target) pairs. The pairs of all
documents are concatenated in a seeded order and split into rows of T pairs, so every pair is seen
exactly once per epoch and only the last row of a block is padded.
"""

import dataclasses
import functools

import grain
import numpy as np


@dataclasses.dataclass(frozen=True)
class Piece:
    """Pairs [start, stop) of a record."""

    record: int
    start: int
    stop: int


class RowPlan:
    """The rows of an endless, seeded pass over records.

    Memory is bounded for any corpus: records form blocks of `block_size` neighbours, a block is
    permuted by (seed, epoch, block) only when one of its rows is needed, and the rows of all blocks
    are shuffled by a random-access permutation seeded by (seed, epoch).
    """

    def __init__(
        self, pairs: np.ndarray, *, sequence_length: int, seed: int, block_size: int = 65_536
    ):
        """`pairs`: the number of pairs of each record (may be memory-mapped)."""
        self._pairs, self.sequence_length, self._seed = pairs, sequence_length, seed
        self._block_size = block_size
        starts = np.arange(0, len(pairs), block_size)
        rows = -(-np.add.reduceat(pairs, starts, dtype=np.int64) // sequence_length)
        self._first_row = np.concatenate([[0], np.cumsum(rows)])
        # The caches belong to each plan and are small: a batch has rows from all over the corpus.
        self._block = functools.lru_cache(maxsize=64)(self._plan_block)
        self._order = functools.lru_cache(maxsize=2)(self._order_of_epoch)

    @property
    def rows_per_epoch(self) -> int:
        return int(self._first_row[-1])

    def row(self, g: int) -> list[Piece]:
        """The pieces of row g; later epochs have other orders."""
        epoch, index = divmod(g, self.rows_per_epoch)
        index = self._order(epoch)[index]
        block = int(np.searchsorted(self._first_row, index, side="right")) - 1
        records, ends = self._block(epoch, block)
        start = int(index - self._first_row[block]) * self.sequence_length
        stop = min(start + self.sequence_length, int(ends[-1]))
        pieces = []
        at = int(np.searchsorted(ends, start, side="right"))
        while start < stop:
            first = int(ends[at - 1]) if at else 0
            end = min(stop, int(ends[at]))
            if end > start:
                pieces.append(Piece(int(records[at]), start - first, end - first))
            start, at = end, at + 1
        return pieces

    def _plan_block(self, epoch: int, block: int) -> tuple[np.ndarray, np.ndarray]:
        """The records of a block in permuted order, and where the pairs of each end."""
        first = block * self._block_size
        size = min(self._block_size, len(self._pairs) - first)
        order = np.random.Generator(np.random.Philox([self._seed, epoch, block, 0]))
        records = first + order.permutation(size)
        return records, np.cumsum(self._pairs[records], dtype=np.int64)

    def _order_of_epoch(self, epoch: int) -> grain.MapDataset:
        """Random access to a permutation of the epoch's rows, stored as a key instead of a list."""
        seed = int(np.random.SeedSequence([self._seed, epoch]).generate_state(1)[0])
        return grain.MapDataset.range(self.rows_per_epoch).seed(seed).shuffle()
