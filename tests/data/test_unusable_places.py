"""Paths that are no files, folders that are shut, files that change: refused, never left out."""

import os

import pytest

from moe_jax.data import sources
from tests.data.written import (
    GOOD,
    LINES_OF_MANY,
    NOWHERE,
    TEXTS,
    around,
    line,
    open_corpus,
    read,
    refusal,
)


def make_fifo(path):
    os.mkfifo(path)


def make_loop(path):
    path.symlink_to(path.name)


PLACES = {
    "a link to nothing": (lambda path: path.symlink_to("missing"), "a link to nothing"),
    "a link to itself": (make_loop, "a link to nothing"),
    "a pipe": (make_fifo, "no regular file"),
}


@pytest.mark.parametrize("kind", PLACES)
def test_what_is_no_file_is_refused_and_neither_waited_for_nor_left_out(kind, tmp_path):
    make, words = PLACES[kind]
    (tmp_path / "a.jsonl").write_bytes(around(b""))
    make(tmp_path / "m.jsonl")
    for spec in (tmp_path, tmp_path / "*.jsonl"):
        assert f"{tmp_path / 'm.jsonl'} is {words}" in refusal(spec, most=9)


def test_a_device_is_refused():
    assert "is not one of" in refusal("/dev/zero")


def test_a_folder_may_be_called_as_a_file(tmp_path):
    (tmp_path / "x.jsonl").mkdir()
    (tmp_path / "x.jsonl" / "a.jsonl").write_bytes(around(b""))
    assert read(tmp_path)[0] == read(tmp_path / "x.jsonl")[0] == TEXTS


@pytest.mark.parametrize("name", [b"a\xff.jsonl", b"ja\xff/a.jsonl"])
def test_a_name_that_is_not_utf_8_is_refused_by_name(name, tmp_path):
    path = tmp_path / os.fsdecode(name)
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(around(b""))
    for spec in (tmp_path, path):
        assert "xff" not in (said := refusal(spec)) and said.isascii()
        assert "\\udcff" in said and said.endswith("is not UTF-8; rename the file or folder")
    (tmp_path / "a.jsonl").write_bytes(around(b""))
    with pytest.raises(ValueError, match=r"the name .*\\udcff/.* is not UTF-8; rename"):
        open_corpus(tmp_path / "a.jsonl", tmp_path / os.fsdecode(b"cache\xff"))


def test_a_folder_behind_a_link_is_not_left_out(tmp_path):
    text, other = tmp_path / "text", tmp_path / "other"
    (other / "deep").mkdir(parents=True)
    text.mkdir()
    (text / "a.jsonl").write_bytes(around(b""))
    (text / "link").symlink_to(other)
    assert read(text)[0] == TEXTS  # nothing is lost
    (other / "deep" / "b.jsonl").write_bytes(around(b""))
    assert f"{text / 'link'} is a link to a folder of text" in refusal(text, most=9)
    assert read(text / "**" / "*.jsonl")[0] == TEXTS * 2


def test_a_folder_that_may_not_be_read_is_not_left_out(tmp_path, monkeypatch):
    (tmp_path / "a").mkdir()
    (tmp_path / "a.jsonl").write_bytes(around(b""))
    access = os.access
    shut = tmp_path / "a"  # root may read everything
    monkeypatch.setattr(os, "access", lambda path, mode: path != shut and access(path, mode))
    assert f"{shut} cannot be read; check its permissions" in refusal(tmp_path)


@pytest.mark.parametrize("when", ["while it is read", "before its turn"])
def test_a_file_that_changes_meanwhile_is_refused(when, tmp_path):
    one, two = tmp_path / "a.jsonl", tmp_path / "b.jsonl"
    one.write_bytes(LINES_OF_MANY)
    two.write_bytes(LINES_OF_MANY)
    changed = one if when == "while it is read" else two
    found = sources.documents(str(tmp_path), "train", validation_fraction=0.0, data_dir=NOWHERE)
    next(found)
    with changed.open("ab") as file:
        file.write(line(GOOD[0]))
    with pytest.raises(ValueError, match=f"{changed} changed while it was read"):
        list(found)


def test_a_text_that_changes_while_it_is_tokenized_is_not_kept(tmp_path, monkeypatch):
    path = tmp_path / "a.jsonl"
    path.write_bytes(around(b""))
    documents = sources.documents

    def changed_before(*arguments, **options):
        path.write_bytes(around(b'{"text": "more"}'))
        return documents(*arguments, **options)

    monkeypatch.setattr(sources, "documents", changed_before)
    with pytest.raises(ValueError, match="changed while it was read"):
        open_corpus(path, tmp_path / "cache")
