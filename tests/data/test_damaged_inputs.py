"""Damaged content: refused in one line, or skipped and counted with the rest intact."""

import gzip
import io
import json
import lzma
import struct
import time

import pyarrow
import pytest

from moe_jax import config as configs
from moe_jax.config.data import Data
from moe_jax.data import policy, sources
from tests.data.test_formats import peak_bytes
from tests.data.written import (
    GOOD,
    LINES_OF_MANY,
    MANY,
    NOWHERE,
    TEXTS,
    around,
    array_record,
    arrow,
    line,
    open_corpus,
    parquet,
    read,
    refusal,
    zstandard,
)

# A bad line in JSON Lines, the words of its refusal, and the reason under which it is counted.
NO_OBJECT, NO_STRING = "not a JSON object", '"text" is not a string'
LINES = {
    "not UTF-8": (b'{"text": "\xff"}', r"is not UTF-8 \(invalid start byte, line 3\)", "not UTF-8"),
    "not UTF-8 in another field": (b'{"text": "a", "url": "\xe4"}', "not UTF-8", "not UTF-8"),
    "surrogates in UTF-8": (b'{"text": "\xed\xa0\x80"}', "not UTF-8", "not UTF-8"),
    "half a surrogate pair": (b'{"text": "\\ud83d"}', *["half a surrogate pair"] * 2),
    "deep": (b'{"a": ' + b"[" * 100_000, "RecursionError", "RecursionError"),
    "two values": (b'{"text": "a", "text": "b"}', "two values", "a name with two values"),
    "another name": (
        *(
            b'{"content": "a", "b": 1}',
            r'no "text" \(its fields: content, b\); set config.data.text_',
        ),
        "no text",
    ),
    "another case": (b'{"Text": "a"}', r'no "text" \(its fields: Text\); set', "no text"),
    "no name": (b"{}", r'no "text" \(its fields: none\); set', "no text"),
    "an integer of 5000 digits": (
        *(b'{"text": "a", "id": ' + b"9" * 5000 + b"}", "whole number of more than 4,300 digits"),
        "a number that is too long",
    ),
    "an array": (b'["text"]', r"jq -c '\.\[\]'", NO_OBJECT),
    "a label that is a list": (
        *(b'{"text": "a", "language": ["en"]}', "data.label_field", "a label that is no string"),
    ),
    "a label that is a text": (
        *(b'{"text": "a", "language": "' + b"x" * 201 + b'"}', "201 characters, more than the 200"),
        "a label that is too long",
    ),
    "too long": (b'{"text": "' + b"a" * 200_000 + b'"}', "data.max_line", "too long"),
}
SYNTAX = {  # the decoder's words, which are Python's
    "cut": r"Unterminated string starting, column 10",
    "two objects": r"Extra data, column 14",
    "single quotes": "Expecting property name enclosed in double quotes, column 2",
    "a NUL in a string": "Invalid control character, column 12",
    "a string": 'not a JSON object with "text"; mend it',
}
for _kind, _bad in {
    "cut": b'{"text": "cut',
    "a string": b'"text"',
    "a table": b"text,language",
    "single quotes": b"{'text': 'a'}",
    "two objects": b'{"text": "a"}{"text": "b"}',
    "NUL": b"\0\0\0\0",
    "a NUL in a string": b'{"text": "a\0b"}',
    "a tab in a string": b'{"text": "a\tb"}',
}.items():
    LINES[_kind] = _bad, SYNTAX.get(_kind, NO_OBJECT), NO_OBJECT
for _kind, _bad in {
    "a number": b'{"text": 5}',
    "nothing": b'{"text": null}',
    "not a number": b'{"text": NaN}',
    "nested": b'{"text": {"text": "a"}}',
    "a list": b'{"text": ["a"]}',
}.items():
    LINES[_kind] = _bad, NO_STRING, "a text that is no string"


@pytest.mark.parametrize("kind", LINES)
@pytest.mark.parametrize("suffix", ["", ".gz", ".xz", ".zst"])
def test_a_bad_line_is_refused_with_its_number_or_skipped_alone(kind, suffix, tmp_path, capsys):
    bad, words, reason = LINES[kind]
    compress = {"": bytes, ".gz": gzip.compress, ".xz": lzma.compress, ".zst": zstandard}[suffix]
    path = tmp_path / f"a.jsonl{suffix}"
    path.write_bytes(compress(around(bad)))
    said = refusal(path, max_line=150_000)
    assert f"{path}:3" in said or f"{path} is not UTF-8" in said and "line 3" in said
    with pytest.raises(ValueError, match=words):
        read(path, max_line=150_000)
    assert read(path, 1, max_line=150_000) == (TEXTS, {reason: 1})
    [named] = capsys.readouterr().err.splitlines()
    assert named.startswith("skipped 1 of at most 1: ") and str(path) in named


