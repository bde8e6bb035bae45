"""Tokenizes a split into a prepared corpus, with any number of processes, and goes on if killed.

The documents are cut, in their order, into units by size, and a unit becomes a shard, whichever
process makes it. A finished shard is not made again.
"""

import collections
import contextlib
import dataclasses
import functools
import itertools
import multiprocessing
import os
import pathlib
import signal
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent import futures
from typing import Any

import tqdm

from moe_jax import files, stopping, strict_json
from moe_jax.data import chat, duplicates, filters, shards, sources
from moe_jax.data.cache import DATASETS
from moe_jax.data.document import Document
from moe_jax.data.policy import STRICT, Reading, Skipped
from moe_jax.data.tokenizers import Tokenizer

SHARD_BYTES = 64 << 20  # of text; a worker holds a few times as many
QUARANTINE = "quarantine.jsonl"


@dataclasses.dataclass(frozen=True)
class Text:
    """A source, and how it is divided."""

    source: str
    validation_fraction: float
    cache: pathlib.Path
    reading: Reading = STRICT

    @functools.cached_property
    def parts(self) -> list[Any]:
        """The values of `part` for `sources.documents`; to find them, all files are looked at."""
        return sources.parts(self.source)

    def part(self, split: str, number: int, skipped: Skipped | None = None) -> Iterator[Document]:
        return sources.documents(
            *(self.source, split),
            validation_fraction=self.validation_fraction,
            data_dir=self.cache / DATASETS,
            reading=self.reading,
            skipped=skipped,
            part=self.parts[number],
        )


@dataclasses.dataclass(frozen=True)
class Job:
    """All that a worker needs to turn documents into a shard."""

    tokenizer: Tokenizer
    specs: tuple[str, ...] = ()  # of filters
    skip_damaged: int = 0  # the most records that may be skipped because they cannot be used
    shard_bytes: int = SHARD_BYTES
    form: chat.Form | None = None  # how conversations become tokens; None for text

    @property
    def chosen(self) -> filters.Chosen:
        return filters.choose(self.specs)

    def write(self, unit: "Unit") -> shards.Facts:
        return shards.write(
            *(unit.path, unit.documents, self.tokenizer, self.chosen),
            form=self.form,
            dropped=unit.dropped,
            skip_damaged=self.skip_damaged,
        )

    def keys(self, documents: Sequence[Document]) -> list[list[tuple[str, list[bytes]]]]:
        """For each document, the keys by which duplicates are found; none if it is dropped."""
        chosen = self.chosen
        return [[] if chosen.fault_of_text(d) else chosen.keys(d) for d in documents]


@dataclasses.dataclass(frozen=True)
class Unit:
    """Neighbouring documents of a part of the source."""

    path: pathlib.Path  # of the shard, without an ending
    part: int
    first: int  # the number of the first document in the part
    documents: list[Document]
    dropped: Mapping[str, int] = dataclasses.field(default_factory=dict)  # by reason

    def without(self, reasons: Mapping[int, str]) -> "Unit":
        """The unit without documents that are dropped, by their number in the part."""
        numbered = list(enumerate(self.documents, start=self.first))
        kept = [document for number, document in numbered if number not in reasons]
        dropped = collections.Counter(reasons[n] for n, _ in numbered if n in reasons)
        return dataclasses.replace(self, documents=kept, dropped=dropped)

    @property
    def num_bytes(self) -> int:
        return sum(len(document.text.encode()) for document in self.documents)


@dataclasses.dataclass(frozen=True)
class Pool:
    """Processes that do a job. `start(method, *arguments)` starts a method of the job; calling what
    it returns waits for the result."""

    job: Job
    workers: int
    start: Callable[..., Callable[[], Any]]

    def in_order(self, started: Iterable[tuple[Unit, Callable[[], Any]]]) -> Iterator[tuple]:
        """Each unit with its result, while the workers are busy with those that follow."""
        waiting = collections.deque[tuple[Unit, Callable[[], Any]]]()
        for pair in started:
            waiting.append(pair)
            if len(waiting) > (self.workers if self.workers > 1 else 0):
                unit, result = waiting.popleft()
                yield unit, result()
        for unit, result in waiting:
            yield unit, result()


@contextlib.contextmanager
def pool_of(job: Job, workers: int = 1) -> Iterator[Pool]:
    """A pool of processes, which end with the block, or if this process is killed; one worker is
    this process itself."""
    if workers == 1:
        yield Pool(job, 1, lambda method, *arguments: functools.partial(method, job, *arguments))
        return
    context = multiprocessing.get_context("spawn")
    watched, held = context.Pipe(duplex=False)  # closed when this process ends
    with futures.ProcessPoolExecutor(workers, context, _begin, (job, watched)) as pool:
        try:
            yield Pool(job, workers, lambda *what: pool.submit(_do, *what).result)
        except BaseException:
            stopping.quiet()  # or its repetitions would interrupt the end of the workers
            held.close()
            raise
        finally:
            pool.shutdown(cancel_futures=True)


