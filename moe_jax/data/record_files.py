"""ArrayRecord files as a source, and the choice of the Arrow files of a saved dataset."""

import collections
import itertools
import pathlib
from collections.abc import Iterator
from typing import NamedTuple

from array_record.python import array_record_module

from moe_jax import stopping, strict_json, untrusted
from moe_jax.data import document, policy
from moe_jax.data.document import Document
from moe_jax.data.policy import Reading, UnusableError


def array_record(
    path: pathlib.Path, reading: Reading, label: str = "all"
) -> Iterator[tuple[str, Document] | UnusableError]:
    """Yields the key and the document of each record of an ArrayRecord file, or its error.

    A record that begins with { is a JSON object, as a line of .jsonl; any other is a text. Errors
    name records by their numbers, which begin with 0. Neighbours that are damaged in the same way,
    such as all records of a chunk, are one error.
    """
    if (path.parent / "features.json").exists():
        raise ValueError(f"{path} belongs to a TFDS dataset; prepare it, and give tfds:NAME")
    if (path.parent / "manifest.json").exists():
        raise ValueError(f"{path} has tokens, no text; give prepared:{path.parent.parent}")
    for damage, found in itertools.groupby(_contents(path), lambda one: one.damage):
        if damage:
            numbers = [one.number for one in itertools.islice(found, reading.skip_damaged + 1)]
            yield _lost(path, numbers[0], len(numbers), damage)
        else:
            for one in found:
                yield _found(f"{path}: record {one.number}", one.content, reading, label)


class _Record(NamedTuple):
    number: int
    content: bytes
    damage: str = ""  # the reason why it cannot be read


def _contents(path: pathlib.Path) -> Iterator[_Record]:
    """The records of a file.

    Raises: UnusableError, if nothing from a record on can be read.
    """
    reader, number, end = None, 0, 1
    while number < end:
        try:
            if reader is None:
                reader, end = _reader(path, number)
            content = reader.read() if end else None
        except (RuntimeError, IndexError) as error:
            stopping.pass_on(error)
            # The message is empty if the file is truncated.
            words = " ".join(str(error).split()) or "it is damaged or truncated"
            if reader is None:
                raise _lost(path, number, 1, words) from error
            reader = None  # one that has failed reads nothing more
            yield _Record(number, b"", words)
        else:
            if content is not None:
                yield _Record(number, content)
        number += 1


def _lost(path: pathlib.Path, first: int, number: int, words: str) -> UnusableError:
    """The error for `number` records from `first` on, which cannot be read."""
    where = f"record {first}" if number == 1 else f"records {first} to {first + number - 1}"
    message = f"{path} cannot be read at {where} ({words}); replace it"
    return UnusableError(message, "a damaged file", number)


def _reader(path: pathlib.Path, at: int):
    """A reader whose next record is `at`, and the number of records."""
    reader = array_record_module.ArrayRecordReader(str(path), "")
    if not reader.ok():  # such a reader has 0 records
        reader.read()  # raises the reason
        raise RuntimeError
    reader.seek(at)
    return reader, reader.num_records()


def _found(
    place: str, content: bytes, reading: Reading, label: str
) -> tuple[str, Document] | UnusableError:
    try:
        policy.check_length(content, reading.max_line)
        text = content.decode("utf-8-sig")
        if text.startswith("{"):
            return document.from_json(text, reading, label)
        policy.check_length(text, reading.max_line)
        return text, Document(text, label)
    except Exception as error:  # includes RecursionError for a record nested too deeply
        return policy.refusal(place, error)


def of_saved_datasets(paths: list[pathlib.Path]) -> list[pathlib.Path]:
    """The files without those that lie in a folder of `Dataset.save_to_disk` but are not its data,
    such as the cache files of `Dataset.map`.

    Raises: ValueError, with the file, if a file of such a dataset is missing.
    """
    folders = collections.defaultdict[pathlib.Path, list[pathlib.Path]](list)
    for path in paths:
        folders[path.parent].append(path)
    kept = []
    for folder, found in folders.items():
        names = {path.name for path in found if path.suffix == ".arrow"}
        state = folder / "state.json"
        if names and state.is_file():
            names &= _data_files(state)
        kept += [path for path in found if path.suffix != ".arrow" or path.name in names]
    return kept


def _data_files(state: pathlib.Path) -> set[str]:
    """The names in a `state.json` of `Dataset.save_to_disk`."""
    facts = strict_json.read_object(state)
    if any(facts.get(name) for name in ("_indices_files", "_indices_data_files")):
        raise ValueError(f"{state}: it is a selection of rows; flatten its indices and save it")
    try:
        names = {str(entry["filename"]) for entry in facts["_data_files"]}
    except (KeyError, TypeError):
        raise ValueError(f"{state} names no data files; save the dataset again") from None
    for name in sorted(names):
        if pathlib.PurePath(name).name != name or not (state.parent / name).is_file():
            raise ValueError(f"{state} names {untrusted.label(name)}, which is not beside it")
    return names
