"""A person's own files: what is read under which label, in which split; what is refused."""

import gzip
import json
import lzma
import os
import pathlib

import pytest

from moe_jax.data import sources, text_files
from moe_jax.data.document import Document, is_held_out

NOWHERE = pathlib.Path("not-used")  # where TFDS data lies
RECORDS = [
    {"text": "one\n", "language": "en", "doc": "a"},
    {"text": "eins\t \n", "lang": "de", "doc": "a"},
    {"text": "две", "language": "ru", "doc": "b"},
    {"text": "  🙂", "id": 7},
    {"text": ""},
]
DOCUMENTS = [Document(r["text"], r.get("language", r.get("lang", "all"))) for r in RECORDS]


def read(source, split="train", fraction=0.0, data_dir=NOWHERE):
    found = sources.documents(str(source), split, validation_fraction=fraction, data_dir=data_dir)
    return list(found)


def jsonl(records) -> bytes:
    return b"".join(json.dumps(record).encode() + b"\n" for record in records)


@pytest.mark.parametrize(
    ("suffix", "compress"),
    [("jsonl", bytes), ("jsonl.gz", gzip.compress), ("jsonl.xz", lzma.compress)],
)
def test_json_lines_keep_their_texts_and_labels_however_compressed(suffix, compress, tmp_path):
    path = tmp_path / f"mine.{suffix}"
    path.write_bytes(compress(jsonl(RECORDS) + b"\n  \n"))
    assert read(path) == DOCUMENTS


def test_a_folder_is_its_files_in_any_depth_and_a_glob_those_that_match(tmp_path):
    (tmp_path / "deep" / "er").mkdir(parents=True)
    (tmp_path / "a.jsonl").write_bytes(jsonl(RECORDS))
    (tmp_path / "deep" / "b.txt").write_text("text\n")
    (tmp_path / "deep" / "er" / "c.jsonl").write_bytes(jsonl(RECORDS[:1]))
    (tmp_path / "deep" / "picture.png").write_bytes(b"\x89")
    assert read(tmp_path) == [*DOCUMENTS, Document("text\n", "all"), DOCUMENTS[0]]
    assert read(tmp_path / "deep" / "*.txt") == [Document("text\n", "all")]
    assert read(f"{tmp_path}/*/*/c.*") == [DOCUMENTS[0]]


def test_a_path_with_glob_characters_in_its_name_is_still_a_path(tmp_path):
    path = tmp_path / "mine [v1].txt"
    path.write_text("text")
    assert read(path) == [Document("text", "all")]


def test_a_long_txt_file_is_cut_at_line_ends_into_parts_that_can_be_held_out(tmp_path):
    lines = [f"line {i} " + "x" * (i % 300) + "\n" for i in range(1000)] + ["no end of line"]
    path = tmp_path / "long.txt"
    path.write_text("".join(lines))
    parts = [d.text for d in read(path)]
    assert "".join(parts) == "".join(lines)
    assert max(map(len, parts)) <= text_files.PART_CHARACTERS
    assert all(part.endswith("\n") for part in parts[:-1])
    held_out, trained = (read(path, split, 0.3) for split in ("validation", "train"))
    assert held_out and trained and len(held_out) + len(trained) == len(parts)


def test_every_document_is_in_one_split_wherever_its_file_lies_and_whatever_its_neighbours(
    tmp_path,
):
    records = [{"text": f"text {i}", "doc": f"doc {i}"} for i in range(300)]
    (tmp_path / "one.jsonl").write_bytes(jsonl(records))
    (tmp_path / "other.jsonl").write_bytes(jsonl(records[::-2]))
    held_out, trained = (read(tmp_path / "one.jsonl", s, 0.2) for s in ("validation", "train"))
    assert len(held_out) + len(trained) == len(records)
    assert not {d.text for d in held_out} & {d.text for d in trained}
    some = read(tmp_path / "other.jsonl", "validation", 0.2)
    assert set(some) == set(held_out) & {Document(r["text"], "all") for r in records[::-2]}


@pytest.mark.parametrize("key", ["doc", "id"])
def test_records_of_one_document_go_into_the_same_split(key, tmp_path):
    """Document 0 too, whose number is as false as no number."""
    records = [{"text": f"{d} in {x}", key: d, "lang": f"l{x}"} for d in range(9) for x in range(9)]
    (tmp_path / "a.jsonl").write_bytes(jsonl(records))
    held_out, trained = (
        {d.text.split()[0] for d in read(tmp_path / "a.jsonl", split, 0.5)}
        for split in ("validation", "train")
    )
    assert held_out and trained and held_out.isdisjoint(trained)


