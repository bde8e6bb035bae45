"""Text tokenized once and kept; batches by number.

Batch N is a pure function of (corpus, seed, sizes, N), whatever the number of hosts and threads, so
the whole state of the data is {"step": N}.
"""

import dataclasses
import functools
import hashlib
import json
import math
import os
import pathlib
import shutil
import tempfile
from collections.abc import Callable, Iterator, Sequence

import grain
import jax
import numpy as np
import tqdm
from array_record.python import array_record_module

from moe_jax.data import sources
from moe_jax.data.packing import RowPlan
from moe_jax.data.tokenizers import Tokenizer
from moe_jax.parallel import distributed

FORMAT = 1  # of the cache; part of its key
RECORD_TOKENS = 65_536  # a longer document is cut into several records


@dataclasses.dataclass(frozen=True)
class TokenizedCorpus:
    """Token records with random access, and what is known of them without reading."""

    folder: pathlib.Path
    labels: tuple[str, ...]
    pairs: np.ndarray  # of each record: predicted tokens
    label_ids: np.ndarray  # of each record
    bytes_per_label: tuple[int, ...]  # of text
    byte_counts: tuple[int, ...]  # how often each of the 256 bytes occurs

    @functools.cached_property
    def _records(self) -> grain.sources.ArrayRecordDataSource:
        return grain.sources.ArrayRecordDataSource(str(self.folder / "tokens.array_record"))

    def tokens(self, record: int) -> np.ndarray:
        """Raises: ValueError for a record that is not what was written."""
        try:
            tokens = np.frombuffer(self._records[int(record)], np.uint32)
        except Exception as error:  # the reader has no class of its own for damage
            raise ValueError(f"{self.folder} is damaged ({error}); delete the folder") from error
        if len(tokens) != self.pairs[record] + 1:
            raise ValueError(f"{self.folder} is damaged (record {record}); delete the folder")
        return tokens

    @property
    def num_tokens(self) -> int:
        return int(self.pairs.sum(dtype=np.int64))

    @property
    def bytes_per_token(self) -> dict[str, float]:
        """Mean bytes of text per predicted token, by label."""
        pairs = np.bincount(self.label_ids, weights=self.pairs, minlength=len(self.labels))
        return {
            label: num_bytes / num_pairs
            for label, num_bytes, num_pairs in zip(
                self.labels, self.bytes_per_label, pairs, strict=True
            )
        }

    @property
    def byte_unigram_bits(self) -> float:
        """Entropy of the bytes' frequencies: bits per byte of a model that knows these only."""
        share = np.array(self.byte_counts) / max(sum(self.byte_counts), 1)
        return float(-sum(p * math.log2(p) for p in share if p))


def cache_folder(cache_dir: str) -> pathlib.Path:
    """`cache_dir`, or for "" $XDG_CACHE_HOME/moe_jax (~/.cache/moe_jax)."""
    user = pathlib.Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser()
    return pathlib.Path(cache_dir) if cache_dir else user / "moe_jax"


def open_corpus(
    source: str,
    split: str,
    tokenizer: Tokenizer,
    *,
    validation_fraction: float,
    cache: pathlib.Path,
) -> TokenizedCorpus:
    """The tokenized documents of a split, tokenizing them unless that was done before.

    Args:
      cache: where it is kept, under a hash of text, tokenizer and options.

    Raises: ValueError when the split is empty or the source cannot be used.
    """
    datasets = cache / "tfds"
    key = [
        FORMAT,
        sources.fingerprint(source, datasets),
        split,
        validation_fraction,
        tokenizer.fingerprint,
    ]
    folder = cache / "tokens" / hashlib.sha256(json.dumps(key).encode()).hexdigest()[:24]
    if not folder.exists():
        documents = sources.documents(
            source, split, validation_fraction=validation_fraction, data_dir=datasets
        )
        folder.parent.mkdir(parents=True, exist_ok=True)
        unfinished = pathlib.Path(tempfile.mkdtemp(dir=folder.parent, prefix="unfinished-"))
        try:
            num_records = _tokenize(documents, tokenizer, unfinished, f"{source} {split}")
            if not num_records:
                raise ValueError(
                    f"data.source={source!r} has no {split} documents; "
                    "set config.data.validation_fraction to another value, or give more text"
                )
            try:
                unfinished.rename(folder)
            except OSError:
                if not folder.exists():  # else another process was first, with the same content
                    raise
        finally:
            shutil.rmtree(unfinished, ignore_errors=True)
    meta = json.loads((folder / "meta.json").read_text())
    return TokenizedCorpus(
        folder=folder,
        labels=tuple(meta["labels"]),
        pairs=np.load(folder / "pairs.npy", mmap_mode="r"),
        label_ids=np.load(folder / "label_ids.npy", mmap_mode="r"),
        bytes_per_label=tuple(meta["bytes_per_label"]),
        byte_counts=tuple(meta["byte_counts"]),
    )


