"""The table of text sources; `data.source` chooses a row."""

import dataclasses
import functools
import pathlib
from collections.abc import Callable, Iterator
from typing import Any

from moe_jax.data import hub, prepared, text_files, tfds_source
from moe_jax.data.corpus import TokenizedCorpus
from moe_jax.data.document import Document
from moe_jax.data.policy import STRICT, Reading, Skipped


@dataclasses.dataclass(frozen=True)
class Source:
    """One kind of `data.source`; its fields implement this module's functions of the same names.

    Each gets the whole value of `data.source`, the *spec*; `matches` is True if this kind can read
    the spec.
    """

    matches: Callable[[str], bool]
    check: Callable[[str], object]
    fingerprint: Callable[[str, pathlib.Path], str]
    documents: Callable[..., Iterator[Document]]
    describe: Callable[[str, pathlib.Path], str] = lambda spec, data_dir: f"data.source={spec!r}"
    has_records: bool = False  # `documents` takes `reading` and `skipped`
    # The source in parts that can be read alone: values of `part`, which `documents` takes.
    parts: Callable[[str], list[Any]] = lambda spec: []
    load: Callable[[str, str, str], TokenizedCorpus | None] = lambda spec, split, tokenizer: None


def _of_files(
    matches: Callable[[str], bool],
    check: Callable[[str], object],
    find: Callable[[str], list[text_files.File]],
) -> Source:
    """A source that consists of the files that `find` finds."""

    def documents(spec, split, *, data_dir, part=None, **options):
        del data_dir  # not needed: the files are read where they are
        return text_files.documents(part or find(spec), split, **options)

    return Source(
        matches=matches,
        check=check,
        fingerprint=lambda spec, data_dir: text_files.fingerprint(find(spec), data_dir),
        documents=documents,
        describe=lambda spec, data_dir: text_files.describe(spec, find(spec)),
        has_records=True,
        parts=lambda spec: text_files.parts(find(spec)),
    )


_tfds = functools.partial(
    Source,
    check=tfds_source.check,
    fingerprint=tfds_source.fingerprint,
    documents=tfds_source.documents,
    describe=tfds_source.describe,
    has_records=True,
)
# The last row that matches reads the spec, so files, which match every spec, come first.
SOURCES = {
    "files": _of_files(lambda spec: True, text_files.find, text_files.find),
    "hub": _of_files(lambda spec: spec.startswith(hub.PREFIX), hub.check, hub.find),
    "tfds": _tfds(lambda spec: spec.startswith(tfds_source.PREFIX)),
    "embedded": _tfds(lambda spec: spec == "embedded"),
    "instructions": _tfds(
        lambda spec: spec == tfds_source.INSTRUCTIONS, documents=tfds_source.instructions
    ),
    "prepared": Source(
        matches=lambda spec: spec.startswith(prepared.PREFIX),
        check=prepared.check,
        fingerprint=lambda spec, data_dir: prepared.fingerprint(spec),
        documents=lambda spec, split, **options: prepared.documents(spec),
        describe=lambda spec, data_dir: prepared.describe(spec),
        load=prepared.load,
    ),
}


def check(spec: str) -> None:
    """Raises ValueError, in one line, for a source that cannot be read; it does not read text."""
    if not spec:
        raise ValueError("data.source is not set; give a file, folder or glob of your own text")
    _source(spec).check(spec)


def fingerprint(spec: str, data_dir: pathlib.Path) -> str:
    """A hash of the source's contents: equal text has equal fingerprints, wherever it is stored."""
    return _source(spec).fingerprint(spec, data_dir)


def describe(spec: str, data_dir: pathlib.Path) -> str:
    """A line that describes what the source matches, shown to the user before training."""
    return _source(spec).describe(spec, data_dir)


def load(spec: str, split: str, tokenizer: str) -> TokenizedCorpus | None:
    """The token records of a split, if the source has been tokenized; None if it is text.

    Raises: ValueError if they were not made by the tokenizer with the fingerprint `tokenizer`.
    """
    return _source(spec).load(spec, split, tokenizer)


def parts(spec: str) -> list[Any]:
    """The parts of a source that can be read alone, in order: values of `part` for `documents`."""
    return _source(spec).parts(spec) or [None]


def documents(
    spec: str,
    split: str,
    *,
    validation_fraction: float,
    data_dir: pathlib.Path,
    reading: Reading = STRICT,
    skipped: Skipped | None = None,
    part: Any = None,
) -> Iterator[Document]:
    """The documents of a split.

    Args:
      spec: "embedded", "instructions" (the same as conversations), "tfds:NAME" with NAME a builder
        of `data/corpora` or a dataset prepared as ArrayRecord under `data_dir`,
        "hf:NAME[/CONFIG]", which the library `datasets` loads, or a file, folder or glob, of the
        formats of `text_files.READERS`.
      split: "train", "validation" or "test"; a TFDS dataset must have splits with these names.
        Files of a folder or glob whose names say validation or test are never trained on.
      validation_fraction: the fraction held out from a source without splits of its own.
      reading: the fields that are read, and how many records may be skipped.
      skipped: counts them, by reason; by default, the count is lost.
      part: one of `parts`; None is the whole source.

    Raises: ValueError, with file and line or record, for a record that cannot be used, or for the
      first one beyond `reading.skip_damaged`.
    """
    source = _source(spec)
    options: dict = {"validation_fraction": validation_fraction, "data_dir": data_dir}
    if source.has_records:
        options |= {"reading": reading, "skipped": skipped or Skipped(reading.skip_damaged)}
    options |= {} if part is None else {"part": part}
    return source.documents(spec, split, **options)


def texts(option: str, spec: str, split: str, **how: Any) -> Iterator[Document]:
    """`documents` of strict reading, for a command whose `option` gives the source and that has no
    config: an error whose fix is a key of a config names what works there instead."""
    try:
        yield from documents(spec, split, **how)
    except ValueError as error:
        problem, _, key = str(error).partition("; set config.data.")
        if not key:
            raise
        problem = problem.removeprefix("data.source: ")
        raise ValueError(
            f'{option}: {problem}; write the text of each record as its "text"'
        ) from error


def _source(spec: str) -> Source:
    return next(source for source in reversed(SOURCES.values()) if source.matches(spec))