def flipped(content: bytes, part: bytes) -> bytes:
    """The content with a changed bit in the only occurrence of `part`."""
    assert content.count(part) == 1
    place = content.index(part) + len(part) // 2
    return content[:place] + bytes([content[place] ^ 1]) + content[place + 1 :]


GROUPS = {"row_group_size": 100, "compression": "none", "use_dictionary": False}


def damaged_files(folder) -> dict[str, tuple[str, bytes, int, list[str]]]:
    """Name -> end of the file's name, content, the records that are lost, the texts that are left.

    The number is a lower bound for compressed files and for files without a table of contents.
    """
    gz, xz, zst = (
        compress(LINES_OF_MANY) for compress in (gzip.compress, lzma.compress, zstandard)
    )
    table = parquet(MANY, **GROUPS)
    records = array_record(folder, [text.encode() for text in MANY])
    stream = arrow(MANY)
    other = pyarrow.table({"id": [1, 2, 3]})
    footer = table[: -8 - struct.unpack("<I", table[-8:-4])[0]]
    return {
        "gz without its last byte": (".jsonl.gz", gz[:-1], 300, []),
        "gz with another checksum": (".jsonl.gz", gz[:-8] + b"\0\0\0\0" + gz[-4:], 300, []),
        "gz with text behind it": (".jsonl.gz", gz + LINES_OF_MANY, 300, []),
        "text called gz": (".jsonl.gz", LINES_OF_MANY, 1, []),
        "empty gz": (".jsonl.gz", b"", 1, []),
        "xz without its end": (".jsonl.xz", xz[:-4], 300, []),
        "xz with text behind it": (".jsonl.xz", xz + LINES_OF_MANY, 300, []),
        "zst without its end": (".jsonl.zst", zst[:-1], 1, []),
        "zst with text behind it": (".jsonl.zst", zst + LINES_OF_MANY, 1, []),
        "gz called xz": (".jsonl.xz", gz, 1, []),
        "UTF-16": (".jsonl", LINES_OF_MANY.decode().encode("utf-16"), 300, []),
        "Parquet of 0 bytes": (".parquet", b"", 1, []),
        "Parquet without its footer": (".parquet", footer, 1, []),
        "Parquet without its last byte": (".parquet", table[:-1], 1, []),
        "Parquet with a changed bit": (
            *(".parquet", flipped(table, MANY[150].encode()), 100),
            MANY[:100] + MANY[200:],
        ),
        "Parquet without a text": (".parquet", parquet(other), 3, []),
        "Parquet with numbers as text": (".parquet", parquet([1, 2]), 2, []),
        "Arrow of 0 bytes": (".arrow", b"", 1, []),
        "Arrow cut between batches": (".arrow", stream[:-8], 1, MANY),
        "Arrow file, not a stream": (".arrow", b"ARROW1\0\0" + stream, 1, []),
        "ArrayRecord of 0 bytes": (".array_record", b"", 1, []),
        "ArrayRecord without its end": (".array_record", records[:-9], 1, []),
        "ArrayRecord with a changed bit": (
            *(".array_record", flipped(records, MANY[151].encode()), 2),
            MANY[:150] + MANY[152:],
        ),
    }


def test_a_damaged_file_is_refused_by_name_or_what_is_lost_of_it_is_counted(tmp_path, capsys):
    """The other files of the folder are intact in any case."""
    for name, (ending, content, lost, left) in damaged_files(tmp_path).items():
        folder = tmp_path / name
        folder.mkdir()
        (folder / f"m{ending}").write_bytes(content)
        assert str(folder / f"m{ending}") in refusal(folder), name
        for other in ("a.jsonl", "z.jsonl"):
            (folder / other).write_bytes(around(b""))
        capsys.readouterr()
        found, counts = read(folder, 1000)
        assert found == TEXTS + left + TEXTS, name
        assert sum(counts.values()) == lost, (name, counts)
        assert len(capsys.readouterr().err.splitlines()) == 1, name
        if lost > 1:
            assert "records cannot be used, and config.data.skip_damaged=1" in refusal(
                folder, most=1
            )


