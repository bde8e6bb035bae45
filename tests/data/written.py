"""Contents of files of each format, some of them damaged, and what `sources` reads from them."""

import io
import json
import pathlib

import pyarrow
import pyarrow.parquet
import pytest
from array_record.python import array_record_module

from moe_jax.data import policy, prepare, sources, tokenizers

NOWHERE = pathlib.Path("not-used")
GOOD = [{"text": f"good {n} é", "language": "en"} for n in range(4)]
TEXTS = [record["text"] for record in GOOD]
MANY = [f"{n:03d} " + "".join(map(chr, range(97, 123))) for n in range(300)]


def line(record) -> bytes:
    return json.dumps(record).encode() + b"\n"


LINES_OF_MANY = b"".join(line({"text": text}) for text in MANY)


def around(bad: bytes) -> bytes:
    """Lines of JSON with a bad one in the middle."""
    return b"".join(map(line, GOOD[:2])) + bad + b"\n" + b"".join(map(line, GOOD[2:]))


def zstandard(content: bytes) -> bytes:
    return pyarrow.compress(content, "zstd", asbytes=True)


def parquet(texts=TEXTS, **options) -> bytes:
    table = texts if isinstance(texts, pyarrow.Table) else pyarrow.table({"text": texts})
    pyarrow.parquet.write_table(table, written := io.BytesIO(), write_page_checksum=True, **options)
    return written.getvalue()


def arrow(texts=TEXTS, end=True) -> bytes:
    table = pyarrow.table({"text": texts})
    with pyarrow.ipc.new_stream(written := io.BytesIO(), table.schema) as stream:
        stream.write_table(table, max_chunksize=2)
    return written.getvalue()[: None if end else -8]


def array_record(folder, records: list[bytes], options="group_size:2,uncompressed") -> bytes:
    path = folder / "written"
    writer = array_record_module.ArrayRecordWriter(str(path), options)
    for record in records:
        writer.write(record)
    writer.close()
    content = path.read_bytes()
    path.unlink()
    return content


def read(path, most=0, split="train", **fields):
    reading = policy.Reading(skip_damaged=most, **fields)
    skipped = policy.Skipped(most)
    found = sources.documents(
        str(path),
        split,
        validation_fraction=0.0,
        data_dir=NOWHERE,
        reading=reading,
        skipped=skipped,
    )
    return [document.text for document in found], dict(skipped.by_reason)


def refusal(path, **options) -> str:
    with pytest.raises(ValueError) as refused:
        read(path, **options)
    assert "\n" not in str(refused.value)
    return str(refused.value)


def open_corpus(path, cache, **reading):
    return prepare.open_corpus(
        str(path),
        "train",
        tokenizers.load("bytes"),
        validation_fraction=0.0,
        cache=cache,
        reading=policy.Reading(**reading),
    )
