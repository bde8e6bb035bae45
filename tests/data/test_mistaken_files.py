"""Files whose name says another format, and damage that looks like another mistake."""

import gzip
import lzma

import numpy as np
import pyarrow
import pytest

from tests.data.written import LINES_OF_MANY, MANY, arrow, parquet, read, refusal, zstandard

# The name of a file, its content, and the words that say what is wrong with it.
MISTAKEN = {
    "gz called text": ("a.jsonl", gzip.compress(LINES_OF_MANY), "a.jsonl is gzip; let its name"),
    "gz in gz": (
        *("a.jsonl.gz", gzip.compress(gzip.compress(LINES_OF_MANY))),
        "the content of .*a.jsonl.gz is gzip",
    ),
    "Parquet called text": ("a.jsonl", parquet(), "is Parquet; let its name end with .parquet"),
    "text called Parquet": ("a.parquet", LINES_OF_MANY, "cannot be read .*; replace it"),
    "Arrow called Parquet": ("a.parquet", b"ARROW1\0\0" + arrow(), "an Arrow file; let its name"),
    "Parquet called Arrow": ("a.arrow", parquet(), "is Parquet; let its name end with .parquet"),
    "Zstandard called xz": ("a.jsonl.xz", zstandard(LINES_OF_MANY), "is Zstandard; let its name"),
    "a pointer": ("a.jsonl", b"version https://git-lfs.github.com/spec/v1\n", "git lfs pull"),
}


@pytest.mark.parametrize("kind", MISTAKEN)
def test_a_file_of_another_format_is_called_by_its_first_bytes(kind, tmp_path):
    name, content, words = MISTAKEN[kind]
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=words):
        read(tmp_path)


@pytest.mark.parametrize("suffix", [".gz", ".xz"])
def test_what_damage_does_to_a_text_is_not_blamed_on_the_text(suffix, tmp_path):
    """A changed byte of stored text makes a bad line long before the checksum is read."""
    compress = {".gz": lambda c: gzip.compress(c, 0), ".xz": lzma.compress}
    noise = np.random.default_rng(0).permutation(range(35, 92)).tolist() * 9
    content = b"".join(b'{"text": "' + bytes(noise) + b"%d" % n + b'"}\n' for n in range(999))
    whole = compress[suffix](content)
    for at in range(100, 700, 40):
        damaged = whole[:at] + b"\xff" + whole[at + 1 :]
        (tmp_path / f"a.jsonl{suffix}").write_bytes(damaged)
        assert "cannot be read" in refusal(tmp_path), at


def test_zstandard_which_may_lack_a_checksum_is_not_trusted_about_its_text(tmp_path):
    (tmp_path / "a.jsonl.zst").write_bytes(zstandard(b'{"text": "\xff"}'))
    assert refusal(tmp_path).endswith("line 1); convert it, or replace it if it is damaged")


@pytest.mark.parametrize("codec", [None, "zstd"])
def test_an_arrow_file_is_read_as_a_stream_is(codec, tmp_path):
    table = pyarrow.table({"text": MANY})
    with pyarrow.OSFile(str(tmp_path / "a.arrow"), "wb") as file:
        how = pyarrow.ipc.IpcWriteOptions(compression=codec)
        with pyarrow.ipc.new_file(file, table.schema, options=how) as written:
            written.write_table(table, max_chunksize=70)
    assert read(tmp_path) == (MANY, {})
    content = (tmp_path / "a.arrow").read_bytes()
    (tmp_path / "a.arrow").write_bytes(content[:-30])
    assert "a.arrow cannot be read (" in refusal(tmp_path)