ACCEPTED = {
    "a byte order mark": b"\xef\xbb\xbf" + LINES_OF_MANY,
    "CRLF": LINES_OF_MANY.replace(b"\n", b"\r\n"),
    "CR": LINES_OF_MANY.replace(b"\n", b"\r"),
    "mixed line ends": LINES_OF_MANY.replace(b"\n", b"\r\n", 9).replace(b"}\n", b"}\n\n \r", 20),
    "no line end at the end": LINES_OF_MANY[:-1],
    "spaces around": LINES_OF_MANY.replace(b"{", b"  {").replace(b"}", b"}\t "),
    "NaN elsewhere": LINES_OF_MANY.replace(b"{", b'{"score": NaN, "other": -Infinity, '),
    "the name inside of another value": LINES_OF_MANY.replace(b"{", b'{"meta": {"text": 1}, '),
    "a text that is written twice elsewhere": LINES_OF_MANY.replace(b"{", b'{"kind": "text", '),
}


@pytest.mark.parametrize("kind", ACCEPTED)
def test_what_is_no_damage_is_read(kind, tmp_path):
    (tmp_path / "a.jsonl").write_bytes(ACCEPTED[kind])
    assert read(tmp_path) == (MANY, {})


def test_texts_keep_separators_marks_and_nul_and_may_be_empty(tmp_path):
    texts = [
        "",
        "a\u2028b\u2029c\x85d\x0be\x1cf",
        "\ufeffa",
        "a\0b",
        "\r",
        "🙂",
        "\ufffe",
        "x" * 100_000,
    ]
    lines = (json.dumps({"text": text}, ensure_ascii=False) + "\n" for text in texts)
    (tmp_path / "a.jsonl").write_text("".join(lines), encoding="utf-8", newline="")
    (tmp_path / "b.jsonl").write_bytes(b"")
    (tmp_path / "c.parquet").write_bytes(parquet(pyarrow.table({"text": pyarrow.array(texts)})))
    assert read(tmp_path) == (texts + texts, {})


def test_bad_bytes_of_a_txt_file_cost_the_part_that_has_them(tmp_path):
    part = b"a line of text\n" * 600
    (tmp_path / "a.txt").write_bytes(part + b"bad \xff line\n" + part * 2)
    assert "a.txt is not UTF-8 (invalid start byte, line 601)" in refusal(tmp_path)
    whole = part + b"good   line\n" + part * 2
    found, counts = read(tmp_path, 1)
    (tmp_path / "a.txt").write_bytes(whole)
    parts, _ = read(tmp_path)
    assert found == [text for text in parts if "good" not in text] and len(found) == len(parts) - 1
    assert counts == {"not UTF-8": 1}


def test_each_record_is_named_up_to_some_and_the_cap_is_a_number_of_records(tmp_path, capsys):
    path = tmp_path / "a.jsonl"
    path.write_bytes(b"".join(line(GOOD[0]) + b"bad\n" + line({"text": 1}) for _ in range(30)))
    assert read(path, 60)[1] == {"not a JSON object": 30, "a text that is no string": 30}
    said = capsys.readouterr().err.splitlines()
    assert len(said) == policy.MOST_NAMED + 1 and "are counted, but not named" in said[-1]
    assert all(f"{path}:{n}" in text for n, text in zip((2, 3, 5, 6), said[:4], strict=True))
    assert f"{path}:90" in refusal(path, most=59)
    assert "(60 records cannot be used, and config.data.skip_damaged=59)" in refusal(path, most=59)
    assert f"{path}:2 is not" in refusal(path)


def test_the_counts_are_kept_with_the_tokens_of_this_policy(tmp_path, capsys):
    path = tmp_path / "a.jsonl"
    path.write_bytes(around(b"bad"))
    with pytest.raises(ValueError, match=f"^data.source: {path}:3 is"):  # the path is there once
        open_corpus(path, tmp_path / "cache")
    for _ in range(2):
        corpus = open_corpus(path, tmp_path / "cache", skip_damaged=1)
        assert corpus.skipped == {"not a JSON object": 1}
        assert corpus.documents_per_label == (4,)
    assert capsys.readouterr().err.count("skipped 1 of at most 1") == 1
    with pytest.raises(ValueError, match="a.jsonl:3"):  # tokens with a gap are not those without
        open_corpus(path, tmp_path / "cache")


@pytest.mark.parametrize("split", ["train", "validation"])
def test_what_is_skipped_is_named_once_and_said_where_nothing_is_left(split, tmp_path, capsys):
    """A run reads the file for each split, and none of them knows which one comes first."""
    path, damaged = tmp_path / "a.jsonl", tmp_path / "b.jsonl.gz"
    path.write_bytes(around(b"bad\n{}"))
    for part in (split, "train", "validation"):
        assert sum(read(path, 2, split=part)[1].values()) == 2
    assert len(capsys.readouterr().err.splitlines()) == 2
    damaged.write_bytes(gzip.compress(LINES_OF_MANY)[:-1])
    words = "has no train documents, and 300 records were skipped (a damaged file: 300); mend them"
    with pytest.raises(ValueError) as refused:
        open_corpus(damaged, tmp_path / "cache", skip_damaged=300)
    assert words in str(refused.value) and "skipped 300 of" in capsys.readouterr().err


