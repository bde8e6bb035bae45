"""A person's own files: what is read under which label, in which split; what is refused."""

import gzip
import json
import lzma
import os
import pathlib

import pytest

from moe_jax.data import cache, sources, text_files
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


def test_a_file_is_read_as_the_end_of_its_name_says(tmp_path):
    (tmp_path / "a.jsonl.txt").write_bytes(jsonl(RECORDS))
    assert read(tmp_path) == [Document(jsonl(RECORDS).decode(), "all")]
    (tmp_path / "a.jsonl.txt").rename(tmp_path / "a.txt.jsonl")
    assert read(tmp_path) == DOCUMENTS


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


def test_files_of_one_name_are_each_decided_by_their_path_under_the_source(tmp_path):
    for i in range(200):
        (tmp_path / "articles" / f"{i:04d}").mkdir(parents=True)
        (tmp_path / "articles" / f"{i:04d}" / "text.txt").write_text(f"text {i}")
    held_out = read(tmp_path / "articles", "validation", 0.1)
    assert 10 <= len(held_out) <= 30
    assert held_out == read(tmp_path / "articles" / "*" / "text.txt", "validation", 0.1)
    (tmp_path / "articles").rename(tmp_path / "moved")
    assert held_out == read(tmp_path / "moved", "validation", 0.1)


@pytest.mark.parametrize("between", [" ", "", "\u3000"])
def test_one_long_line_is_cut_behind_spaces_if_it_has_any(between, tmp_path):
    text = "\n" + between.join(f"wörd{i}" for i in range(20_000)) + "\nlast line\n"
    (tmp_path / "line.txt").write_text(text)
    parts = [d.text for d in read(tmp_path / "line.txt")]
    assert "".join(parts) == text
    assert text_files.PART_CHARACTERS >= max(map(len, parts)) > text_files.PART_CHARACTERS - 100
    if between == " ":
        assert all(part[-1].isspace() for part in parts)
    splits = (read(tmp_path / "line.txt", split, 0.3) for split in ("validation", "train"))
    assert all(splits)