def test_doc_decides_before_id_and_id_before_text(tmp_path):
    keys = [f"key {i}" for i in range(20)]
    held = next(key for key in keys if is_held_out(key, 0.5))
    free = next(key for key in keys if not is_held_out(key, 0.5))
    held_out = [
        {"doc": held, "id": free, "text": free},
        {"id": held, "text": free},
        {"text": held},
    ]
    trained = [
        {"doc": free, "id": held, "text": held},
        {"id": free, "text": held},
        {"text": free},
    ]
    for split, records in (("validation", held_out), ("train", trained)):
        (tmp_path / "a.jsonl").write_bytes(jsonl(records))
        assert len(read(tmp_path / "a.jsonl", split, 0.5)) == len(records)


def test_a_fingerprint_is_of_names_and_content_not_of_places(tmp_path):
    for folder, name, text in (
        ("first", "a.txt", "text"),
        ("moved", "a.txt", "text"),
        ("edited", "a.txt", "tExt"),
        ("renamed", "b.txt", "text"),  # the name is part of the key that decides the split
    ):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / name).write_text(text)
    prints = {p.name: sources.fingerprint(str(p), NOWHERE) for p in tmp_path.iterdir()}
    assert prints["first"] == prints["moved"]
    assert len(set(prints.values())) == 3


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.txt", b"ok\n\xff\n", r"a\.txt is not UTF-8"),
        ("a.jsonl", b'{"text": "\xff"}', r"a\.jsonl is not UTF-8"),
        ("a.jsonl", b'{"text": "ok"}\n{"text": "cut', r"a\.jsonl:2 is not a JSON object"),
        ("a.jsonl", b'\n{"txt": "misspelt"}\n', r'a\.jsonl:2 is not a JSON object with "text"'),
        ("a.jsonl", b'["text"]\n', r"a\.jsonl:1 is not a JSON object"),
        ("a.jsonl", b'{"text": 5}\n', r'a\.jsonl:1: "text" is not a string'),
        ("a.jsonl", b'{"text": "a", "id": ' + b"9" * 5000 + b"}\n", r"a\.jsonl:1 is not a JSON"),
        ("a.jsonl", b'{"text": "\\ud800"}\n', r"a\.jsonl:1 has half a surrogate pair"),
        ("a.jsonl.gz", gzip.compress(jsonl(RECORDS))[:-9], r"a\.jsonl\.gz cannot be read"),
        ("a.jsonl.gz", b"not compressed", r"a\.jsonl\.gz cannot be read"),
        ("a.jsonl.xz", lzma.compress(jsonl(RECORDS))[:-9], r"a\.jsonl\.xz cannot be read"),
        ("a.jsonl.xz", b"not compressed, this one", r"a\.jsonl\.xz cannot be read"),
    ],
)
def test_content_that_cannot_be_used_is_refused_in_one_line_with_its_place(
    name, content, message, tmp_path
):
    (tmp_path / name).write_bytes(content)
    sources.check(str(tmp_path))
    with pytest.raises(ValueError, match=message) as error:
        read(tmp_path)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("missing", "matches no file"),
        ("*.txt", "matches no file"),
        ("", "is a folder without .txt"),
        ("table.csv", r"table\.csv is not one of \.txt"),
        ("*", r"table\.csv is not one of \.txt"),
    ],
)
def test_a_path_that_cannot_be_used_is_refused_before_anything_is_read(source, message, tmp_path):
    (tmp_path / "table.csv").write_text("a,b\n")
    for use in (sources.check, read):
        with pytest.raises(ValueError, match=message) as error:
            use(str(tmp_path / source))
        assert "\n" not in str(error.value)


def test_a_file_without_permission_is_refused_before_anything_is_read(tmp_path, monkeypatch):
    (tmp_path / "a.txt").write_text("text")
    monkeypatch.setattr(os, "access", lambda path, mode: False)  # root may read everything
    with pytest.raises(ValueError, match=r"a\.txt cannot be read; check its permissions"):
        sources.check(str(tmp_path))
