"""Parquet files, and the Arrow files of Hugging Face's `datasets`, as a source.

Errors name records by their numbers, which begin with 0. This module is imported where it is used,
because pyarrow takes a third of a second to import.
"""

import contextlib
from collections.abc import Iterator
from typing import Any

import pyarrow
import pyarrow.parquet

from moe_jax import untrusted
from moe_jax.data import compressed, document, policy, stored
from moe_jax.data.document import Document
from moe_jax.data.policy import Reading, UnusableError
from moe_jax.files import is_remote

# Rows that are in memory at once: a few bytes of a Parquet file can stand for many equal texts.
ROWS = 64
BUFFER_BYTES = 1 << 20  # of a column; by default, a column of a row group is read as a whole
END_OF_STREAM = b"\xff\xff\xff\xff\0\0\0\0"
ERRORS = (pyarrow.ArrowException, OSError, MemoryError, UnicodeDecodeError)
Records = Iterator[tuple[str, Document] | UnusableError]


def parquet(path: stored.Path, reading: Reading, label: str = "all") -> Records:
    """Yields the key and the document of each row of a Parquet file, or its error.

    Row groups are streamed: a page, of about 1 MB, is decompressed as a whole. The rows of a row
    group that cannot be read are one error, with their number.
    """
    with contextlib.ExitStack() as held:
        try:
            source = held.enter_context(stored.opened(path)) if is_remote(path) else path
            opened = pyarrow.parquet.ParquetFile(
                source,
                pre_buffer=False,
                buffer_size=BUFFER_BYTES,
                page_checksum_verification=True,
            )
            file = held.enter_context(opened)
            facts = file.metadata
            columns = _columns(path, file.schema_arrow, reading, facts.num_rows)
        except ERRORS as error:
            raise _lost(path, 0, error) from error
        number = 0
        for group in range(facts.num_row_groups):
            end = number + facts.row_group(group).num_rows
            try:
                for batch in file.iter_batches(ROWS, [group], columns, use_threads=False):
                    yield from _rows(path, number, batch, reading, label)
                    number += len(batch)
            except ERRORS as error:
                yield _lost(path, number, error, end - number)
                number = end
        if number != facts.num_rows:
            raise UnusableError(
                f"{path} has {number:,} records, but {facts.num_rows:,} according to its footer; "
                "replace it",
                "a damaged file",
                abs(facts.num_rows - number),
            )


def arrow(path: stored.Path, reading: Reading, label: str = "all") -> Records:
    """Yields the key and the document of each row of an Arrow stream or file, or its error.

    `datasets` writes streams. Rows from the first damage on are lost: their number is not known,
    and they count as one.
    """
    number = 0
    try:
        with _arrow_file(path) as file:
            # A stream that is cut between two batches is otherwise read as a shorter one.
            is_file = file.read_at(6, 0) == b"ARROW1"
            is_whole = is_file or file.read_at(8, max(0, file.size() - 8)) == END_OF_STREAM
            if not is_whole and not reading.skip_damaged:
                raise OSError("it does not end as an Arrow stream does")
            file.seek(0)
            opened = pyarrow.ipc.open_file if is_file else pyarrow.ipc.open_stream
            with opened(file) as stream:
                columns = _columns(path, stream.schema, reading)
                numbers = range(stream.num_record_batches) if is_file else ()
                for batch in map(stream.get_batch, numbers) if is_file else stream:
                    yield from _rows(path, number, batch.select(columns), reading, label)
                    number += len(batch)
            if not is_whole:
                raise OSError("it does not end as an Arrow stream does")
    except ERRORS as error:
        raise _lost(path, number, error) from error


@contextlib.contextmanager
def _arrow_file(path: stored.Path):
    if is_remote(path):
        with stored.opened(path) as content, pyarrow.PythonFile(content, mode="r") as file:
            yield file
    else:
        with pyarrow.memory_map(str(path)) as file:
            yield file


def _columns(path: stored.Path, schema, reading: Reading, rows: int = 1) -> list[str]:
    """Those of the fields that the file has."""
    field, columns = reading.text_field, reading.columns
    is_preference = field not in schema.names and policy.is_preference(schema.names)
    columns |= set(policy.PREFERENCE) if is_preference else set()
    if reading.conversations or is_preference:
        return [name for name in schema.names if name in columns]
    inside = field not in schema.names and "." in field
    name = field.partition(".")[0] if inside else field
    if schema.names.count(name) != 1:
        names = untrusted.label(", ".join(schema.names))
        number = schema.names.count(name)
        raise UnusableError(
            f'{path} has {f"{number} columns" if number else "no column"} "{name}" among {names}; '
            + ("keep one of them" if number else policy.fix_of_text(schema.names)),
            "a file without a text column",
            rows,
        )
    kind = schema.field(name).type
    if not inside and kind not in (pyarrow.string(), pyarrow.large_string()):
        raise UnusableError(
            f'{path}: "{name}" is {untrusted.label(str(kind))}, not string; convert it',
            "a file without a text column",
            rows,
        )
    return [name for name in schema.names if name in columns]


def _rows(path: stored.Path, first: int, batch, reading: Reading, label: str) -> Records:
    damage = _damage(batch)
    for row in range(len(batch)):
        try:
            if damage and (problem := _damage(batch.slice(row, 1))):
                raise UnusableError(f" is damaged ({problem})", "a damaged record")
            columns = zip(batch.schema.names, batch.columns, strict=True)
            record = {name: _value(name, column[row]) for name, column in columns}
            yield document.from_record(record, reading, label)
        except Exception as error:  # a value can be of any type
            yield policy.refusal(f"{path}: record {first + row}", error)


def _value(name: str, scalar: pyarrow.Scalar) -> Any:
    try:
        return scalar.as_py()
    except (ValueError, OverflowError):  # such as a time after the year 9999
        problem = f': "{name}" has a {scalar.type} that Python cannot hold; store it as a string'
        raise UnusableError(problem, "a value that cannot be held") from None


def _lost(path: stored.Path, number: int, error: Exception, records: int = 1) -> UnusableError:
    """The error for `records` records from `number` on, which cannot be read."""
    if not number and (found := compressed.format_of(path)):
        return UnusableError(f"{path} is {found}", "a file of another format", records)
    after = f" after record {number - 1}" if number else ""
    reason = " ".join(str(error).split())
    return UnusableError(
        f"{path} cannot be read{after} ({reason}); replace it", "a damaged file", records
    )


def _damage(batch) -> str:
    """The reason why a value is not UTF-8 or lies outside of the file, if one does."""
    try:
        batch.validate(full=True)
    except pyarrow.ArrowInvalid as error:
        return " ".join(str(error).split())
    return ""
