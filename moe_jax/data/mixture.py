"""Mixtures: which source gives row g of a run, and which of that source's own rows it is.

A mixture is a list of stages. In each, sources with given shares follow each other as `spread.py`
says; a source that has given all the rows that it may give leaves its share to the others, in
proportion. Row g is a pure function of (seed, stages, g): the counts of earlier rows have a closed
form, so every source goes on where it was, at any cost of g and of the corpora alike.
"""

import bisect
import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Protocol

import numpy as np

from moe_jax.data.batches import Ranges
from moe_jax.data.packing import Piece
from moe_jax.data.shares import Stage
from moe_jax.data.spread import Spread


@dataclasses.dataclass(frozen=True)
class _Segment:
    """A stretch of rows with constant shares."""

    first: int
    names: list[str]
    taken: dict[str, int]  # the rows that each source gave before
    spread: Spread

    def taken_before(self, g: int) -> dict[str, int]:
        own = {n: self.spread.before(i, g - self.first) for i, n in enumerate(self.names)}
        return {name: rows + own.get(name, 0) for name, rows in self.taken.items()}


class Schedule:
    """The source of each row, and the source's own number of the row.

    num_rows: the number of rows until all sources of a stage have given all they may.
    """

    def __init__(self, stages: Sequence[Stage], *, batch_size: int, seed: int):
        names = dict.fromkeys(name for stage in stages for name in stage.shares)
        taken = dict.fromkeys(names, 0)
        self._segments: list[_Segment] = []
        self.num_rows: float = math.inf
        ends = [*(stage.first_batch * batch_size for stage in stages[1:]), math.inf]
        for stage, end in zip(stages, ends, strict=True):
            at: float = stage.first_batch * batch_size
            while at < end:
                left = {n: stage.most_rows.get(n, math.inf) - taken[n] for n in stage.shares}
                live = [name for name, rows in left.items() if rows > 0]
                if not live:
                    self.num_rows = at
                    return
                spread = Spread([stage.shares[name] for name in live], [seed, int(at)])
                self._segments.append(_Segment(int(at), live, taken, spread))
                limits = ((i, left[n]) for i, n in enumerate(live) if left[n] < math.inf)
                full = min(
                    (spread.rows_until(i, int(rows)) for i, rows in limits), default=math.inf
                )
                at = min(end, at + full)
                if at < math.inf:
                    taken = self._segments[-1].taken_before(int(at))

    def source(self, g: int) -> tuple[str, int]:
        """The name of the source of row g, and the number of its rows before."""
        segment = self._segment(g)
        index, before = segment.spread.source(g - segment.first)
        name = segment.names[index]
        return name, segment.taken[name] + before

    def taken(self, g: int) -> dict[str, int]:
        """The number of the rows before row g that each source gives."""
        return self._segment(g).taken_before(g)

    def _segment(self, g: int) -> _Segment:
        if g > self.num_rows:
            raise IndexError(f"row {g}: the sources end with row {self.num_rows}")
        at = bisect.bisect_right(self._segments, g, key=lambda segment: segment.first)
        return self._segments[at - 1]

    def taken_by(self, batches: int, batch_size: int, left_out: Ranges) -> dict[str, int]:
        """The rows of each source in the first `batches` batches without those left out."""
        rows = self.taken(batches * batch_size)
        end = 0
        for first, last in sorted(left_out):
            first, stop = max(first, end), min(last + 1, batches)
            if first < stop:
                a, b = (self.taken(n * batch_size) for n in (first, stop))
                rows = {name: rows[name] - b[name] + a.get(name, 0) for name in rows}
                end = stop
        return rows


class Plan(Protocol):
    """The rows of one source; `rows_per_epoch` of them make one pass."""

    sequence_length: int

    @property
    def rows_per_epoch(self) -> int: ...

    def row(self, g: int) -> list[Piece]: ...


@dataclasses.dataclass(frozen=True)
class MixturePlan:
    """The rows of a mixture: a plan, as `batches.batches` reads it, made of those of its sources.

    first_record: where each source's records begin among those of all sources.
    """

    schedule: Schedule
    plans: Mapping[str, Plan]
    first_record: Mapping[str, int]

    @property
    def sequence_length(self) -> int:
        return next(iter(self.plans.values())).sequence_length

    def row(self, g: int) -> list[Piece]:
        """The pieces of row g."""
        name, own = self.schedule.source(g)
        first = self.first_record[name]
        pieces = self.plans[name].row(own)
        return [Piece(first + p.record, p.start, p.stop) for p in pieces] if first else pieces


def seed_of(name: str, seed: int) -> int:
    """The seed of a source's own order, which does not depend on the other sources."""
    if not name:
        return seed
    return int(np.random.SeedSequence([seed, *name.encode()]).generate_state(1)[0]) >> 1