def test_the_policy_of_a_config_is_that_of_its_keys():
    fields = {"text_field": "content", "label_field": "meta.lang", "label_pattern": "([a-z]+)_part"}
    data = Data(skip_damaged=3, max_line=9, **fields)
    assert policy.of_config(data) == policy.Reading(9, *fields.values(), 3)
    assert policy.of_config(Data()) == policy.STRICT
    for key, value in (
        ("text_field", ""),
        ("label_pattern", "a("),
        ("label_pattern", "a"),
        ("skip_damaged", -1),
    ):
        with pytest.raises(configs.ConfigError, match=f"config.data.{key}"):
            Data(**{key: value})


@pytest.mark.parametrize("write", ["jsonl", "jsonl.gz", "parquet", "arrow", "array_record"])
def test_fields_within_fields_and_labels_of_names_are_read_in_every_format(write, tmp_path):
    records = [{"meta": {"text": f"text {n}", "lang": ("de", "")[n % 2]}, "n": n} for n in range(6)]
    path = tmp_path / "ja" / f"a.{write}"
    path.parent.mkdir()
    lines = [line(record) for record in records]
    table = pyarrow.Table.from_pylist(records)
    stream = io.BytesIO()
    with pyarrow.ipc.new_stream(stream, table.schema) as writer:
        writer.write_table(table)
    path.write_bytes(
        {
            "jsonl": lambda: b"".join(lines),
            "jsonl.gz": lambda: gzip.compress(b"".join(lines)),
            "parquet": lambda: parquet(table),
            "arrow": stream.getvalue,
            "array_record": lambda: array_record(tmp_path, lines),
        }[write]()
    )
    fields = {"text_field": "meta.text", "label_field": "meta.lang", "label_pattern": r"^(\w+)/"}
    found = sources.documents(
        *(str(tmp_path), "train"),
        validation_fraction=0.0,
        data_dir=NOWHERE,
        reading=policy.Reading(**fields),
    )
    expected = [(f"text {n}", ("de", "ja")[n % 2]) for n in range(6)]
    assert [(document.text, document.label) for document in found] == expected
    del fields["label_pattern"]
    fields["label_field"] = "meta.lang2"
    assert 'has no "meta.lang2", which is config' in refusal(tmp_path, **fields)
    assert "text_field" in refusal(tmp_path) or '"text"' in refusal(tmp_path)


@pytest.mark.long
@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.gz", "a.txt", "a.parquet", "a.array_record"])
def test_a_document_of_100_mb_and_a_line_of_100_mb(name, tmp_path):
    """It is refused in little memory, skipped, or read in a few times its size."""
    size = 100_000_000
    text = "a word " * (size // 7)
    content = {
        "a.jsonl": lambda: around(line({"text": text})),
        "a.jsonl.gz": lambda: gzip.compress(around(line({"text": text})), 1),
        "a.txt": text.encode,
        "a.parquet": lambda: parquet([*TEXTS[:2], text, *TEXTS[2:]]),
        "a.array_record": lambda: array_record(
            tmp_path, [t.encode() for t in [*TEXTS[:2], text, *TEXTS[2:]]]
        ),
    }[name]()
    path = tmp_path / name
    path.write_bytes(content)
    del content
    is_table = name in ("a.parquet", "a.array_record")  # their records are in memory as a whole
    if name == "a.txt":
        grown = peak_bytes(lambda: None if len(read(path)[0]) > 9000 else pytest.fail("parts"))
        assert grown < 3 * size
        return
    said, began = [], time.process_time()
    grown = peak_bytes(lambda: said.append(refusal(path)))
    assert time.process_time() - began < 10
    assert "is longer than the 30,000,000 characters of data.max_line" in said[0]
    assert f"{path}:3" in said[0] or f"{path}: record 2" in said[0]
    assert grown < (8 * size if is_table else 2 * size)
    assert read(path, 1) == (TEXTS, {"too long": 1})
    found = []
    grown = peak_bytes(lambda: found.extend(read(path, max_line=size + 100)[0]))
    assert found == [*TEXTS[:2], text, *TEXTS[2:]] and grown < 8 * size