_jobs: list[Job] = []  # of a worker, which gets it once, not with each unit


def _begin(job: Job, watched) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the first process ends the others
    _jobs.append(job)

    def watch():
        with contextlib.suppress(EOFError, OSError):
            watched.recv_bytes()
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def _do(method: Callable, *arguments):
    return method(_jobs[0], *arguments)


def units_of_part(
    folder: pathlib.Path, part: int, documents: Iterable[Document], shard_bytes: int
) -> Iterator[Unit]:
    """The units of a part of the source."""
    first = 0
    for number, found in enumerate(shards.batches(documents, shard_bytes)):
        yield Unit(folder / shards.NAME.format(part, number), part, first, found)
        first += len(found)


def prepare(
    folder: pathlib.Path,
    parts: Iterable[Iterable[Document]],
    pool: Pool,
    *,
    name: str,
    made_of: dict[str, Any],
    seen: duplicates.Seen | None = None,
    rank: int = 0,
    skipped: Skipped | None = None,
) -> shards.Facts:
    """Writes the prepared corpus of a split into `folder`, which may have some of its shards.

    Args:
      parts: the parts of the source, each with its documents.
      name: begins the line of progress, and of errors about a document's tokens.
      made_of: goes into the manifest; among it "tokenizer", the fingerprint.
      seen: the documents of the splits of lower `rank`, if a filter compares documents.
      skipped: counts the records that reading `parts` skips.

    Returns: the facts; nothing is written if all documents are dropped.
    Raises: ValueError if there are more than `job.skip_damaged` records that cannot be used.
    """
    folder.mkdir(parents=True, exist_ok=True)
    skipped, most = skipped or Skipped(0), pool.job.skip_damaged
    units: Iterator[Unit] = itertools.chain.from_iterable(
        units_of_part(folder, part, documents, pool.job.shard_bytes)
        for part, documents in enumerate(parts)
    )
    if pool.job.chosen.compares and seen is not None:
        units = _new(units, pool, seen, rank)
    bar = tqdm.tqdm(desc=f"tokenizing {name}", unit="B", unit_scale=True, disable=None)
    try:
        with bar:
            bad = 0
            for unit, facts in pool.in_order((unit, _written(unit, pool)) for unit in units):
                bar.update(unit.num_bytes)
                bad += len(facts.bad)
                if bad + skipped.by_reason.total() > most:
                    break
        _check_bad(folder, most, skipped)
    except ValueError as error:
        if str(error).startswith("data.source"):  # it names the file and the record
            raise
        raise ValueError(f"{name}: {error}") from error
    return shards.finish(folder, made_of, skipped.by_reason)


def _new(found: Iterator[Unit], pool: Pool, seen: duplicates.Seen, rank: int) -> Iterator[Unit]:
    """The units without the documents that have an equal one among those before."""
    asked = (
        (unit, (lambda: None) if shards.read(unit.path) else pool.start(Job.keys, unit.documents))
        for unit in found
    )
    for unit, keys in pool.in_order(asked):
        if keys is None:
            yield unit  # it was written after its keys were noted
            continue
        reasons = {}
        for number, own in enumerate(keys, start=unit.first):
            at = (((rank << 22) + unit.part) << 38) + number  # in the order of all documents
            if fault := next((name for name, k in own if not seen.is_new(at, name, k)), None):
                reasons[number] = fault
        seen.commit()
        yield unit.without(reasons)


def _written(unit: Unit, pool: Pool) -> Callable[[], shards.Facts]:
    if facts := shards.read(unit.path):
        return lambda: facts
    return pool.start(Job.write, unit)


def _check_bad(folder: pathlib.Path, most: int, skipped: Skipped) -> None:
    """Writes the records that cannot be used, one a line; raises if there are more than `most`."""
    found = (shards.read(path.with_suffix("")) for path in shards.finished(folder))
    bad = [pair for facts in found if facts for pair in facts.bad]
    if bad or skipped.errors:
        pairs = [*skipped.errors, *bad]
        lines = (strict_json.text({"record": record, "reason": reason}) for record, reason in pairs)
        files.write_text(folder / QUARANTINE, "".join(f"{line}\n" for line in lines))
    if len(bad) + skipped.by_reason.total() > most:
        record, reason = bad[-1]
        raise ValueError(f"{record} {reason}")
