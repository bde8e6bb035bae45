"""Source files in an object store, here a fake one in memory, and the hashes of files' contents."""

import gzip
import hashlib
import json
import os
import pathlib

import fsspec
import pytest
from etils import epath
from fsspec.implementations.memory import MemoryFileSystem

from moe_jax.data import policy, sources, stored, text_files
from tests.data.test_formats import lines
from tests.data.written import LINES_OF_MANY, MANY, arrow, parquet, zstandard

BUCKET = "s3://bucket/corpus"


class Store(MemoryFileSystem):
    """A store whose objects have checksums; it counts the bytes that are read."""

    store: dict = {}
    pseudo_dirs: list = [""]
    cachable = False

    def __init__(self):
        super().__init__()
        self.bytes_read = 0

    @classmethod
    def _strip_protocol(cls, path):
        return "/" + str(path).rpartition("://")[2].strip("/")

    def info(self, path, **options):
        facts = super().info(path, **options)
        if facts["type"] == "file":
            content = self.store[self._strip_protocol(path)].getvalue()
            facts["ETag"] = hashlib.md5(content).hexdigest()
        return facts

    def open(self, path, mode="rb", **options):
        if mode != "rb":
            return super().open(path, mode, **options)
        counted = Counted(super().cat_file(path))
        counted.count = self._count
        return counted

    def _count(self, number):
        self.bytes_read += number


class Counted(fsspec.implementations.memory.BytesIO):
    count = None

    def read(self, size=-1):
        content = super().read(size)
        self.count(len(content))
        return content

    def read1(self, size=-1):
        return self.read(size)

    def readinto(self, buffer):
        content = self.read(len(buffer))
        buffer[: len(content)] = content
        return len(content)


@pytest.fixture
def store(monkeypatch):
    monkeypatch.setattr(Store, "store", {})
    made = Store()
    backend = type(epath.backend.fsspec_backend)
    monkeypatch.setattr(backend, "fs", lambda self, path: made)
    return made


def read(spec, split="train", fraction=0.0, most=0):
    options = {"validation_fraction": fraction, "data_dir": pathlib.Path("not-used")}
    reading = policy.Reading(skip_damaged=most)
    return [d.text for d in sources.documents(spec, split, reading=reading, **options)]


CONTENTS = {
    "a.jsonl": LINES_OF_MANY,
    "a.jsonl.gz": gzip.compress(LINES_OF_MANY[:5000]) + gzip.compress(LINES_OF_MANY[5000:]),
    "a.jsonl.zst": zstandard(LINES_OF_MANY),
    "a.parquet": parquet(MANY),
    "a.arrow": arrow(MANY),
}


@pytest.mark.parametrize("name", CONTENTS)
def test_a_store_is_read_as_a_folder_is(name, store, tmp_path):
    for folder in ("deep", "deep/er", "deep/.hidden"):
        store.pipe_file(f"{BUCKET}/{folder}/{name}", CONTENTS[name])
        (tmp_path / folder).mkdir()
        (tmp_path / folder / name).write_bytes(CONTENTS[name])
    store.pipe_file(f"{BUCKET}/deep/picture.png", b"\x89")
    one = f"{BUCKET}/deep/{name}"
    assert read(one) == MANY
    assert read(BUCKET) == read(str(tmp_path)) == MANY * 2
    assert read(f"{BUCKET}/*/{name}") == MANY
    halves = read(BUCKET, "train", 0.5), read(BUCKET, "validation", 0.5)
    assert halves == (read(str(tmp_path), "train", 0.5), read(str(tmp_path), "validation", 0.5))
    found = text_files.find(BUCKET)
    assert [f.name for f in found] == [f.name for f in text_files.find(str(tmp_path))]
    assert f"2 files, {2 * len(CONTENTS[name]):,} bytes" in sources.describe(BUCKET, tmp_path)
    store.pipe_file(one, CONTENTS[name][:-9])
    with pytest.raises(ValueError, match=f"{one}[: ]"):
        read(one)


