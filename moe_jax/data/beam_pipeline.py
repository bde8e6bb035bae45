"""The shards of a prepared folder, written by an Apache Beam pipeline on any of its runners.

An element of the pipeline is a part of the source: the worker that gets it reads the part's files
and writes its shards, so no text goes through the runner. The shards are those that
`preparation.prepare` writes. Source and output must be on a file system that all workers share.

This module is imported where it is used, because apache-beam is optional.
"""

import functools
import pathlib
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import apache_beam as beam
from apache_beam.options import pipeline_options

from moe_jax.data import preparation, shards
from moe_jax.data.preparation import Job, Text

Place = tuple[int, int, int]  # of a document: its split's rank, its part, its number in the part


def write_shards(
    text: Text, output: pathlib.Path, job: Job, splits: Sequence[str], options: Sequence[str]
) -> None:
    """Writes the shards of the splits that are not finished.

    Args:
      splits: in their order: a document that equals one of an earlier split is a duplicate.
      options: Beam's, such as "--runner=FlinkRunner".

    Raises: ValueError if a filter must see documents in order.
    """
    for name in job.chosen.in_order:
        raise ValueError(f"--filter={name} needs one machine: leave out --runner")
    parts = [(rank, part) for rank in range(len(splits)) for part in range(len(text.parts))]
    how: dict[str, Any] = dict(text=text, output=str(output), job=job, splits=tuple(splits))
    with beam.Pipeline(options=pipeline_options.PipelineOptions(list(options))) as pipeline:
        # Reshuffle, or the runner might fuse all parts into one piece of work.
        made = pipeline | beam.Create(parts) | beam.Reshuffle()
        if job.chosen.compares:
            dropped = (
                made
                | "keys" >> beam.FlatMap(functools.partial(_keys, **how))
                | "equal" >> beam.GroupByKey()
                | "later" >> beam.FlatMapTuple(_later)
                | "by part" >> beam.GroupByKey()
            )
            made = (
                (made | beam.Map(lambda part: (part, None)), dropped)
                | beam.CoGroupByKey()
                | beam.MapTuple(lambda part, found: (part, sorted(sum(found[1], []))))
            )
        else:
            made = made | beam.Map(lambda part: (part, []))
        made | "write" >> beam.MapTuple(functools.partial(_write, **how))


def _units(
    place: tuple[int, int], text: Text, output: str, job: Job, splits: Sequence[str]
) -> Iterator[preparation.Unit]:
    rank, part = place
    folder = pathlib.Path(output) / splits[rank]
    documents = text.part(splits[rank], part)
    return preparation.units_of_part(folder, part, documents, job.shard_bytes)


def _keys(place: tuple[int, int], **how) -> Iterator[tuple[bytes, Place]]:
    """The keys of the documents of a part that pass the filters of text."""
    for unit in _units(place, **how):
        for number, own in enumerate(how["job"].keys(unit.documents), start=unit.first):
            for name, keys in own:
                yield from ((name.encode() + b":" + key, (*place, number)) for key in keys)


def _later(key: bytes, places: Iterable[Place]) -> Iterator[tuple[tuple[int, int], tuple]]:
    """All but the first of the documents with a key, by part, with the filter that drops them."""
    for rank, part, number in sorted(places)[1:]:
        yield (rank, part), (number, key.partition(b":")[0].decode())


def _write(place: tuple[int, int], dropped: Sequence[tuple[int, str]], **how) -> None:
    reasons = dict(dropped)
    for unit in _units(place, **how):
        if shards.read(unit.path) is None:
            unit.path.parent.mkdir(parents=True, exist_ok=True)
            how["job"].write(unit.without(reasons))
