"""The row plan: a stateless map from any row number g to the pieces of records in that row.

A record of n tokens (begin, text, end) holds n - 1 (input, target) pairs. A row has room for T
pairs. Each pair is in exactly one row of an epoch.
"""

import dataclasses
import mmap
from typing import Protocol

import grain
import numpy as np

from moe_jax.data.packings import PACKINGS
from moe_jax.data.recent import Recent

NEIGHBOURS = 64  # records that stay together when records are dealt to cells
SLACK = 1.005  # rows of a cell, relative to those that the first cell's fill would ask for


@dataclasses.dataclass(frozen=True)
class Piece:
    """Pairs [start, stop) of a record."""

    record: int
    start: int
    stop: int


class Lengths(Protocol):
    """An array, or what computes a part of one when it is sliced."""

    def __len__(self) -> int: ...

    def __getitem__(self, at: slice, /) -> np.ndarray: ...


class RowPlan:
    """The rows of an endless, seeded pass over records.

    Records are dealt to cells like cards, in runs of `NEIGHBOURS`, so that each cell is a sample of
    the whole corpus. In each epoch the cells come in another order; the records of a cell are
    permuted and packed, and its rows are shuffled. A row thus costs the same in any corpus, and
    only the cells in use are in memory. In exchange, the rows of a document and the documents that
    may share its row are those of its cell, in all epochs. A corpus of one cell (65,536 records, or
    a million with first_fit and best_fit) is shuffled as a whole.

    concat puts the pairs of all documents one after another and cuts them into rows; only the last
    row of a cell is padded. first_fit and best_fit cut a document longer than a row into rows and a
    rest, and put rests, the longest first, whole into the first row that has room or into the one
    with the least room (Ding et al., arXiv 2404.10830, section 3). The number of a cell's rows must
    be known before it is packed: it follows from the fill of the first cell, with half a percent to
    spare; a rest for which there is no room all the same is cut. This cannot happen in a corpus of
    one cell.
    """

    def __init__(
        self,
        pairs: Lengths,
        *,
        sequence_length: int,
        seed: int,
        packing: str = "concat",
        cell_size: int = 0,
    ):
        """`pairs`: the number of pairs of each record. `cell_size` 0 is that of the packing."""
        self.sequence_length, self._seed, self._pairs = sequence_length, seed, pairs
        self._packing = PACKINGS[packing]
        cell_size = cell_size or self._packing.cell_size
        self.num_cells = max(1, -(-len(pairs) // cell_size))
        self._run = min(NEIGHBOURS, cell_size)
        self._sums_C = self._sum_cells()
        self._rows_C = self._count_rows()
        self.rows_per_epoch = int(self._rows_C.sum())
        # The caches belong to each plan and are small: threads need few cells at a time.
        self._cell = Recent(self._pack_cell, 4)
        self._epoch = Recent(self._order_cells, 2)

    @property
    def padding(self) -> float:
        """The share of padding in the rows of an epoch."""
        return 1 - int(self._sums_C.sum()) / (self.rows_per_epoch * self.sequence_length)

    def row(self, g: int) -> list[Piece]:
        """The pieces of row g; later epochs have other orders."""
        epoch, index = divmod(g, self.rows_per_epoch)
        cells, first_row = self._epoch(epoch)
        at = int(np.searchsorted(first_row, index, side="right")) - 1
        order, pieces, first_piece = self._cell(epoch, int(cells[at]))
        row = order[index - int(first_row[at])]
        inside = pieces[first_piece[row] : first_piece[row + 1]]
        return [Piece(*piece) for piece in inside.tolist()]

    def _order_cells(self, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        """The cells in the order of an epoch, and the number of the first row of each."""
        cells = _generator(self._seed, epoch, 0, 1).permutation(self.num_cells)
        return cells, np.cumsum([0, *self._rows_C[cells][:-1]])

    def _pack_cell(self, epoch: int, cell: int):
        """The order of the cell's rows, all its pieces, [pieces, 3], by row, and the first piece of
        each row."""
        records, lengths = self._records(cell)
        order = _generator(self._seed, epoch, cell, 0).permutation(len(records))
        records, lengths = records[order], lengths[order]
        num_rows = int(self._rows_C[cell])
        item, start, stop, row = _pack(lengths, self.sequence_length, num_rows, self._packing.order)
        by_row = np.lexsort((item, row))
        pieces = np.stack([records[item], start, stop], axis=1)[by_row]
        first_piece = np.searchsorted(row[by_row], np.arange(num_rows + 1))
        # Random access to a permutation, stored as a key instead of a list.
        seed = int(np.random.SeedSequence([self._seed, epoch, cell]).generate_state(1)[0])
        return grain.MapDataset.range(num_rows).seed(seed).shuffle(), pieces, first_piece.tolist()

    def _records(self, cell: int) -> tuple[np.ndarray, np.ndarray]:
        """The records of a cell, ascending, and their lengths: the cell has every run whose number
        is `cell` modulo num_cells."""
        first = np.arange(cell * self._run, len(self._pairs), self.num_cells * self._run)
        records = (first[:, None] + np.arange(self._run)).reshape(-1)
        records = records[: np.searchsorted(records, len(self._pairs))]
        return records, _read(self._pairs, first, self._run)

    def _sum_cells(self) -> np.ndarray:
        """The number of pairs of each cell; a deal, one run for each cell, is read at a time."""
        sums_C, deal = np.zeros(self.num_cells, np.int64), self.num_cells * self._run
        for start in range(0, len(self._pairs), deal):
            lengths = _read(self._pairs, np.array([start]), deal)
            runs = np.add.reduceat(lengths, np.arange(0, len(lengths), self._run))
            sums_C[: len(runs)] += runs
        return sums_C

    def _count_rows(self) -> np.ndarray:
        T, rows_C = self.sequence_length, -(-self._sums_C // self.sequence_length)
        if self._packing.order is None:
            return rows_C
        _, lengths = self._records(0)
        *_, row = _pack(lengths, T, len(lengths) + int(rows_C[0]), self._packing.order)
        needed = int(row.max(initial=-1)) + 1
        if self.num_cells == 1:
            return np.array([needed])
        per_pair = SLACK * needed / max(int(self._sums_C[0]), 1)
        return np.maximum(rows_C, np.ceil(self._sums_C * per_pair).astype(np.int64))


def _generator(*key: int) -> np.random.Generator:
    return np.random.Generator(np.random.Philox(key))


def _read(pairs: Lengths, starts: np.ndarray, size: int) -> np.ndarray:
    """The lengths [start, start + size) for each of the starts, one after another."""
    stops = np.minimum(starts + size, len(pairs))
    if not isinstance(pairs, np.memmap) or not isinstance(pairs.base, mmap.mmap):
        parts = [pairs[start:stop] for start, stop in zip(starts, stops, strict=True)]
        return np.concatenate(parts).astype(np.int64)
    # Through the map, each page would count as this process's memory, with 2 MB around it.
    with open(pairs.filename, "rb") as file:
        found = []
        for start, stop in zip(starts.tolist(), stops.tolist(), strict=True):
            file.seek(pairs.offset + start * pairs.itemsize)
            found.append(file.read((stop - start) * pairs.itemsize))
    return np.frombuffer(b"".join(found), pairs.dtype).astype(np.int64)


def _pack(lengths: np.ndarray, T: int, num_rows: int, order: str | None):
    """Arrays (item, start, stop, row) with pairs [start, stop) of an item for each piece."""
    if order is None:
        return _lay(np.arange(len(lengths)), lengths, np.zeros_like(lengths), np.full(num_rows, T))
    # Full rows of long documents come first.
    full = lengths // T
    item = np.repeat(np.arange(len(lengths)), full)
    start = T * (np.arange(len(item)) - np.repeat(np.cumsum(full) - full, full))
    pieces = [(item, start, start + T, np.arange(len(item)))]
    rests = np.flatnonzero(lengths % T)
    sizes, begin = lengths[rests] % T, T * full[rests]
    row = len(item) + _fit(sizes, T, num_rows - len(item), order)
    there = row < num_rows
    pieces.append((rests[there], begin[there], begin[there] + sizes[there], row[there]))
    if not there.all():
        rooms = T - np.bincount(row[there], sizes[there], num_rows).astype(np.int64)
        rooms[: len(item)] = 0
        pieces.append(_lay(rests[~there], sizes[~there], begin[~there], rooms))
    return tuple(np.concatenate(parts) for parts in zip(*pieces, strict=True))


def _lay(items: np.ndarray, lengths: np.ndarray, begin: np.ndarray, rooms: np.ndarray):
    """Lays the pairs from `begin` on of all items one after another into the rooms of rows."""
    ends, room_ends = np.cumsum(lengths), np.cumsum(rooms)
    total = ends[-1] if len(ends) else 0
    stops = np.unique(np.concatenate([[0], ends, room_ends[room_ends < total]]))
    starts, stops = stops[:-1], stops[1:]
    at = np.searchsorted(ends, starts, side="right")
    shift = begin[at] - (ends[at] - lengths[at])
    return items[at], starts + shift, stops + shift, np.searchsorted(room_ends, starts, "right")


def _fit(sizes: np.ndarray, T: int, num_rows: int, order: str) -> np.ndarray:
    """The row of each size, or num_rows if no row has room: first fit or best fit, decreasing.

    Rows of the same past are one interval [first, first + number), so that the cost grows with the
    number of different sizes and not with that of documents.
    """
    by_size = np.argsort(-sizes, kind="stable")
    different, counts = np.unique(sizes, return_counts=True)
    first, number, room = (np.array([n]) for n in (0, num_rows, T))
    steps: list[tuple] = []  # the first row, how many go into each row, how many in all
    for size, count in zip(different[::-1].tolist(), counts[::-1].tolist(), strict=True):
        open_ = np.flatnonzero(room >= size)
        if order == "room":
            open_ = open_[np.argsort(room[open_], kind="stable")]
        each = room[open_] // size
        holds = np.cumsum(each * number[open_])
        whole = int(np.searchsorted(holds, count))
        steps += zip(
            first[open_[:whole]], each[:whole], (each * number[open_])[:whole], strict=True
        )
        room[open_[:whole]] -= each[:whole] * size
        rest = count - (int(holds[whole - 1]) if whole else 0)
        if whole == len(open_):
            steps.append((num_rows, count, rest))
        elif rest:
            at, per_row = open_[whole], int(each[whole])
            steps.append((int(first[at]), per_row, rest))
            # The interval becomes up to three: rows with per_row more, one with fewer, the others.
            rows, some = divmod(rest, per_row)
            parts = (rows, min(some, 1), int(number[at]) - rows - min(some, 1))
            used = (per_row * size, some * size, 0)
            new = [n > 0 for n in parts]
            begins = np.cumsum([int(first[at]), *parts[:-1]])[new]
            rooms = (int(room[at]) - np.array(used))[new]
            first, number, room = (
                np.concatenate([old[:at], now, old[at + 1 :]])
                for old, now in ((first, begins), (number, np.array(parts)[new]), (room, rooms))
            )
    begin, each, count = np.array(steps, np.int64).reshape(-1, 3).T
    inside = np.arange(len(sizes)) - np.repeat(np.cumsum(count) - count, count)
    row = np.empty(len(sizes), np.int64)
    row[by_size] = np.repeat(begin, count) + inside // np.repeat(each, count)
    return row
