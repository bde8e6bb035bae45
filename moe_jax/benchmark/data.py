"""The benchmark `data`: what planning and making rows costs as the corpus grows.

The corpora are indices of lengths without text: 65,536 drawn lengths, repeated. Rows have 4,096
tokens.
"""

import dataclasses
import statistics
import time
from collections.abc import Iterator

import numpy as np

from moe_jax.benchmark import rows as benchmark
from moe_jax.data import batches, packing

DOCUMENTS = (65_536, 1_000_000, 20_000_000, 1_000_000_000)
T, B = 4096, 64
TIMED_ROWS = 2048
SMALLEST = f"plan of {DOCUMENTS[0]:,} documents"


@dataclasses.dataclass(frozen=True)
class Lengths:
    """The lengths `drawn`, repeated up to `size`, without taking memory for them."""

    drawn: np.ndarray
    size: int

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, at: slice) -> np.ndarray:
        first, last, _ = at.indices(self.size)
        skipped = first % len(self.drawn)
        repeated = np.tile(self.drawn, -(-(skipped + last - first) // len(self.drawn)))
        return repeated[skipped : skipped + last - first]


@dataclasses.dataclass(frozen=True)
class _InMemory:
    """Records whose tokens are slices of one array."""

    pairs: np.ndarray
    label_ids: np.ndarray
    text: np.ndarray

    def tokens(self, record: int) -> np.ndarray:
        return self.text[: self.pairs[record] + 1]


def run(repeats: int) -> Iterator[benchmark.Row]:
    """The rows for each packing: opening a plan, a cell of its rows, and batches of one corpus.

    The bound of opening is the sum of all lengths, that of the rest is the plan of the smallest
    corpus: a ratio of 1 means that a row costs the same in a larger one.
    """
    drawn = np.random.default_rng(0).lognormal(6, 1, DOCUMENTS[0])
    drawn = np.clip(drawn, 1, 65_535).astype(np.int32)
    for name in packing.PACKINGS:
        bound = 0.0
        for size in DOCUMENTS:
            case = f"{size:,} documents"
            began = time.perf_counter()
            plan = packing.RowPlan(Lengths(drawn, size), sequence_length=T, seed=0, packing=name)
            opened = time.perf_counter() - began
            num_pairs = size // len(drawn) * int(drawn.sum())
            yield _row(f"open {case}", name, num_pairs, opened, "sum of lengths", _sum(drawn, size))
            seconds = statistics.median(_row_seconds(plan, epoch) for epoch in range(repeats))
            bound = bound or seconds
            yield _row(case, name, T, seconds, SMALLEST, bound)
            if size == DOCUMENTS[0]:
                corpus = _InMemory(drawn, np.zeros_like(drawn), np.arange(drawn.max() + 1))
                made = batches.batches(corpus, plan, batch_size=B)
                seconds = statistics.median(_batch_seconds(made) for _ in range(repeats))
                yield _row(f"batches of {case}", name, T, seconds / B, SMALLEST, bound)


def _row(case, name, tokens, seconds, bound, bound_seconds) -> benchmark.Row:
    how = {"tokens": tokens, "seconds": seconds, "bound": bound, "bound_seconds": bound_seconds}
    return benchmark.Row.of("data", case, name, "int32", **how)


def _sum(drawn: np.ndarray, size: int) -> float:
    began = time.perf_counter()
    lengths = Lengths(drawn, size)
    for start in range(0, size, 2**20):
        lengths[start : start + 2**20].sum(dtype=np.int64)
    return time.perf_counter() - began


def _row_seconds(plan: packing.RowPlan, epoch: int) -> float:
    """Seconds for each row of the first cell of an epoch, with its share of packing the cell."""
    first = epoch * plan.rows_per_epoch
    began = time.perf_counter()
    plan.row(first)
    packed = time.perf_counter()
    for g in range(first + 1, first + TIMED_ROWS + 1):
        plan.row(g)
    rows = (time.perf_counter() - packed) / TIMED_ROWS
    return (packed - began) / (plan.rows_per_epoch / plan.num_cells) + rows


def _batch_seconds(made: Iterator[batches.Batch]) -> float:
    """Seconds for a batch, of 16."""
    began = time.perf_counter()
    for _ in range(16):
        next(made)
    return (time.perf_counter() - began) / 16
