"""Turns rows into batches of arrays on devices, with random access by batch number.

Batch N is a pure function of (corpus, seed, sizes, N), whatever the number of hosts and threads, so
the whole state of the data pipeline is {"step": N}.
"""

import contextlib
import copyreg
import dataclasses
import functools
import math
import mmap
import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from typing import Any, Protocol, TypeVar

import grain
import jax
import jax.numpy as jnp
import numpy as np
from absl import flags
from flax import struct

from moe_jax import stopping
from moe_jax.data.corpus import Records
from moe_jax.data.packing import Piece, RowPlan
from moe_jax.parallel import distributed


class Rows(Protocol):
    """A plan of rows: `packing.RowPlan`, or another."""

    @property
    def sequence_length(self) -> int: ...

    def row(self, g: int) -> list[Piece]: ...


Arrays = TypeVar("Arrays")  # a tree of arrays
Ranges = tuple[tuple[int, int], ...]  # the first and the last number of each range
# Name of an array of `Batch` -> its values for a record, one for each target.
Columns = Mapping[str, Callable[[int], np.ndarray]]


def number(n: int, left_out: Ranges) -> int:
    """The number of the batch that is the n-th, from 0, of those that are not left out."""
    end = 0
    for first, last in sorted(left_out):
        first = max(first, end)  # ranges may overlap
        if n < first or last < first:
            continue
        n += last + 1 - first
        end = last + 1
    return n


@struct.dataclass
class Batch:
    """Rows of packed documents, each array [B, T]: int32, and the weights and reference float32.

    Pairs of answers (`data.preferences`) are packed too: segments 2i - 1 and 2i of a row are the
    chosen and the rejected answer of its i-th pair, each after the prompt, and weights are 1 on the
    answers' tokens only.
    """

    tokens_BT: jax.Array
    targets_BT: jax.Array  # the next token of the same document
    segment_ids_BT: jax.Array  # tokens with equal ids see each other; 0 is padding
    positions_BT: jax.Array
    weights_BT: jax.Array  # the loss weight of each target: 1, and 0 for padding
    labels_BT: jax.Array  # indices into the corpus's labels
    # Log-probabilities of the targets under a reference model, if they were computed beforehand.
    reference_BT: jax.Array | None = None

    @classmethod
    def of_shape(
        cls, shape: tuple[int, int], make: Callable = np.zeros, *, reference: bool = False
    ) -> "Batch":
        """`make(shape, dtype)` for each array, for example `jax.ShapeDtypeStruct`."""
        dtypes = {"weights_BT": np.float32, "reference_BT": np.float32}
        names = [field.name for field in dataclasses.fields(cls)][: None if reference else -1]
        return cls(**{name: make(shape, dtypes.get(name, np.int32)) for name in names})

    @classmethod
    def of_rows(cls, rows_BX: jax.Array, segment_ids_BT: jax.Array | None = None) -> "Batch":
        """From rows of T + 1 tokens, one document each, padded where `segment_ids_BT` is 0."""
        B, T = rows_BX.shape[0], rows_BX.shape[1] - 1
        if segment_ids_BT is None:
            segment_ids_BT = jnp.ones((B, T), jnp.int32)
        return cls(
            tokens_BT=rows_BX[:, :-1],
            targets_BT=rows_BX[:, 1:],
            segment_ids_BT=segment_ids_BT,
            positions_BT=jnp.tile(jnp.arange(T), (B, 1)),
            weights_BT=(segment_ids_BT > 0).astype(jnp.float32),
            labels_BT=jnp.zeros((B, T), jnp.int32),
        )


@dataclasses.dataclass(frozen=True)
class _BatchSource:
    """Random access to the rows `mine` of batches; rows from `num_rows` of the plan on are padding.

    Item N is batch `number(N, left_out)`.
    """

    corpus: Records
    plan: Rows
    batch_size: int
    mine: Sequence[int]
    num_batches: int
    num_rows: float = math.inf
    left_out: Ranges = ()
    document_mask: bool = True
    reset_positions: bool = True
    columns: Columns = dataclasses.field(default_factory=dict)

    def __len__(self) -> int:
        return self.num_batches

    def __getitem__(self, n: int) -> Batch:
        shape = len(self.mine), self.plan.sequence_length
        batch = Batch.of_shape(shape, reference="reference_BT" in self.columns)
        n = number(n, self.left_out)
        for i, slot in enumerate(self.mine):
            g = n * self.batch_size + int(slot)
            if g < self.num_rows:
                self._fill(jax.tree.map(lambda x_BT, i=i: x_BT[i], batch), self.plan.row(g))
        return batch

    def _fill(self, row: Batch, pieces) -> None:
        at = 0
        for segment, piece in enumerate(pieces, start=1):
            tokens = self.corpus.tokens(piece.record)
            there = slice(at, at + piece.stop - piece.start)
            row.tokens_BT[there] = tokens[piece.start : piece.stop]
            row.targets_BT[there] = tokens[piece.start + 1 : piece.stop + 1]
            row.segment_ids_BT[there] = segment if self.document_mask else 1
            first = 0 if self.reset_positions else at
            row.positions_BT[there] = np.arange(first, first + piece.stop - piece.start)
            row.weights_BT[there] = 1
            for name, column in self.columns.items():
                getattr(row, name)[there] = column(piece.record)[piece.start : piece.stop]
            row.labels_BT[there] = self.corpus.label_ids[piece.record]
            at = there.stop