def test_hidden_files_and_folders_are_left_out_unless_they_are_named(tmp_path):
    for name in (".git/a.txt", "deep/.ipynb_checkpoints/b-checkpoint.txt", "deep/._b.txt"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(b"hidden\xff")
    (tmp_path / "deep" / "b.txt").write_text("text")
    for source in (tmp_path, tmp_path / "**" / "*.txt", tmp_path / "*" / "*.txt"):
        assert read(source) == [Document("text", "all")]
    root = tmp_path / ".cache"
    root.mkdir()
    (root / ".a.txt").write_text("named")
    assert read(root / ".a.txt") == [Document("named", "all")]
    (root / "b.txt").write_text("under a hidden root")
    assert read(root) == [Document("under a hidden root", "all")]


@pytest.mark.parametrize("compress", [bytes, gzip.compress, lzma.compress])
def test_byte_order_marks_are_no_text_even_where_files_were_joined(compress, tmp_path):
    suffix = {bytes: "", gzip.compress: ".gz", lzma.compress: ".xz"}[compress]
    one = jsonl(RECORDS)
    path = tmp_path / f"a.jsonl{suffix}"
    path.write_bytes(compress(b"\xef\xbb\xbf" + one + b"\xef\xbb\xbf" + one))
    assert read(path) == DOCUMENTS * 2
    marked = "one\n".encode("utf-8-sig") + "two\n".encode("utf-8-sig") + "in\ufeffside".encode()
    (tmp_path / "a.txt").write_bytes(marked)
    assert read(tmp_path / "a.txt") == [Document("one\ntwo\nin\ufeffside", "all")]


@pytest.mark.parametrize("between", [" ", ""])
def test_a_mark_within_a_long_line_is_kept_where_a_piece_begins(between, tmp_path):
    line = between.join(["x" * (text_files.PART_CHARACTERS - len(between)), "\ufeffmore\n"])
    (tmp_path / "a.txt").write_text("\ufeff" + line + "\ufeffnext", encoding="utf-8")
    (tmp_path / "b.txt").write_text(line, encoding="utf-8")
    assert "".join(d.text for d in read(tmp_path / "a.txt")) == line + "next"
    assert "".join(d.text for d in read(tmp_path / "b.txt")) == line


@pytest.mark.parametrize("name", ["a.txt", "a.jsonl", "a.jsonl.gz"])
@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-le", "utf-16-be", "utf-32"])
def test_text_of_another_encoding_is_named_as_such(name, encoding, tmp_path):
    content = '{"text": "wörds"}\n'.encode(encoding)
    (tmp_path / name).write_bytes(gzip.compress(content) if name.endswith("gz") else content)
    kind = encoding.upper().replace("-LE", "LE").replace("-BE", "BE")
    with pytest.raises(ValueError, match=f"{name} is {kind}, not UTF-8; convert it.* -f {kind} "):
        read(tmp_path)


@pytest.mark.parametrize(
    "text",
    [
        "\0",
        "a\0b c\n",
        "\0abc",
        "ab\0\0 and more",
        "a\0\0\0 and more",
        "\0" * 64,
        "abc\0" * 40,
        "0\0" + "two columns of a table\n" * 40,
    ],
)
def test_nul_characters_are_text_and_do_not_make_it_another_encoding(text, tmp_path):
    (tmp_path / "a.txt").write_bytes(text.encode())
    assert read(tmp_path) == [Document(text, "all")]


@pytest.mark.parametrize("encoding", ["utf-16-le", "utf-16-be", "utf-32-le", "utf-32-be"])
@pytest.mark.parametrize(
    "text",
    [
        "'One\u2019s own caf\xe9\u2019 \u2014 a\0b \u4e00\n" * 9,
        "two bytes",
        "1. Нет слов, и т. д.\n" * 9,
    ],
)
def test_an_encoding_without_a_mark_is_known_by_its_regular_zero_bytes(text, encoding, tmp_path):
    (tmp_path / "a.txt").write_bytes(text.encode(encoding))
    kind = encoding.upper().replace("-LE", "LE").replace("-BE", "BE")
    with pytest.raises(ValueError, match=f"a.txt is {kind}, not UTF-8"):
        read(tmp_path)


@pytest.mark.parametrize(
    ("name", "split"),
    [
        ("train.jsonl", "train"),
        ("train-00000-of-00003.jsonl", "train"),
        ("wiki.train.tokens.txt", "train"),
        ("validation.jsonl", "validation"),
        ("valid/a.txt", "validation"),
        ("en-val2.txt", "validation"),
        ("Dev_set/part 1.txt", "validation"),
        ("heldout.txt", "validation"),
        ("data/test/a.txt", "test"),
        ("TEST-00000-of-00001.jsonl", "test"),
        ("flores.devtest.txt", "test"),
        ("evaluation/a.txt", "test"),
        ("train_and_test.txt", "test"),
        ("test_run/train/a.txt", "train"),
        ("latest.txt", ""),
        ("contest/invalid/device/values/trainer.txt", ""),
        ("развал.txt", ""),
    ],
)
def test_the_name_of_a_file_or_of_its_nearest_folder_says_its_split(name, split):
    assert text_files.split_in(pathlib.Path(name)) == split


def test_files_named_as_splits_are_these_and_test_files_are_never_trained_on(tmp_path):
    def write(*names):
        for name in names:
            (tmp_path / name).parent.mkdir(exist_ok=True)
            (tmp_path / name).write_bytes(jsonl([{"text": f"{name} {i}"} for i in range(40)]))

    def names(split):
        return {document.text.split()[0] for document in read(tmp_path, split, 0.5)}

    write("train-0.jsonl", "other.jsonl", "x/test.jsonl")
    assert names("train") == names("validation") == {"train-0.jsonl", "other.jsonl"}
    write("dev.jsonl")
    assert names("train") == {"train-0.jsonl", "other.jsonl"}
    assert names("validation") == {"dev.jsonl"}
    num_bytes = sum(path.stat().st_size for path in tmp_path.rglob("*.jsonl"))
    assert sources.describe(str(tmp_path), NOWHERE) == (
        f"data.source={str(tmp_path)!r}: 4 files, {num_bytes:,} bytes "
        "(train: 2 files; validation: 1 file; not trained on, for the name says test: x/test.jsonl)"
    )
    # A file that is named itself, or lies in a folder that is, is what a person chose.
    assert len(read(tmp_path / "dev.jsonl")) == len(read(tmp_path / "x" / "test.jsonl")) == 40
    assert "1 file, " in sources.describe(str(tmp_path / "dev.jsonl"), NOWHERE)
    for name in ("train-0.jsonl", "other.jsonl"):
        (tmp_path / name).unlink()
    with pytest.raises(ValueError, match="nothing is left to train on, .* such as dev.jsonl"):
        sources.check(str(tmp_path))


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
        ("a.jsonl", b'\n{"txt": "misspelt"}\n', r'a\.jsonl:2 has no "text" \(its fields: txt\)'),
        ("a.jsonl", b'["text"]\n', r"a\.jsonl:1 is not a JSON object"),
        ("a.jsonl", b'{"text": 5}\n', r'a\.jsonl:1: "text" is not a string'),
        (
            "a.jsonl",
            b'{"text": "a", "id": ' + b"9" * 5000 + b"}\n",
            r"a\.jsonl:1 has a whole number",
        ),
        ("a.jsonl", b'{"text": "\\ud800"}\n', r"a\.jsonl:1 has half a surrogate pair"),
        ("a.jsonl", b"\n" + b'{"a": ' + b"[" * 10**5 + b"\n", r"a\.jsonl:2 cannot be read \(Recur"),
        ("a.txt", b"ok\nok\n\xff\n", r"a\.txt is not UTF-8 \(invalid start byte, line 3\)"),
        ("a.jsonl", b'{"text": "ok"}\n{"text": "\xe4"}', r"a\.jsonl is not UTF-8 \(.*, line 2\)"),
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


def test_a_link_out_of_a_folder_is_not_followed_but_one_that_is_named_is(tmp_path):
    (tmp_path / "secret.txt").write_text("secret")
    (tmp_path / "blobs").mkdir()
    (tmp_path / "blobs" / "0123").write_text("text")
    snapshot = tmp_path / "snapshots" / "revision" / "data"
    snapshot.mkdir(parents=True)
    (snapshot / "a.txt").symlink_to("../../../blobs/0123")  # as in the cache of the hub
    (snapshot / "b.txt").symlink_to("a.txt")
    for root in (snapshot, snapshot.parent):
        assert [d.text for d in read(root)] == ["text"] * 2
    (snapshot / "c.txt").symlink_to(tmp_path / "secret.txt")
    for root in (snapshot, snapshot.parent):
        with pytest.raises(ValueError, match=r"c\.txt is a link out of its folder, .* by a glob"):
            sources.check(str(root))
    assert [d.text for d in read(snapshot / "*.txt")] == ["text", "text", "secret"]


def test_a_file_without_permission_is_refused_before_anything_is_read(tmp_path, monkeypatch):
    (tmp_path / "a.txt").write_text("text")
    monkeypatch.setattr(os, "access", lambda path, mode: False)  # root may read everything
    with pytest.raises(ValueError, match=r"a\.txt cannot be read; check its permissions"):
        sources.check(str(tmp_path))


def test_a_cache_inside_of_a_folder_of_text_is_no_text(tmp_path):
    """The tokens of a text are ArrayRecord too, and a cache may lie beside the text."""
    (tmp_path / "a.txt").write_text("text")
    with cache.writing(tmp_path / "cache"):
        (tmp_path / "cache" / "tokens").mkdir()
        (tmp_path / "cache" / "tokens" / "tokens.array_record").write_bytes(b"\x80")
    assert [file.path.name for file in text_files.find(str(tmp_path))] == ["a.txt"]
