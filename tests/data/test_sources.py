"""What is read from where, under which label, in which split; and what is refused."""

import collections
import gzip
import json
import lzma
import os
import pathlib
import sys

import pytest

from moe_jax.data import sources
from moe_jax.data.corpora import builders

NOWHERE = pathlib.Path("not-used")  # where TFDS data lies
RECORDS = [
    {"text": "one\n", "language": "en", "doc": "a"},
    {"text": "eins\t \n", "lang": "de", "doc": "a"},
    {"text": "две", "language": "ru", "doc": "b"},
    {"text": "  🙂", "id": 7},
    {"text": ""},
]
DOCUMENTS = [sources.Document(r["text"], r.get("language", r.get("lang", "all"))) for r in RECORDS]


def read(source, split="train", fraction=0.0, data_dir=NOWHERE):
    found = sources.documents(str(source), split, validation_fraction=fraction, data_dir=data_dir)
    return list(found)


def jsonl(records) -> bytes:
    return b"".join(json.dumps(record).encode() + b"\n" for record in records)


@pytest.fixture(scope="module")
def tfds_dir(tmp_path_factory):
    return tmp_path_factory.mktemp("tfds")


@pytest.fixture(scope="module")
def embedded(tfds_dir):
    """The documents of both splits of the embedded text, prepared and read without TensorFlow."""
    splits = ("train", "validation")
    documents = {split: read("embedded", split, data_dir=tfds_dir) for split in splits}
    assert "tensorflow" not in sys.modules
    return documents


def test_the_embedded_corpus_comes_whole_out_of_array_records(embedded, tfds_dir):
    assert list(tfds_dir.glob("lo_parallel19/*/*.array_record*"))
    found = collections.Counter((d.label, d.text) for split in embedded.values() for d in split)
    packaged = [(r["lang"], r["text"]) for r in builders.records("lo_parallel19")]
    assert len(packaged) == 7429
    assert found == collections.Counter(packaged)


def test_embedded_held_out_pages_are_the_same_in_all_languages_and_never_trained_on(embedded):
    page = {(r["lang"], r["text"]): r["doc"] for r in builders.records("lo_parallel19")}
    pages = {split: collections.defaultdict(set) for split in embedded}
    for split, documents in embedded.items():
        for document in documents:
            pages[split][document.label].add(page[document.label, document.text])
    held_out, trained = (list(pages[split].values()) for split in ("validation", "train"))
    assert len(held_out) == len(trained) == 19
    assert all(of_language == held_out[0] for of_language in held_out)
    assert held_out[0] and held_out[0].isdisjoint(set().union(*trained))


def test_the_probe_of_71_languages_has_a_text_in_each_and_only_a_test_split(tfds_dir):
    documents = read("tfds:udhr_languages", "test", data_dir=tfds_dir)
    assert len(documents) == len({d.label for d in documents}) == 71
    with pytest.raises(ValueError, match=r"has no split 'train', only \['test'\]"):
        read("tfds:udhr_languages", "train", data_dir=tfds_dir)


@pytest.mark.parametrize("name", ["nonexistent", "no name", "a/b", "lo_parallel19:9.9.9"])
def test_a_dataset_that_is_not_there_is_refused_with_the_names_that_are(name, tmp_path):
    with pytest.raises(ValueError, match="lo_parallel19, udhr_languages") as error:
        read(f"tfds:{name}", data_dir=tmp_path)
    assert "\n" not in str(error.value)


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
    assert read(tmp_path) == [*DOCUMENTS, sources.Document("text\n", "all"), DOCUMENTS[0]]
    assert read(tmp_path / "deep" / "*.txt") == [sources.Document("text\n", "all")]
    assert read(f"{tmp_path}/*/*/c.*") == [DOCUMENTS[0]]


def test_a_path_with_glob_characters_in_its_name_is_still_a_path(tmp_path):
    path = tmp_path / "mine [v1].txt"
    path.write_text("text")
    assert read(path) == [sources.Document("text", "all")]


def test_a_long_txt_file_is_cut_at_line_ends_into_parts_that_can_be_held_out(tmp_path):
    lines = [f"line {i} " + "x" * (i % 300) + "\n" for i in range(1000)] + ["no end of line"]
    path = tmp_path / "long.txt"
    path.write_text("".join(lines))
    parts = [d.text for d in read(path)]
    assert "".join(parts) == "".join(lines)
    assert max(map(len, parts)) <= sources.PART_CHARACTERS
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
    assert set(some) == set(held_out) & {sources.Document(r["text"], "all") for r in records[::-2]}


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
    held = next(key for key in keys if sources.is_held_out(key, 0.5))
    free = next(key for key in keys if not sources.is_held_out(key, 0.5))
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


def test_the_held_out_share_is_about_the_fraction_and_grows_with_it():
    keys = [f"key {i}" for i in range(10_000)]
    small, large = (
        {key for key in keys if sources.is_held_out(key, fraction)} for fraction in (0.02, 0.1)
    )
    assert small < large  # a tokenizer trained outside `large` has seen nothing of `small`
    assert 800 < len(large) < 1200  # standard deviation 30
    assert not any(sources.is_held_out(key, 0.0) for key in keys)
    assert all(sources.is_held_out(key, 1.0) for key in keys)


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


def test_tfds_without_a_name_is_refused():
    with pytest.raises(ValueError, match="use tfds:NAME"):
        sources.check("tfds:")