def batches(
    corpus: Records,
    plan: Rows,
    *,
    batch_size: int,
    start_step: int = 0,
    left_out: Ranges = (),
    rows: Sequence[int] | None = None,
    document_mask: bool = True,
    reset_positions: bool = True,
    num_threads: int = 2,
    workers: int = 0,
    columns: Columns | None = None,
) -> Generator[Batch, None, None]:
    """An endless iterator over batches start_step, start_step + 1, … of the plan's rows, with only
    the rows `rows` of each (None is all); batches that are `left_out` do not count.

    Without `document_mask`, all tokens of a row have segment 1, so that attention crosses
    documents. Without `reset_positions`, positions count from the start of the row instead of that
    of each piece. `columns` are arrays of the batch that do not follow from the tokens, such as
    loss weights.

    Threads of this process make the batches, or those of `workers` spawned processes, which end
    with the iterator (`close()`) or with this process.
    """
    source = _BatchSource(
        *(corpus, plan, batch_size, range(batch_size) if rows is None else rows),
        num_batches=2**40,  # a dataset must have a length; this one is long enough to be endless
        left_out=left_out,
        document_mask=document_mask,
        reset_positions=reset_positions,
        columns=columns or {},
    )
    options = grain.ReadOptions(num_threads=num_threads, prefetch_buffer_size=4 * num_threads)
    dataset = grain.MapDataset.source(source)[start_step:].to_iter_dataset(options)
    if workers:
        if not flags.FLAGS.is_parsed():
            flags.FLAGS.mark_as_parsed()  # grain reads its own flags
        processes = grain.MultiprocessingOptions(num_workers=workers, per_worker_buffer_size=2)
        dataset = dataset.mp_prefetch(processes, _start_worker)
        # A batch lies in memory shared with its worker, which is released once it is copied.
        dataset = dataset.map(functools.partial(jax.tree.map, np.array))
    with contextlib.closing(iter(dataset)) as made:
        yield from made


def _start_worker(index: int, count: int) -> None:
    """Lets the parent process alone decide when this process ends."""
    for number in stopping.SIGNALS:
        signal.signal(number, signal.SIG_IGN)

    def end_with_parent():
        if parent := multiprocessing.parent_process():
            parent.join()
        os._exit(0)

    threading.Thread(target=end_with_parent, daemon=True).start()


def _pickle_mapped(array: np.memmap) -> Any:
    """Pickles a memory-mapped file by its name: a worker process maps it, too."""
    if not isinstance(array.base, mmap.mmap):  # a part of one
        return np.asarray(array).__reduce__()
    return np.memmap, (array.filename, array.dtype, "r", array.offset, array.shape)


copyreg.pickle(np.memmap, _pickle_mapped)


def evaluation_batches(
    corpus: Records,
    *,
    sequence_length: int,
    batch_size: int,
    max_batches: int = 0,
    rows: Sequence[int] | None = None,
    columns: Columns | None = None,
) -> Iterator[Batch]:
    """One pass over the corpus, always in the same shuffled order, with the last batch padded.

    Because of the shuffle, its first `max_batches` (0 is all) are a fair sample of the documents.
    Records with loss weights, such as conversations, are not cut: an answer sees its whole prompt.
    """
    packing = "best_fit" if columns else "concat"
    plan = RowPlan(corpus.pairs, sequence_length=sequence_length, seed=0, packing=packing)
    how: dict[str, Any] = {"max_batches": max_batches, "rows": rows, "columns": columns}
    return one_pass(corpus, plan, batch_size=batch_size, **how)


def one_pass(
    corpus: Records,
    plan: RowPlan,
    *,
    batch_size: int,
    max_batches: int = 0,
    rows: Sequence[int] | None = None,
    columns: Columns | None = None,
) -> Iterator[Batch]:
    """The batches of the plan's first epoch, the last one padded; `max_batches` (0 is all) of
    them."""
    num_batches = -(-plan.rows_per_epoch // batch_size)
    mine = range(batch_size) if rows is None else rows
    source = _BatchSource(
        *(corpus, plan, batch_size, mine, num_batches, plan.rows_per_epoch), columns=columns or {}
    )
    return (source[n] for n in range(min(num_batches, max_batches or num_batches)))


def to_device(
    batch: Arrays, sharding: jax.NamedSharding, rows: np.ndarray, batch_size: int
) -> Arrays:
    """Global arrays of `batch_size` rows; `batch`, a tree, holds the rows of this process.

    `rows` are the indices of these rows, ascending (`parallel.distributed.rows_of`).
    """

    def part_of(array: np.ndarray, index: tuple[slice, ...]) -> np.ndarray:
        wanted = range(batch_size)[index[0]]
        start = np.searchsorted(rows, wanted.start)
        return array[start : start + len(wanted)]

    with jax.transfer_guard_host_to_device("allow"):  # the only transfer that a step should make
        return jax.tree.map(
            lambda array: jax.make_array_from_callback(
                (batch_size, *array.shape[1:]), sharding, functools.partial(part_of, array)
            ),
            batch,
        )


def feed(
    make: Callable[..., Iterator[Batch]],
    *text: Any,
    sharding: jax.NamedSharding,
    batch_size: int,
    **how,
) -> Generator[Batch, None, None]:
    """Global arrays of `batches` or `evaluation_batches` of `text`; each process reads only its own
    rows."""
    rows = distributed.rows_of(sharding.addressable_devices, sharding, batch_size)
    parts = make(*text, batch_size=batch_size, rows=rows, **how)
    return _ahead(parts, lambda batch: to_device(batch, sharding, rows, batch_size))


def _ahead(parts: Iterator[Batch], put: Callable[[Batch], Batch]) -> Generator[Batch, None, None]:
    """Puts each batch on the devices before the one that precedes it is used."""
    ahead: list[Batch] = []
    for part in parts:
        ahead.append(put(part))
        if len(ahead) > 1:
            yield ahead.pop(0)
    yield from ahead
