"""Every format of files: each document once, under its label; damage is refused, not skipped."""

import collections
import gzip
import io
import json
import lzma
import pathlib
import struct

import pyarrow
import pyarrow.parquet
import pytest

from moe_jax.data import policy, sources, text_files
from tests.data.written import array_record, zstandard

RECORDS = [
    {"text": f"text {n} " * (n % 50), "language": ("en", "de")[n % 2], "doc": n // 3}
    for n in range(600)
] + [
    {"text": "", "language": "en", "doc": 1},  # a document without characters
    {"text": "NUL \0, a mark \ufeff, two\nlines, 🙂", "language": "ja", "doc": None},
    {"text": "text 2 text 2 ", "language": "en", "doc": 2},  # one that occurs twice
    {"text": '{"a": 1}', "language": None, "doc": None},
]
DOCUMENTS = collections.Counter((r["text"], r["language"] or "all") for r in RECORDS)


def lines(records) -> bytes:
    return b"".join(json.dumps(record).encode() + b"\n" for record in records)


def parquet(records, **options) -> bytes:
    table = pyarrow.Table.from_pylist(
        records, None if records else pyarrow.schema({"text": pyarrow.string()})
    )
    options = {"row_group_size": 70, "write_page_checksum": True, **options}
    pyarrow.parquet.write_table(table, written := io.BytesIO(), **options)
    return written.getvalue()


def arrow(records) -> bytes:
    table = pyarrow.Table.from_pylist(
        records, None if records else pyarrow.schema({"text": pyarrow.large_string()})
    )
    with pyarrow.ipc.new_stream(written := io.BytesIO(), table.schema) as stream:
        stream.write_table(table, max_chunksize=100)
    return written.getvalue()


def content(name, records, tmp_path) -> bytes:
    """The file's content; a compressed file has two members, which cut a line."""
    text = lines(records)
    parts = text[: len(text) // 2], text[len(text) // 2 :]
    match name.split(".", 1)[1].split("-")[0]:
        case "jsonl":
            return text
        case "jsonl.gz" | "json.gz":
            return b"".join(map(gzip.compress, parts))
        case "jsonl.xz" | "json.xz":
            return (b"\0" * 8).join(map(lzma.compress, parts))  # with padding
        case "jsonl.zst" | "json.zst":
            skipped = struct.pack("<II", 0x184D2A51, 3) + b"any"
            return skipped.join(map(zstandard, parts))
        case "parquet":
            return parquet(records)
        case "arrow":
            return arrow(records)
        case "array_record":
            records = [json.dumps(record).encode() for record in records]
            return array_record(tmp_path, records, "group_size:10")


LARGE_GROUP = {"row_group_size": 10**6, "compression": "none"}
NAMES = (
    "a.jsonl",
    "a.jsonl.gz",
    "a.json.gz",
    "a.jsonl.xz",
    "a.json.xz",
    "a.jsonl.zst",
    "a.json.zst",
    "a.parquet",
    "a.arrow",
    "a.array_record",
)
DAMAGEABLE = ("a.jsonl.gz", "a.jsonl.xz", "a.jsonl.zst", "a.parquet", "a.arrow", "a.array_record")


def read(path, split="train", fraction=0.0, **options):
    options |= {"validation_fraction": fraction, "data_dir": pathlib.Path("not-used")}
    return list(sources.documents(str(path), split, **options))


def count(documents):
    return collections.Counter((d.text, d.label) for d in documents)


def refusal(path, **options) -> str:
    with pytest.raises(ValueError) as refused:
        read(path, **options)
    assert "\n" not in str(refused.value) and path.name in str(refused.value)
    return str(refused.value)


def test_the_tests_name_every_format():
    assert {text_files._ending(name) for name in NAMES} | {".txt"} == set(text_files.READERS)


@pytest.mark.parametrize("name", NAMES)
def test_every_document_of_a_source_appears_exactly_once(name, tmp_path):
    """Shards of a folder, one of them empty, in one split or in two."""
    folder = tmp_path / "corpus"
    folder.mkdir()
    (folder / f"{name}-00000-of-00003").write_bytes(content(name, RECORDS[:250], tmp_path))
    (folder / f"{name}-00001-of-00003").write_bytes(content(name, [], tmp_path))
    (folder / name.replace("a.", "b.")).write_bytes(content(name, RECORDS[250:], tmp_path))
    if "." in name[2:]:  # the end of the name says how a file is compressed
        (folder / f"{name}-00000-of-00003").rename(folder / f"0-of-3.{name}")
        (folder / f"{name}-00001-of-00003").rename(folder / f"1-of-3.{name}")
    assert count(read(folder)) == count(read(folder / "*")) == DOCUMENTS
    held_out, trained = (read(folder, split, 0.3) for split in ("validation", "train"))
    assert len(held_out) > 100 and count(held_out + trained) == DOCUMENTS


def test_the_same_documents_are_held_out_in_every_format(tmp_path):
    held_out = []
    for name in NAMES:
        (tmp_path / name).write_bytes(content(name, RECORDS, tmp_path))
        held_out.append(read(tmp_path / name, "validation", 0.2))
    assert held_out[0] and all(documents == held_out[0] for documents in held_out)


@pytest.mark.parametrize("name", DAMAGEABLE)
def test_a_truncated_file_is_never_read_as_a_shorter_one(name, tmp_path):
    whole = content(name, RECORDS[:300], tmp_path)
    cuts = {0, 1, 20, *range(40, len(whole), len(whole) // 12), len(whole) - 9, len(whole) - 1}
    if name == "a.arrow":  # and between two batches, where a reader sees no damage
        with pyarrow.ipc.open_stream(whole) as stream:
            stream.read_next_batch()
        cuts |= {n for n in range(0, len(whole), 8) if whole[n : n + 4] == b"\xff" * 4}
    for cut in sorted(cuts):
        (tmp_path / name).write_bytes(whole[:cut])
        assert "cannot be read" in refusal(tmp_path / name), cut


@pytest.mark.parametrize("name", DAMAGEABLE)
def test_a_changed_byte_is_refused_in_one_line_if_the_format_can_notice_it(name, tmp_path):
    """Arrow has no checksums, and zstd and Parquet may have none."""
    whole = content(name, RECORDS[:300], tmp_path)
    documents = read_whole(whole, tmp_path / f"whole{name[1:]}")
    places = [place for place in range(11, len(whole)) if whole[place]]  # zeros may be padding
    places = places[:: len(places) // 24]
    noticed = 0
    for place in places:
        damaged = bytearray(whole)
        damaged[place] ^= 0x10
        (tmp_path / name).write_bytes(damaged)
        try:
            found = read(tmp_path / name)
        except ValueError as error:
            assert "\n" not in str(error) and name in str(error)
            noticed += 1
        else:
            assert found == documents or not name.endswith(("gz", "xz", "array_record")), place
    assert noticed > len(places) / 2 or name == "a.arrow"


def read_whole(whole, path):
    path.write_bytes(whole)
    return read(path)


def test_a_damaged_later_stream_of_xz_is_not_the_end_of_the_file(tmp_path):
    one, two = lzma.compress(lines(RECORDS[:9])), lzma.compress(lines(RECORDS[9:20]))
    path = tmp_path / "a.jsonl.xz"
    path.write_bytes(one + b"\1" + two[1:])
    assert "a.jsonl.xz cannot be read after line 9 (" in refusal(path)
    path.write_bytes(one + two + b"\0" * 4)
    assert len(read(path)) == 20


def test_a_file_that_needs_much_memory_for_its_dictionary_is_refused(tmp_path):
    filters = [{"id": lzma.FILTER_LZMA2, "preset": 0, "dict_size": 1 << 20}]
    stream = bytearray(lzma.compress(lines(RECORDS), lzma.FORMAT_ALONE, filters=[
        {**filters[0], "id": lzma.FILTER_LZMA1}
    ]))  # fmt: skip
    stream[1:5] = struct.pack("<I", 0xC0000000)  # the header of this format has no checksum
    (tmp_path / "a.jsonl.xz").write_bytes(stream)
    assert "emory usage limit" in refusal(tmp_path / "a.jsonl.xz")


def column(**columns) -> bytes:
    pyarrow.parquet.write_table(pyarrow.table(columns), written := io.BytesIO())
    return written.getvalue()


def not_utf8(write) -> bytes:
    offsets = pyarrow.array([0, 3, 5, 6], pyarrow.int32()).buffers()[1]
    buffers = [None, offsets, pyarrow.py_buffer(b"abc\xffbc")]
    texts = pyarrow.Array.from_buffers(pyarrow.string(), 3, buffers)
    table = pyarrow.table({"text": texts})
    if write == "parquet":
        pyarrow.parquet.write_table(table, written := io.BytesIO())
    else:
        with pyarrow.ipc.new_stream(written := io.BytesIO(), table.schema) as stream:
            stream.write_table(table)
    return written.getvalue()


def outside() -> bytes:
    """An Arrow file whose text lies beyond its buffer."""
    batch = pyarrow.record_batch({"text": ["abc", "def"]})
    with pyarrow.ipc.new_stream(written := io.BytesIO(), batch.schema) as stream:
        stream.write_batch(batch)
    good = written.getvalue()
    three, six = (struct.pack("<3i", 0, 3, n) for n in (6, 2**30))
    assert good.count(three) == 1
    return good.replace(three, six)


def fewer_rows_than_the_footer_says() -> bytes:
    """The first number of rows in the footer is the file's, before those of its row groups."""
    written, size = bytearray(column(text=["a"] * 1000)), struct.calcsize("<I4s")
    footer = len(written) - size - struct.unpack("<I4s", written[-size:])[0]
    place = written.index(b"\x16\xd0\x0f", footer)  # 1000 in Thrift's compact encoding
    written[place : place + 3] = b"\x16\xd2\x0f"  # 1001
    return bytes(written)


def two_texts() -> bytes:
    columns = [pyarrow.array(["a"]), pyarrow.array(["b"])]
    table = pyarrow.Table.from_arrays(columns, names=["text", "text"])
    pyarrow.parquet.write_table(table, written := io.BytesIO())
    return written.getvalue()


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.parquet", column(content=["a"], id=[1]), 'no column "text" among content, id; set'),
        ("a.parquet", two_texts(), r'has 2 columns "text" among text, text; keep one of them'),
        (
            "a.parquet",
            column(text=["a"], id=pyarrow.array([2**62], pyarrow.timestamp("ns"))),
            r'record 0: "id" has a timestamp\[ns\] that Python cannot hold; store it as a string',
        ),
        ("a.parquet", column(text=[1, 2]), r'a\.parquet: "text" is int64, not string'),
        ("a.parquet", column(text=[b"a"]), r'a\.parquet: "text" is binary, not string'),
        ("a.parquet", column(text=[["a"]]), r'"text" is list<.*>, not string'),
        ("a.parquet", column(text=["a", "b", None]), r'record 2: "text" is not a string'),
        (
            "a.parquet",
            not_utf8("parquet"),
            r"t: record 1 is damaged \(.*UTF8.*\); mend it",
        ),
        ("a.parquet", fewer_rows_than_the_footer_says(), r"1,000 records, but 1,001 according to"),
        ("a.parquet", b"PAR1" + b"\0" * 90, r"a\.parquet cannot be read \("),
        ("a.arrow", not_utf8("arrow"), r"a\.arrow: record 1 is damaged \(.*UTF8.*\); mend it"),
        ("a.arrow", outside(), r"a\.arrow: record \d is damaged \(.*offset"),
        ("a.arrow", b"ARROW1\0\0" + b"\0" * 90, r"a\.arrow cannot be read \("),
        ("a.array_record", [b"text", b"\xff"], r"a\.array_record: record 1 cannot be read \(Unico"),
        ("a.array_record", [b"{}"], r'record 0 has no "text" .its fields: none.; set config'),
        ("a.array_record", [b"t", b'{"text": 1}'], r'record 1: "text" is not a string; mend it'),
        ("a.array_record", [b'{"a": ' + b"[" * 10**5], r"record 0 cannot be read \(Recursion"),
        ("a.array_record", b"text" * 40_000, r"a\.array_record cannot be read at record 0 \("),
        ("a.jsonl.zst", zstandard(b'{"text": "a"}\n{"text": "cut'), r"a\.jsonl\.zst:2 is not a J"),
        ("a.jsonl.zst", zstandard(b'{"text": "\xff"}'), r"a\.jsonl\.zst is not UTF-8 \(.*line 1"),
        ("a.jsonl.zst", zstandard(b'\n{"a": ' + b"[" * 10**5), r"zst:2 cannot be read \(Recursio"),
        ("a.jsonl.zst", zstandard('{"text": "a word"}'.encode("utf-16")), r"zst is UTF-16, not UT"),
        ("a.jsonl.zst", b"not compressed", r"a\.jsonl\.zst cannot be read \("),
        ("a.jsonl.gz", b"", r"a\.jsonl\.gz cannot be read \(it is empty"),
    ],
)
def test_a_record_that_cannot_be_used_is_refused_in_one_line_with_its_place(
    name, content, message, tmp_path
):
    content = array_record(tmp_path, content) if isinstance(content, list) else content
    (tmp_path / name).write_bytes(content)
    sources.check(str(tmp_path))
    with pytest.raises(ValueError, match=message):
        read(tmp_path)
    refusal(tmp_path / name)


def test_an_array_record_may_hold_plain_texts(tmp_path):
    texts = ["one", "", "zwei\n", "\0", "🙂", " {}"]
    written = array_record(tmp_path, [text.encode() for text in texts])
    (tmp_path / "a.array_record").write_bytes(written)
    assert [(d.text, d.label) for d in read(tmp_path)] == [(text, "all") for text in texts]
    marked = array_record(tmp_path, [b'\xef\xbb\xbf{"text": "after a mark"}'])
    (tmp_path / "a.array_record").write_bytes(marked)
    assert [d.text for d in read(tmp_path)] == ["after a mark"]
    (tmp_path / "features.json").touch()
    with pytest.raises(ValueError, match="belongs to a TFDS dataset; .*, and give tfds:NAME"):
        read(tmp_path)


@pytest.mark.parametrize("name", [*DAMAGEABLE, "a.jsonl"])
def test_a_text_beyond_max_line_is_refused_with_its_record(name, tmp_path):
    records = [{"text": "short"}, {"text": "x" * 5000}]
    (tmp_path / name).write_bytes(content(name, records, tmp_path))
    assert len(read(tmp_path / name, reading=policy.Reading(max_line=6000))) == 2
    said = refusal(tmp_path / name, reading=policy.Reading(max_line=4000))
    assert f"{name}:2 is longer than" in said or f"{name}: record 1 is longer than" in said


def peak_bytes(action) -> int:
    """How much the process grows at most, C++ libraries included."""
    status = pathlib.Path("/proc/self/status")
    before = int(status.read_text().split("VmRSS:")[1].split()[0])
    try:
        pathlib.Path("/proc/self/clear_refs").write_text("5")  # forgets the peak so far
    except OSError:
        pytest.skip("the peak of memory can be reset on Linux only")
    action()
    return 1024 * (int(status.read_text().split("VmHWM:")[1].split()[0]) - before)


@pytest.mark.parametrize("name", ["a.jsonl.gz", "a.jsonl.xz", "a.jsonl.zst"])
def test_a_line_without_an_end_is_refused_in_little_memory(name, tmp_path):
    piece = b"a" * 8_000_000
    compress = {"gz": lambda b: gzip.compress(b, 1), "xz": lzma.compress, "zst": zstandard}
    member = compress[name.rpartition(".")[2]]
    path = tmp_path / name
    path.write_bytes(member(b'{"text": "short"}\n{"text": "') + member(piece) * 25)
    said = []
    grown = peak_bytes(
        lambda: said.append(refusal(path, reading=policy.Reading(max_line=2_000_000)))
    )
    assert "2 is longer than the 2,000,000 characters" in said[0] and grown < 60_000_000


def test_row_groups_are_streamed(tmp_path):
    """One group of 60 MB of texts in pages of 1 MB, and one text that a dictionary repeats."""
    many = parquet([{"text": f"{n:05d}" * 600} for n in range(20_000)], **LARGE_GROUP)
    equal = parquet([{"text": "x" * 60_000}] * 1000, **LARGE_GROUP)
    options = {"validation_fraction": 0.0, "data_dir": tmp_path}
    for written in (many, equal):
        (tmp_path / "a.parquet").write_bytes(written)
        before = pyarrow.total_allocated_bytes()
        size = most = 0
        for document in sources.documents(str(tmp_path), "train", **options):
            size += len(document.text)
            most = max(most, pyarrow.total_allocated_bytes() - before)
        assert size == 60_000_000 and most < 15_000_000


def saved(folder, records, shards=2):
    """A folder as `Dataset.save_to_disk` writes it."""
    folder.mkdir(parents=True)
    names = [f"data-{n:05d}-of-{shards:05d}.arrow" for n in range(shards)]
    for n, name in enumerate(names):
        (folder / name).write_bytes(arrow(records[n::shards]))
    state = {"_data_files": [{"filename": name} for name in names], "_split": None}
    (folder / "state.json").write_text(json.dumps(state))
    return state


def test_a_dataset_saved_on_disk_is_its_data_without_caches(tmp_path):
    saved(tmp_path / "one", RECORDS)
    (tmp_path / "one" / "cache-0123456789abcdef.arrow").write_bytes(arrow(RECORDS))
    assert count(read(tmp_path / "one")) == DOCUMENTS
    assert count(read(tmp_path / "one" / "*.arrow")) == DOCUMENTS
    for split, records in (("train", RECORDS[:9]), ("validation", RECORDS[9:12]), ("test", [])):
        saved(tmp_path / "dict" / split, records)
    (tmp_path / "dict" / "dataset_dict.json").write_text('{"splits": ["train", "validation"]}')
    assert len(read(tmp_path / "dict")) == 9 and len(read(tmp_path / "dict", "validation")) == 3


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"_data_files": [{"filename": "data-2.arrow"}]}, "names data-2.arrow, which is not besid"),
        ({"_data_files": [{"filename": "../b.arrow"}]}, r"names \.\./b\.arrow, which is not besid"),
        ({"_data_files": None}, "names no data files"),
        ({"_indices_data_files": [{"filename": "indices.arrow"}]}, "a selection of rows; flatten"),
    ],
)
def test_a_saved_dataset_that_lacks_a_file_is_refused_before_anything_is_read(
    change, message, tmp_path
):
    state = saved(tmp_path / "one", RECORDS[:9])
    (tmp_path / "b.arrow").write_bytes(arrow(RECORDS[:9]))
    (tmp_path / "one" / "state.json").write_text(json.dumps(state | change))
    with pytest.raises(ValueError, match=message):
        sources.check(str(tmp_path / "one"))


@pytest.mark.parametrize("name", DAMAGEABLE)
def test_a_changed_corpus_has_another_fingerprint(name, tmp_path):
    prints = set()
    for records, renamed in ((RECORDS[:9], name), (RECORDS[:8], name), (RECORDS[:9], f"b{name}")):
        folder = tmp_path / str(len(prints))
        folder.mkdir()
        (folder / renamed).write_bytes(content(name, records, tmp_path))
        prints.add(sources.fingerprint(str(folder), tmp_path))
    assert len(prints) == 3
