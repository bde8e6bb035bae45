"""Files of records as a source: Parquet, the Arrow files of Hugging Face's datasets, ArrayRecord.

Their readers yield (key, document) for each record. Errors name records by their numbers, which
begin with 0.
"""

import collections
import pathlib
from collections.abc import Iterator

from array_record.python import array_record_module

from moe_jax import stopping, strict_json, untrusted
from moe_jax.data import document
from moe_jax.data.document import Document

# Rows that are in memory at once: a few bytes of a Parquet file can stand for many equal texts.
ROWS = 64
BUFFER_BYTES = 1 << 20  # of a column's compressed pages
END_OF_STREAM = b"\xff\xff\xff\xff\0\0\0\0"


def parquet(path: pathlib.Path, max_line: int) -> Iterator[tuple[str, Document]]:
    """The rows of a Parquet file, whose row groups are streamed."""
    import pyarrow.parquet  # this takes a third of a second, and other files do not need it

    def batches():
        options = {"buffer_size": BUFFER_BYTES, "page_checksum_verification": True}
        with pyarrow.parquet.ParquetFile(path, **options) as file:
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
    """The rows of an Arrow stream, as `datasets` writes them."""
    import pyarrow

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
    import pyarrow

    if schema.names.count("text") != 1:
        names = untrusted.label(", ".join(schema.names))
        raise ValueError(f'{path} has no single column "text" among {names}; rename the column')
    kind = schema.field("text").type
    if not any(getattr(pyarrow.types, f"is_{t}")(kind) for t in ("string", "large_string")):
        raise ValueError(f'{path}: "text" is {untrusted.label(str(kind))}, not string; convert it')
    return [name for name in document.FIELDS if schema.names.count(name) == 1]


def _rows(path: pathlib.Path, batches, max_line: int) -> Iterator[tuple[str, Document]]:
    import pyarrow

    number = 0
    try:
        for batch in batches:
            is_valid = _is_valid(batch)  # whether texts are UTF-8 and lie within the file
            for row in range(len(batch)):
                place = f"{path}: record {number}"
                with document.refusing(place):
                    if not (is_valid or _is_valid(batch.slice(row, 1))):
                        raise ValueError(" is not UTF-8")
                    columns = zip(batch.schema.names, batch.columns, strict=True)
                    key, found = document.from_record({n: c[row].as_py() for n, c in columns})
                document.check_length(place, found.text, max_line)
                yield key, found
                number += 1
    except (pyarrow.ArrowException, OSError, MemoryError) as error:
        after = f" after record {number - 1}" if number else ""
        reason = " ".join(str(error).split())
        raise ValueError(f"{path} cannot be read{after} ({reason}); replace it") from error


def _is_valid(batch) -> bool:
    import pyarrow

    try:
        batch.validate(full=True)
    except pyarrow.ArrowInvalid:
        return False
    return True


def array_record(path: pathlib.Path, max_line: int) -> Iterator[tuple[str, Document]]:
    """The records of an ArrayRecord file.

    A record that begins with { is a JSON object, as a line of .jsonl; any other is a text.
    """
    if (path.parent / "features.json").exists():
        raise ValueError(f"{path} belongs to a TFDS dataset; prepare it, and give tfds:NAME")
    number = 0
    reader = array_record_module.ArrayRecordReader(str(path), "")
    try:
        if not reader.ok():  # such a reader has 0 records; reading one raises what is wrong
            reader.read()
        for number in range(reader.num_records()):
            content = reader.read()
            place = f"{path}: record {number}"
            with document.refusing(place):
                text = content.decode()
                is_json = text.startswith("{")
                found = document.from_json(text) if is_json else (text, Document(text, "all"))
            document.check_length(place, text, max_line)
            yield found
    except (RuntimeError, IndexError) as error:  # with an empty message if the file is truncated
        stopping.pass_on(error)
        reason = " ".join(str(error).split()) or "it is damaged or truncated"
        raise ValueError(
            f"{path} cannot be read at record {number} ({reason}); replace it"
        ) from error
    finally:
        reader.close()


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