@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.gz", "a.jsonl.zst", "a.parquet"])
def test_a_file_in_a_store_is_read_as_far_as_it_is_needed(name, store):
    words = [hashlib.sha256(str(n).encode()).hexdigest() for n in range(40_000)]
    content = lines({"text": word} for word in words)
    compress = {"a.jsonl.gz": gzip.compress, "a.jsonl.zst": zstandard}.get(name, bytes)
    content = parquet(words, row_group_size=1000) if name == "a.parquet" else compress(content)
    store.pipe_file(f"{BUCKET}/{name}", content)
    options = {"validation_fraction": 0.0, "data_dir": pathlib.Path("not-used")}
    first = next(sources.documents(BUCKET, "train", **options))
    assert first.text == words[0] and store.bytes_read < len(content) / 4


def test_the_fingerprint_in_a_store_is_of_names_and_checksums_and_reads_nothing(store, tmp_path):
    store.pipe_file(f"{BUCKET}/a.jsonl", LINES_OF_MANY)
    store.pipe_file("s3://bucket/moved/a.jsonl", LINES_OF_MANY)
    before = sources.fingerprint(BUCKET, tmp_path)
    assert sources.fingerprint("s3://bucket/moved", tmp_path) == before
    assert store.bytes_read == 0
    store.pipe_file(f"{BUCKET}/a.jsonl", LINES_OF_MANY.replace(b"a", b"b"))
    assert sources.fingerprint(BUCKET, tmp_path) != before


@pytest.mark.parametrize(
    ("spec", "words"),
    [
        ("s3://bucket/nothing", "matches no"),
        ("s3://bucket/*.jsonl", "matches no"),
        ("s3://bucket/records/a.array_record", "is ArrayRecord; copy it to a local folder"),
        ("s3://bucket/other", "is not one of|matches no"),
        ("ftp://server/a.jsonl", "nor in one of gs://, s3://"),
    ],
)
def test_what_a_store_does_not_give_is_refused_in_one_line(spec, words, store):
    store.pipe_file("s3://bucket/records/a.array_record", b"")
    store.pipe_file("s3://bucket/other", b"")
    with pytest.raises(ValueError, match=words) as refused:
        sources.check(spec)
    assert "\n" not in str(refused.value)


def test_a_store_that_cannot_be_reached_names_what_to_install_and_check(monkeypatch):
    def fail(self, path):
        raise ImportError("Please install s3fs to access S3")

    monkeypatch.setattr(type(epath.backend.fsspec_backend), "fs", fail)
    with pytest.raises(ValueError, match=r"cannot be listed \(ImportError: .*; install .*s3fs"):
        sources.check(BUCKET)


def test_the_hash_of_a_large_file_is_kept_until_the_file_changes(tmp_path, monkeypatch):
    path, memory = tmp_path / "a.jsonl", tmp_path / "memory"
    path.write_bytes(LINES_OF_MANY)
    os.utime(path, (1e9, 1e9))
    hashed = []

    def digest():
        real, opened = stored.opened, []
        monkeypatch.setattr(stored, "opened", lambda p: opened.append(p) or real(p))
        found = stored.digest(path, memory)
        monkeypatch.setattr(stored, "opened", real)
        hashed.append(len(opened))
        return found

    once = digest()
    assert once == hashlib.sha256(LINES_OF_MANY).hexdigest() and not memory.exists()  # it is small
    monkeypatch.setattr(stored, "LARGE", 10)
    assert digest() == once and not memory.exists()  # it has just been written
    monkeypatch.setattr(stored, "FRESH_SECONDS", -1)
    assert digest() == digest() == once and hashed == [1, 1, 1, 0]
    path.write_bytes(LINES_OF_MANY.replace(b"a", b"b"))  # of the same size
    os.utime(path, (1e9, 1e9))  # and the same time: rsync and tar set it
    assert digest() != once and hashed[-1] == 1
    [kept] = memory.rglob("*.json")
    for damage in ("", "[]", json.dumps({"state": stored.state(path)})):
        kept.write_text(damage)
        assert digest() != once and hashed[-1] == 1


def test_a_file_that_changes_while_it_is_hashed_is_refused(tmp_path, monkeypatch):
    path = tmp_path / "a.jsonl"
    path.write_bytes(LINES_OF_MANY)
    states = iter([[1], [2]])
    monkeypatch.setattr(stored, "state", lambda path: next(states))
    with pytest.raises(ValueError, match="a.jsonl changes while it is read"):
        stored.digest(path, tmp_path)
