"""Tokenizes a split into a prepared corpus, with any number of processes, and goes on if killed.

The documents are cut, in their order, into units by size, and a unit becomes a shard, whichever
process makes it. A finished shard is not made again.
"""

import collections
import contextlib
import dataclasses
import functools
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
from moe_jax.data import duplicates, filters, shards
from moe_jax.data.document import Document
from moe_jax.data.tokenizers import Tokenizer

SHARD_BYTES = 64 << 20  # of text; a worker holds a few times as many
QUARANTINE = "quarantine.jsonl"


@dataclasses.dataclass(frozen=True)
class Job:
    """What a worker must know to turn documents into a shard."""

    tokenizer: Tokenizer
    specs: tuple[str, ...] = ()  # of filters
    most_bad: int = 0  # records that may be set aside because they cannot be used
    shard_bytes: int = SHARD_BYTES

    @property
    def chosen(self) -> filters.Chosen:
        return filters.choose(self.specs)

    def write(self, unit: "Unit") -> shards.Facts:
        return shards.write(
            *(unit.path, unit.documents, self.tokenizer, self.chosen),
            dropped=unit.dropped,
            most_bad=self.most_bad,
        )

    def keys(self, documents: Sequence[Document]) -> list[list[tuple[str, list[bytes]]]]:
        """For each document, the keys by which duplicates are found; none if it is dropped."""
        chosen = self.chosen
        return [[] if chosen.fault_of_text(d) else chosen.keys(d) for d in documents]


@dataclasses.dataclass(frozen=True)
class Unit:
    """Neighbouring documents of a part of the source."""

    path: pathlib.Path  # of the shard, without an ending
    first: int  # the number of the first document in the split
    documents: list[Document]
    dropped: Mapping[str, int] = dataclasses.field(default_factory=dict)  # by reason

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


def units(
    folder: pathlib.Path, parts: Iterable[Iterable[Document]], shard_bytes: int
) -> Iterator[Unit]:
    """The units of a source's parts; no unit has documents of two parts."""
    first = 0
    for part, documents in enumerate(parts):
        for number, found in enumerate(shards.batches(documents, shard_bytes)):
            yield Unit(folder / shards.NAME.format(part, number), first, found)
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
    unread: Sequence[tuple[str, str]] = (),
) -> shards.Facts:
    """Writes the prepared corpus of a split into `folder`, which may have some of its shards.

    Args:
      parts: the parts of the source, each with its documents.
      name: begins the line of progress, and of errors.
      made_of: goes into the manifest; among it "tokenizer", the fingerprint.
      seen: the documents of the splits of lower `rank`, if a filter compares documents.
      unread: the records, [place, reason], that reading `parts` adds to this list.

    Returns: the facts; nothing is written if all documents are dropped.
    Raises: ValueError if there are more than `job.most_bad` records that cannot be used.
    """
    folder.mkdir(parents=True, exist_ok=True)
    bad: list[Sequence[str]] = []
    bar = tqdm.tqdm(desc=f"tokenizing {name}", unit="B", unit_scale=True, disable=None)
    try:
        with bar:
            found = units(folder, parts, pool.job.shard_bytes)
            if pool.job.chosen.compares and seen is not None:
                found = _new(found, pool, seen, rank << 48)
            for unit, facts in pool.in_order((unit, _written(unit, pool)) for unit in found):
                bar.update(unit.num_bytes)
                bad += facts.bad
                if len(bad) + len(unread) > pool.job.most_bad:
                    raise ValueError(" ".join([*unread, *bad][-1]))
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from error
    finally:
        _quarantine(folder, [*unread, *bad])
    return shards.finish(folder, made_of, unread)


def _new(found: Iterator[Unit], pool: Pool, seen: duplicates.Seen, base: int) -> Iterator[Unit]:
    """The units without the documents that have an equal among the documents before them."""
    asked = (
        (unit, (lambda: None) if shards.read(unit.path) else pool.start(Job.keys, unit.documents))
        for unit in found
    )
    for unit, keys in pool.in_order(asked):
        if keys is None:
            yield unit  # it was written after its keys were noted
            continue
        kept, dropped = [], collections.Counter[str]()
        for number, (document, own) in enumerate(zip(unit.documents, keys, strict=True)):
            at = base + unit.first + number
            fault = next((name for name, k in own if not seen.is_new(at, name, k)), None)
            if fault:
                dropped[fault] += 1
            else:
                kept.append(document)
        seen.commit()
        yield dataclasses.replace(unit, documents=kept, dropped=dropped)


def _written(unit: Unit, pool: Pool) -> Callable[[], shards.Facts]:
    if facts := shards.read(unit.path):
        return lambda: facts
    return pool.start(Job.write, unit)


def _quarantine(folder: pathlib.Path, bad: Sequence[Sequence[str]]) -> None:
    """Writes the records that could not be used, one a line."""
    if bad:
        lines = (strict_json.text({"place": place, "reason": reason}) for place, reason in bad)
        files.write_text(folder / QUARANTINE, "".join(f"{line}\n" for line in lines))