def _tokenize(
    documents: Iterator[sources.Document], tokenizer: Tokenizer, folder: pathlib.Path, name: str
) -> int:
    """Writes tokens, lengths and counts; returns the number of records."""
    pairs, label_ids, bytes_of_label = [], [], {}
    byte_counts = np.zeros(256, np.int64)
    writer = array_record_module.ArrayRecordWriter(
        str(folder / "tokens.array_record"), "group_size:1"
    )
    for document in tqdm.tqdm(documents, f"tokenizing {name}", unit=" documents", disable=None):
        ids = tokenizer.encode(document.text)
        ids = np.concatenate([[tokenizer.bos_id], ids, [tokenizer.eos_id]]).astype(np.uint32)
        text_bytes = np.frombuffer(document.text.encode(), np.uint8)
        byte_counts += np.bincount(text_bytes, minlength=256)
        bytes_of_label[document.label] = bytes_of_label.get(document.label, 0) + len(text_bytes)
        label_id = list(bytes_of_label).index(document.label)
        # Neighbouring records share a token: the last target of one is the first input of the next.
        for start in range(0, len(ids) - 1, RECORD_TOKENS - 1):
            record = ids[start : start + RECORD_TOKENS]
            writer.write(record.tobytes())
            pairs.append(len(record) - 1)
            label_ids.append(label_id)
    writer.close()
    np.save(folder / "pairs.npy", np.array(pairs, np.int32))
    np.save(folder / "label_ids.npy", np.array(label_ids, np.int32))
    meta = {
        "labels": list(bytes_of_label),
        "bytes_per_label": list(bytes_of_label.values()),
        "byte_counts": byte_counts.tolist(),
    }
    (folder / "meta.json").write_text(json.dumps(meta))
    return len(pairs)


@dataclasses.dataclass(frozen=True)
class _BatchSource:
    """Random access to some rows of batch N; rows of the plan from `num_rows` on are padding."""

    corpus: TokenizedCorpus
    plan: RowPlan
    sequence_length: int
    batch_size: int
    mine: Sequence[int]
    num_batches: int
    num_rows: int | None = None

    def __len__(self) -> int:
        return self.num_batches

    def __getitem__(self, n: int) -> dict[str, np.ndarray]:
        shape = (len(self.mine), self.sequence_length)
        names = ("tokens", "targets", "segment_ids", "positions", "labels")
        batch = {name: np.zeros(shape, np.int32) for name in names}
        for i, slot in enumerate(self.mine):
            g = n * self.batch_size + int(slot)
            if self.num_rows is None or g < self.num_rows:
                self._fill({name: batch[name][i] for name in names}, self.plan.row(g))
        return batch

    def _fill(self, row, pieces) -> None:
        at = 0
        for segment, piece in enumerate(pieces, start=1):
            tokens = self.corpus.tokens(piece.record)
            there = slice(at, at + piece.stop - piece.start)
            row["tokens"][there] = tokens[piece.start : piece.stop]
            row["targets"][there] = tokens[piece.start + 1 : piece.stop + 1]
            row["segment_ids"][there] = segment
            row["positions"][there] = np.arange(piece.stop - piece.start)
            row["labels"][there] = self.corpus.label_ids[piece.record]
            at = there.stop


def batches(
    corpus: TokenizedCorpus,
    *,
    sequence_length: int,
    batch_size: int,
    seed: int,
    start_step: int = 0,
    rows: Sequence[int] | None = None,
    num_threads: int = 2,
) -> Iterator[dict[str, np.ndarray]]:
    """The rows `rows` (None is all) of batch start_step, start_step + 1, … without end.

    Each batch has `tokens`, `targets` (the next token of the same document), `segment_ids` (1, 2, …
    along a row, 0 for padding), `positions` (from 0 in each segment) and `labels`: int32, of shape
    [number of rows, sequence_length].
    """
    source = _BatchSource(
        corpus,
        RowPlan(corpus.pairs, sequence_length=sequence_length, seed=seed),
        sequence_length,
        batch_size,
        range(batch_size) if rows is None else rows,
        num_batches=2**40,  # as good as endless, and a dataset has a length
    )
    dataset = grain.MapDataset.source(source)[start_step:]
    options = grain.ReadOptions(num_threads=num_threads, prefetch_buffer_size=4 * num_threads)
    return iter(dataset.to_iter_dataset(options))


def evaluation_batches(
    corpus: TokenizedCorpus,
    *,
    sequence_length: int,
    batch_size: int,
    max_batches: int = 0,
    rows: Sequence[int] | None = None,
) -> Iterator[dict[str, np.ndarray]]:
    """One pass over the corpus, always in the same shuffled order, the last batch padded.

    The first `max_batches` of it (0 is all) are a fair sample of its documents.
    """
    plan = RowPlan(corpus.pairs, sequence_length=sequence_length, seed=0)
    num_batches = -(-plan.rows_per_epoch // batch_size)
    source = _BatchSource(
        corpus,
        plan,
        sequence_length,
        batch_size,
        range(batch_size) if rows is None else rows,
        num_batches,
        num_rows=plan.rows_per_epoch,
    )
    return (source[n] for n in range(min(num_batches, max_batches or num_batches)))


def to_device(
    batch: dict[str, np.ndarray], sharding: jax.NamedSharding, rows: np.ndarray, batch_size: int
) -> dict[str, jax.Array]:
    """Global arrays of `batch_size` rows, of which this process has `rows` in `batch`.

    `rows` are those of its devices, ascending (`parallel.distributed.rows_of`).
    """

    def part_of(array: np.ndarray, index: tuple[slice, ...]) -> np.ndarray:
        wanted = range(batch_size)[index[0]]
        start = np.searchsorted(rows, wanted.start)
        return array[start : start + len(wanted)]

    with jax.transfer_guard_host_to_device("allow"):  # the one transfer that a step is to make
        return {
            name: jax.make_array_from_callback(
                (batch_size, *array.shape[1:]), sharding, functools.partial(part_of, array)
            )
            for name, array in batch.items()
        }


def feed(
    make: Callable[..., Iterator[dict[str, np.ndarray]]],
    corpus: TokenizedCorpus,
    sharding: jax.NamedSharding,
    *,
    batch_size: int,
    **how,
) -> Iterator[dict[str, jax.Array]]:
    """Global arrays of `batches` or `evaluation_batches`, of which each process reads its rows."""
    rows = distributed.rows_of(sharding.addressable_devices, sharding, batch_size)
    made = make(corpus, batch_size=batch_size, rows=rows, **how)
    return (to_device(batch, sharding, rows, batch_size) for batch in made)
