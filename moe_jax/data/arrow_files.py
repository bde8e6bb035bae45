"""Parquet files, and the Arrow files of Hugging Face's `datasets`, as a source.

Errors name records by their numbers, which begin with 0. This module is imported where it is used,
because pyarrow takes a third of a second to import.
"""

import pathlib
from collections.abc import Iterator

import pyarrow
import pyarrow.parquet

from moe_jax import untrusted
from moe_jax.data import document
from moe_jax.data.document import Document

# Rows that are in memory at once: a few bytes of a Parquet file can stand for many equal texts.
ROWS = 64
BUFFER_BYTES = 1 << 20  # of a column; by default, a column of a row group is read as a whole
END_OF_STREAM = b"\xff\xff\xff\xff\0\0\0\0"


def parquet(path: pathlib.Path, max_line: int) -> Iterator[tuple[str, Document]]:
    """Yields (key, document) for each row of a Parquet file, whose row groups are streamed.

    A page, of about 1 MB, is decompressed as a whole.
    """

    def batches():
        with pyarrow.parquet.ParquetFile(
            path, pre_buffer=False, buffer_size=BUFFER_BYTES, page_checksum_verification=True
        ) as file:
            columns, rows = _columns(path, file.schema_arrow), 0
            for batch in file.iter_batches(ROWS, columns=columns, use_threads=False):
                rows += len(batch)
                yield batch
            if rows != file.metadata.num_rows:
                raise ValueError(
                    f"{path} has {rows:,} records, but {file.metadata.num_rows:,} according to its "
                    "footer; replace it"
                )

    return _rows(path, batches(), max_line)


def arrow(path: pathlib.Path, max_line: int) -> Iterator[tuple[str, Document]]:
    """Yields (key, document) for each row of an Arrow stream, as `datasets` writes them."""

    def batches():
        with pyarrow.memory_map(str(path)) as file:
            # A stream that is cut between two batches is otherwise read as a shorter one.
            if file.read_at(8, max(0, file.size() - 8)) != END_OF_STREAM:
                raise OSError("it does not end as an Arrow stream does")
            with pyarrow.ipc.open_stream(file) as stream:
                columns = _columns(path, stream.schema)
                for batch in stream:
                    yield batch.select(columns)

    return _rows(path, batches(), max_line)


def _columns(path: pathlib.Path, schema) -> list[str]:
    """Those of the fields that the file has."""
    if schema.names.count("text") != 1:
        names = untrusted.label(", ".join(schema.names))
        raise ValueError(f'{path} has no single column "text" among {names}; rename the column')
    if (kind := schema.field("text").type) not in (pyarrow.string(), pyarrow.large_string()):
        raise ValueError(f'{path}: "text" is {untrusted.label(str(kind))}, not string; convert it')
    return [name for name in document.FIELDS if schema.names.count(name) == 1]


def _rows(path: pathlib.Path, batches, max_line: int) -> Iterator[tuple[str, Document]]:
    number = 0
    try:
        for batch in batches:
            damage = _damage(batch)
            for row in range(len(batch)):
                place = f"{path}: record {number}"
                try:
                    if damage and (problem := _damage(batch.slice(row, 1))):
                        raise ValueError(f" is damaged ({problem})")
                    columns = zip(batch.schema.names, batch.columns, strict=True)
                    key, found = document.from_record({n: c[row].as_py() for n, c in columns})
                except Exception as error:  # a value can be of any type
                    raise document.refusal(place, error) from None
                document.check_length(place, found.text, max_line)
                yield key, found
                number += 1
    except (pyarrow.ArrowException, OSError, MemoryError, UnicodeDecodeError) as error:
        after = f" after record {number - 1}" if number else ""
        reason = " ".join(str(error).split())
        raise ValueError(f"{path} cannot be read{after} ({reason}); replace it") from error


def _damage(batch) -> str:
    """The reason why a value is not UTF-8 or lies outside of the file, if one does."""
    try:
        batch.validate(full=True)
    except pyarrow.ArrowInvalid as error:
        return " ".join(str(error).split())
    return ""
