"""Safetensors: read and written as the package does it, lazily, and refused when hostile."""

import json
import os
import pathlib
import struct
from unittest import mock

import hypothesis
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import safetensors as package
import safetensors.numpy as oracle
from hypothesis import strategies as st

from moe_jax.hf import safetensors

NAMES = "bool_ uint8 int8 uint16 int16 uint32 int32 uint64 int64 float16 float32 float64".split()
DTYPES = [np.dtype(name) for name in NAMES if name != "bool_"] + [
    np.dtype(np.bool_),
    np.dtype(ml_dtypes.bfloat16),
    np.dtype(ml_dtypes.float8_e4m3fn),
    np.dtype(ml_dtypes.float8_e5m2),
]
FLOAT8 = {np.dtype(ml_dtypes.float8_e4m3fn), np.dtype(ml_dtypes.float8_e5m2)}
# A byte first, so that all that follows is unaligned; a scalar; nothing, in three ways.
SHAPES = {"byte": (1,), "w": (5, 3, 4), "scalar": (), "none": (0,), "no": (3, 0, 2), "last": (7,)}


def tensors_of(dtype):
    rng = np.random.default_rng(0)
    tensors = {name: np.asarray(rng.normal(size=s) * 3).astype(dtype) for name, s in SHAPES.items()}
    return {**tensors, "byte": np.array([7], np.uint8)}


def write(folder, tensors, **kwargs):
    plan = {name: (x.shape, x.dtype) for name, x in tensors.items()}
    with safetensors.Writer(folder, plan, **kwargs) as writer:
        for name, x in tensors.items():
            writer.write(name, x)


def read(folder):
    return {name: tensor.read() for name, tensor in safetensors.open_folder(folder).items()}


def assert_same(got, want):
    assert got.keys() == want.keys()
    for name in want:
        assert (got[name].dtype, got[name].shape) == (want[name].dtype, want[name].shape), name
        assert got[name].tobytes() == want[name].tobytes(), name


def entry(dtype="F32", shape=(2,), offsets=(0, 8), **more):
    return {"dtype": dtype, "shape": list(shape), "data_offsets": list(offsets), **more}


def content(header, data=b"\1" * 8, n=None):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text) if n is None else n) + text + data


# ---------------------------------------------------------------------------- against the package


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_what_is_written_is_read_here_and_by_the_package(dtype, tmp_path):
    tensors = tensors_of(dtype)
    write(tmp_path, tensors)
    assert_same(read(tmp_path), tensors)
    assert list(tmp_path.iterdir()) == [tmp_path / "model.safetensors"]
    if dtype not in FLOAT8:  # the package writes these, but does not read them as numpy
        assert_same(oracle.load_file(tmp_path / "model.safetensors"), tensors)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_what_the_package_writes_is_read(dtype, tmp_path):
    tensors = tensors_of(dtype)
    oracle.save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    assert_same(read(tmp_path), tensors)


def test_one_tensor_is_written_in_the_bytes_of_the_package(tmp_path):
    write(tmp_path, {"w": np.arange(6, dtype=np.float32)})
    want = oracle.save({"w": np.arange(6, dtype=np.float32)}, metadata={"format": "pt"})
    assert (tmp_path / "model.safetensors").read_bytes() == want


def test_views_and_jax_arrays_are_written_by_their_values(tmp_path):
    x = np.arange(24, dtype=np.float32).reshape(4, 6)
    write(tmp_path, {"view": x.T[1:, ::2], "jax": jnp.asarray(x, jnp.bfloat16)})
    assert_same(read(tmp_path), {"view": x.T[1:, ::2], "jax": x.astype(ml_dtypes.bfloat16)})


SOUND = {"a": entry(), "b": entry("F16", (2, 2), (8, 16)), "__metadata__": {"format": "pt"}}


@hypothesis.settings(derandomize=True, max_examples=300, deadline=None, database=None)
@hypothesis.given(st.lists(st.tuples(st.integers(0, 170), st.integers(32, 126)), max_size=2))
def test_a_damaged_file_is_refused_or_read_as_the_package_reads_it(tmp_path_factory, flips):
    folder = tmp_path_factory.getbasetemp()
    damaged = bytearray(content(SOUND, bytes(range(16))))
    for position, byte in flips:
        damaged[position] = byte
    (folder / "model.safetensors").write_bytes(damaged)
    try:
        got = read(folder)
    except safetensors.FormatError:
        return
    assert_same(got, oracle.load(bytes(damaged)))


# ----------------------------------------------------------------------------------- partial reads


@pytest.fixture(scope="module")
def unaligned(tmp_path_factory):
    folder = tmp_path_factory.mktemp("unaligned")
    tensors = tensors_of(ml_dtypes.bfloat16)
    write(folder, tensors)
    return tensors, safetensors.open_folder(folder)


def slices(n):
    bound = st.none() | st.integers(-n - 2, n + 2)
    return st.builds(slice, bound, bound, st.sampled_from([None, 1]))


@hypothesis.settings(derandomize=True, max_examples=150, deadline=None, database=None)
@hypothesis.given(
    st.sampled_from(sorted(SHAPES)).flatmap(
        lambda name: st.tuples(st.just(name), st.tuples(*map(slices, SHAPES[name])))
    ),
    st.integers(0, 3),
    st.sampled_from([1, 50, 1 << 26]),
)
def test_a_partial_read_is_numpys_slice_however_much_is_mapped(unaligned, indexed, rank, n_bytes):
    tensors, lazy = unaligned
    name, index = indexed
    with mock.patch.object(safetensors, "_MAPPED_BYTES", n_bytes):
        got = lazy[name].read(index[:rank])
    assert_same({name: got}, {name: tensors[name][index[:rank]]})
    assert got.flags.c_contiguous and got.flags.owndata and got.flags.writeable


@pytest.mark.parametrize(
    "index", [(slice(None, None, 2),), (slice(None, None, -1),), (0,), (slice(1),) * 4], ids=str
)
def test_another_index_than_slices_of_step_1_is_refused(unaligned, index):
    with pytest.raises(ValueError, match=r"of shape \[5, 3, 4\]: give slices of step 1"):
        unaligned[1]["w"].read(index)


def test_a_slice_of_a_tensor_larger_than_memory_is_read_and_nothing_stays_mapped(tmp_path):
    n = 1 << 40
    path = tmp_path / "model.safetensors"
    path.write_bytes(content({"a": entry("U8", (4, n // 4), (0, n))}, b""))
    begin = path.stat().st_size
    os.truncate(path, begin + n)  # a hole, which takes no disk
    with path.open("r+b") as stream:
        stream.seek(begin + 2 * n // 4 + 5)
        stream.write(b"abc")
    part = safetensors.open_folder(tmp_path)["a"].read((slice(2, 3), slice(4, 9)))
    assert part.tobytes() == b"\0abc\0"
    assert str(path) not in pathlib.Path("/proc/self/maps").read_text()


def test_a_file_that_shrank_since_it_was_opened_is_refused(tmp_path):
    write(tmp_path, {"w": np.ones(5000, np.float32)})
    tensor = safetensors.open_folder(tmp_path)["w"]
    os.truncate(tmp_path / "model.safetensors", 300)
    with pytest.raises(safetensors.FormatError, match="shorter than when its header was read"):
        tensor.read()


def test_a_bool_that_is_neither_0_nor_1_is_refused(tmp_path):
    """numpy would hold it, equal to True and summed as 2."""
    data = content({"a": entry("BOOL", (3,), (0, 3))}, b"\0\1\2")
    (tmp_path / "model.safetensors").write_bytes(data)
    tensor = safetensors.open_folder(tmp_path)["a"]
    assert tensor.read((slice(2),)).tolist() == [False, True]
    with pytest.raises(safetensors.FormatError, match="neither 0 nor 1"):
        tensor.read()


# ----------------------------------------------------------------------------------- hostile files

A = json.dumps(entry()).encode()
LETS_PASS = {  # by the package, version 0.8
    "a tensor twice": (b'{"a":%s,"a":%s}' % (A, A), "'a' comes twice"),
    "a key of the metadata twice": (
        b'{"__metadata__":{"k":"1","k":"2"},"a":%s}' % A,
        "'k' comes twice",
    ),
    "an unknown key": ({"a": entry(more=1)}, "'a' is not dtype, shape and data_offsets"),
    "an entry that is a list": (b'{"a":["F32",[2],[0,8]]}', "'a' is not dtype, shape and"),
    "metadata that are null": ({"__metadata__": None, "a": entry()}, "not a map of strings"),
    "a space before the header": (b' {"a":%s}' % A, "does not start with {"),
}
REFUSES = {
    "a key of an entry twice": (
        b'{"a":{"dtype":"F32","dtype":"I32","shape":[2],"data_offsets":[0,8]}}',
        "'dtype' comes twice",
    ),
    "no shape": ({"a": {"dtype": "F32", "data_offsets": [0, 8]}}, "'a' is not dtype, shape and"),
    "an unknown dtype": ({"a": entry("F33")}, "'a' has dtype 'F33', not one of BOOL, BF16"),
    "a dtype that is a list": ({"a": entry(["F32"])}, r"'a' has dtype \['F32'\]"),
    "a negative dimension": ({"a": entry(shape=(-2,))}, r"but .*\[-2\]"),
    "two negative dimensions": ({"a": entry(shape=(-1, -2))}, r"but .*\[-1, -2\]"),
    "a dimension with a point": ({"a": entry(shape=(2.0,))}, r"but .*\[2.0\]"),
    "a dimension that is a bool": ({"a": entry(shape=(True, 2))}, r"but .*\[True, 2\]"),
    "a dimension that is a string": ({"a": entry(shape=("2",))}, r"but .*\['2'\]"),
    "a shape that is null": ({"a": {**entry(), "shape": None}}, r"but .*'shape': None"),
    "a dimension of 5000 digits": (b'{"a":{"shape":[%s]}}' % (b"9" * 5000), "4300 digits"),
    "dimensions that overflow 64 bits": (
        {"a": entry(shape=(2**32, 2**32, 2), offsets=(0, 8))},
        "more than can be addressed",
    ),
    "an overflow beside a dimension of 0": (
        {"a": entry(shape=(2**63, 0), offsets=(0, 0))},
        "more than can be addressed",
    ),
    "65 dimensions": ({"a": entry(shape=(1,) * 65, offsets=(0, 4))}, "'a' is not dtype, shape"),
    "other bytes than the shape's": ({"a": entry(shape=(3,))}, "8 bytes, not its shape's 12"),
    "an end before the begin": ({"a": entry(offsets=(8, 0))}, "-8 bytes, not its shape's 8"),
    "a negative offset": ({"a": entry(offsets=(-8, 0))}, r"but .*\[-8, 0\]"),
    "three offsets": ({"a": entry(offsets=(0, 8, 8))}, r"but .*\[0, 8, 8\]"),
    "an overlap": (
        {"a": entry("U8", (8,)), "b": entry("U8", (4,), (4, 8))},
        "'b' overlaps another tensor",
    ),
    "an empty tensor inside another": (
        {"a": entry(), "b": entry(shape=(0,), offsets=(4, 4))},
        "'b' overlaps another tensor",
    ),
    "the same bytes twice": ({"a": entry(), "b": entry()}, "'b' overlaps another tensor"),
    "a hole": (
        {"a": entry("U8", (2,), (0, 2)), "b": entry("U8", (4,), (4, 8))},
        "'b' follows a hole",
    ),
    "a hole at the start": ({"a": entry("F32", (1,), (4, 8))}, "'a' follows a hole"),
    "bytes at the end": ({"a": entry("F32", (1,), (0, 4))}, "4 bytes at its end are of no tensor"),
    "a truncated file": ({"a": entry(shape=(4,), offsets=(0, 16))}, "truncated: .*download it"),
    "NaN": (b'{"a":{"dtype":"F32","shape":[NaN],"data_offsets":[0,8]}}', "'NaN' is not a finite"),
    "1e400": (b'{"a":{"dtype":"F32","shape":[1e400],"data_offsets":[0,8]}}', "'1e400' is not a"),
    "metadata of numbers": ({"__metadata__": {"k": 1}, "a": entry()}, "not a map of strings"),
    "metadata that are a list": ({"__metadata__": [], "a": entry()}, "not a map of strings"),
    "a list": (b"[]", "does not start with {"),
    "no JSON": (b"{'a': 1}", "property name"),
    "two objects": (b"{}{}", "Extra data"),
    "a NUL at the end": (b'{"a":%s}\0' % A, "Extra data"),
    "a byte order mark": (b"\xef\xbb\xbf{}", "does not start with {"),
    "UTF-16": ('{"a":1}'.encode("utf-16-le"), "property name"),
    "no UTF-8": (b'{"\xff":%s}' % A, "utf-8"),
    "half of a surrogate pair": (b'{"\\ud800":%s}' % A, "surrogates not allowed"),
    "nesting 100000 deep": (b'{"a":%s}' % (b"[" * 100000 + b"]" * 100000), "recursion"),
}
HEADERS = {**LETS_PASS, **REFUSES}
CUT = {
    "an empty file": (b"", "it has 0 bytes, too few"),
    "7 bytes": (b"\0" * 7, "it has 7 bytes, too few"),
    "a header of no bytes": (content(b"", b""), "does not start with {"),
    "a header longer than the file": (content({}, n=10**6), "1000000 bytes of 18; download"),
    "a header of 2^63 bytes": (content({}, n=2**63), "9223372036854775808 bytes of 18"),
}
FILES = CUT | {why: (content(header), match) for why, (header, match) in HEADERS.items()}


@pytest.mark.parametrize("why", FILES)
def test_a_hostile_file_is_refused_in_one_line_that_names_it(why, tmp_path):
    data, match = FILES[why]
    (tmp_path / "model.safetensors").write_bytes(data)
    with pytest.raises(safetensors.FormatError, match=match) as error:
        safetensors.open_folder(tmp_path)
    assert str(error.value).startswith(f"{tmp_path / 'model.safetensors'} is refused: ")
    assert "\n" not in str(error.value) and len(str(error.value)) < 1000


@pytest.mark.parametrize("why", sorted(FILES.keys() - LETS_PASS.keys()))
def test_the_package_refuses_those_too_but_for_the_ones_it_lets_pass(why):
    with pytest.raises((package.SafetensorError, ValueError)):
        oracle.load(FILES[why][0])


def test_a_header_longer_than_100_MB_is_refused_unread(tmp_path):
    n = 100_000_001
    path = tmp_path / "model.safetensors"
    path.write_bytes(struct.pack("<Q", n))
    os.truncate(path, 8 + n)
    with pytest.raises(safetensors.FormatError, match="its header would be 100000001 bytes"):
        safetensors.open_folder(tmp_path)


def test_offsets_in_any_order_are_read(tmp_path):
    header = {
        "b": entry("U8", (4,), (4, 8)),
        "a": entry("U8", (4,), (0, 4)),
        "c": entry("U8", (0,)),
    }
    header["c"]["data_offsets"] = [4, 4]
    data = content(header, b"\0\1\2\3\4\5\6\7")
    (tmp_path / "model.safetensors").write_bytes(data)
    assert_same(read(tmp_path), oracle.load(data))


# -------------------------------------------------------------------------------- shards and index


def sharded(folder):
    tensors = {name: np.full(4, i, np.float32) for i, name in enumerate("abcde")}
    write(folder, tensors, max_shard_bytes=40)
    return tensors


def test_shards_are_bounded_and_their_index_is_complete(tmp_path):
    sizes = {"a": 10, "b": 30, "c": 41, "d": 1, "e": 39, "f": 1}
    tensors = {name: np.full(n, n, np.uint8) for name, n in sizes.items()}
    write(tmp_path, tensors, max_shard_bytes=40)
    files = [f"model-0000{i}-of-00004.safetensors" for i in range(1, 5)]
    shards = [oracle.load_file(tmp_path / file) for file in files]
    assert [list(shard) for shard in shards] == [["a", "b"], ["c"], ["d", "e"], ["f"]]
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    assert index["metadata"] == {"total_size": sum(sizes.values())}
    placed = {name: file for file, shard in zip(files, shards, strict=True) for name in shard}
    assert index["weight_map"] == placed
    assert_same(read(tmp_path), tensors)
    assert len(list(tmp_path.iterdir())) == 5


def test_a_single_file_beside_an_index_of_other_files_is_refused_with_both_names(tmp_path):
    """One is left from an earlier save, and only the reader's order would decide which is read."""
    sharded(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"not looked at")
    match = (
        r"has model\.safetensors and model\.safetensors\.index\.json of other files: .* remove it"
    )
    with pytest.raises(safetensors.FormatError, match=match):
        safetensors.open_folder(tmp_path)


def test_an_index_of_the_single_file_is_read(tmp_path):
    tensors = {"a": np.ones(3, np.float32)}
    write(tmp_path, tensors)
    index = {"metadata": {}, "weight_map": {"a": "model.safetensors"}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    assert_same(read(tmp_path), tensors)


@pytest.mark.parametrize(
    "beside",
    [
        "pytorch_model.bin",
        "pytorch_model.bin.index.json",
        "consolidated.safetensors",
        "model.fp16.safetensors",
        "model-00001-of-00002.safetensors",
        "optimizer.pt",
    ],
)
def test_files_that_transformers_does_not_read_decide_nothing(beside, tmp_path):
    tensors = {"a": np.ones(3, np.float32)}
    write(tmp_path, tensors)
    (tmp_path / beside).write_bytes(b"not looked at")
    assert_same(read(tmp_path), tensors)


@pytest.mark.parametrize("other", ["consolidated.safetensors", "model-00001-of-00002.safetensors"])
def test_a_file_of_another_name_is_named_when_there_is_no_other(other, tmp_path):
    (tmp_path / other).write_bytes(b"not looked at")
    with pytest.raises(safetensors.FormatError, match=f"has '{other}' but neither"):
        safetensors.open_folder(tmp_path)


def test_a_folder_with_an_adapter_is_another_model(tmp_path):
    write(tmp_path, {"a": np.ones(3, np.float32)})
    (tmp_path / "adapter_config.json").write_text("{}")
    with pytest.raises(safetensors.FormatError, match="another one with an adapter; merge them"):
        safetensors.open_folder(tmp_path)


FIRST, LAST = "model-00001-of-00003.safetensors", "model-00003-of-00003.safetensors"


@pytest.mark.parametrize(
    "place, match",
    [
        ({"a": "../outside.safetensors"}, "'../outside.safetensors' is not a plain file name"),
        ({"a": "/etc/passwd"}, "'/etc/passwd' is not a plain file name"),
        ({"a": ".."}, "'..' is not a plain file name"),
        ({"a": ""}, "'' is not a plain file name"),
        ({"a": "a\0b"}, r"'a\\x00b' is not a plain file name"),
        ({"a": "a\nb"}, r"'a\\nb' is not a plain file name"),
        ({"a": "\ud800"}, r"'\\ud800' is not a plain file name"),
        ({"a": "x" * 300}, "File name too long"),
        ({"a": "."}, "is not a regular file"),
        ({"a": "absent.safetensors"}, "absent.safetensors cannot be opened: No such file"),
        ({"a": 1}, "no weight_map"),
        ({"a": None}, "no weight_map"),
        ({"z": FIRST}, f"{FIRST} lacks 'z', against"),
        ({"a": LAST}, f"{FIRST} holds 'a', against"),
    ],
    ids=str,
)
def test_an_index_that_places_a_tensor_where_it_is_not_is_refused(place, match, tmp_path):
    sharded(tmp_path)
    path = tmp_path / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    index["weight_map"].update(place)
    path.write_text(json.dumps(index))
    with pytest.raises(safetensors.FormatError, match=match):
        safetensors.open_folder(tmp_path)


def test_a_tensor_in_two_shards_is_refused(tmp_path):
    sharded(tmp_path)
    oracle.save_file({n: np.ones(1, np.float32) for n in "abe"}, tmp_path / LAST)
    with pytest.raises(safetensors.FormatError, match=f"{LAST} holds 'a', against"):
        safetensors.open_folder(tmp_path)


@pytest.mark.parametrize(
    "text, match",
    [
        (b'{"weight_map":{"a":"x","a":"y"}}', "'a' comes twice"),
        (b'{"weight_map":{"a":"x"},"weight_map":{"a":"y"}}', "'weight_map' comes twice"),
        (b'{"metadata":{"total_size":1e400},"weight_map":{"a":"x"}}', "'1e400' is not a finite"),
        (b'{"metadata":{"total_size":Infinity}}', "'Infinity' is not a finite number"),
        (b'{"weight_map":[]}', "no weight_map"),
        (b'{"weight_map":{}}', "no weight_map"),
        (b"{}", "no weight_map"),
        (b"[]", "does not start with {"),
        (b"", "does not start with {"),
        (b'{"a":' * 100000, "recursion"),
    ],
    ids=lambda x: x[:40] if isinstance(x, bytes) else "",
)
def test_a_hostile_index_is_refused_in_one_line_that_names_it(text, match, tmp_path):
    path = tmp_path / "model.safetensors.index.json"
    path.write_bytes(text)
    with pytest.raises(safetensors.FormatError, match=match) as error:
        safetensors.open_folder(tmp_path)
    assert str(error.value).startswith(f"{path} is refused: ")
    assert "\n" not in str(error.value)


def test_an_index_longer_than_its_limit_is_refused(tmp_path):
    sharded(tmp_path)
    with mock.patch.object(safetensors, "_MAX_JSON_BYTES", 200):
        with pytest.raises(safetensors.FormatError, match="longer than 200 bytes"):
            safetensors.open_folder(tmp_path)


def test_a_pickle_is_never_opened(tmp_path):
    for name in ("pytorch_model.bin", "model.safetensors.bin"):
        os.mkfifo(tmp_path / name)  # opening one would hang
    with pytest.raises(safetensors.FormatError, match="a pickle runs code .* convert it elsewhere"):
        safetensors.open_folder(tmp_path)


def test_a_folder_without_weights_says_what_is_missing(tmp_path):
    for folder in (tmp_path, tmp_path / "absent"):
        with pytest.raises(safetensors.FormatError, match="neither .* is the download complete?"):
            safetensors.open_folder(folder)


# ------------------------------------------------------------------------------------------- links


@pytest.fixture
def snapshot(tmp_path):
    """A Hugging Face cache with two models; the snapshot of the one named ours."""
    for model in ("models--x--ours", "models--x--theirs"):
        (tmp_path / model / "blobs").mkdir(parents=True)
        (tmp_path / model / "blobs" / "0a1b").write_text(model)
    folder = tmp_path / "models--x--ours" / "snapshots" / "abc"
    folder.mkdir(parents=True)
    return folder


def test_a_snapshot_of_the_cache_may_link_to_the_blobs_of_its_model(snapshot):
    (snapshot / "config.json").symlink_to("../../blobs/0a1b")
    path = safetensors.resolve_inside(snapshot, "config.json")
    assert path.read_text() == "models--x--ours" and path.parent.name == "blobs"


def test_weights_are_read_through_links(snapshot):
    blob = snapshot.parents[1] / "blobs" / "weights"
    blob.write_bytes(oracle.save({"a": np.ones(3, np.float32)}))
    (snapshot / "model.safetensors").symlink_to("../../blobs/weights")
    assert_same(read(snapshot), {"a": np.ones(3, np.float32)})


def test_a_link_may_lead_to_elsewhere_in_the_folder_and_the_folder_may_be_a_link(tmp_path):
    folder = tmp_path / "model"
    (folder / "inner").mkdir(parents=True)
    (folder / "inner" / "file").write_text("here")
    (folder / "config.json").symlink_to("inner/file")
    (tmp_path / "link").symlink_to("model")
    for way in (folder, tmp_path / "link"):
        assert safetensors.resolve_inside(way, "config.json").read_text() == "here"


@pytest.mark.parametrize(
    "target",
    [
        "/etc/passwd",
        "../../../models--x--theirs/blobs/0a1b",
        "../../refs",
        "../../blobs/sideways",
        "../../blobs/deeper/file",
        "../other/file",
        "through/passwd",
    ],
)
def test_a_link_out_of_the_folder_is_refused(snapshot, target):
    model = snapshot.parents[1]
    (model / "refs").write_text("")
    (model / "blobs" / "sideways").symlink_to("../../models--x--theirs/blobs/0a1b")
    for folder in (model / "blobs" / "deeper", snapshot.parent / "other"):
        folder.mkdir()
        (folder / "file").write_text("")
    (snapshot / "through").symlink_to("/etc")
    (snapshot / "config.json").symlink_to(target)
    with pytest.raises(safetensors.FormatError, match="config.json is a link out of its folder"):
        safetensors.resolve_inside(snapshot, "config.json")


@pytest.mark.parametrize("layout", ["models--x--ours/snapshot/abc", "x/snapshots/abc"])
def test_blobs_elsewhere_than_in_a_cache_are_out_of_the_folder(layout, tmp_path):
    folder = tmp_path / layout
    folder.mkdir(parents=True)
    (folder.parents[1] / "blobs").mkdir()
    (folder.parents[1] / "blobs" / "0a1b").write_text("")
    (folder / "config.json").symlink_to("../../blobs/0a1b")
    with pytest.raises(safetensors.FormatError, match="a link out of its folder"):
        safetensors.resolve_inside(folder, "config.json")


@pytest.mark.parametrize("kind", ["fifo", "folder", "loop", "dangling", "absent"])
def test_what_is_no_regular_file_is_refused(kind, tmp_path):
    path = tmp_path / kind
    if kind == "fifo":
        os.mkfifo(path)
    elif kind == "folder":
        path.mkdir()
    elif kind == "loop":
        path.symlink_to(kind)
    elif kind == "dangling":
        path.symlink_to("nothing")
    with pytest.raises(safetensors.FormatError, match="not a regular file|loop|No such file"):
        safetensors.resolve_inside(tmp_path, kind)


# --------------------------------------------------------------------------------- writing wrongly

PLAN = {"a": ((2, 3), np.dtype(np.float32)), "b": ((1,), np.dtype(np.int32))}
X, Y = np.zeros((2, 3), np.float32), np.zeros(1, np.int32)


@pytest.mark.parametrize(
    "writes, match",
    [
        ([], "lacks 'a'"),
        ([("a", X)], "lacks 'b'"),
        ([("b", Y)], "'b' is not the next tensor to write: that is 'a'"),
        ([("a", X), ("a", X)], "'a' is not the next tensor to write: that is 'b'"),
        ([("a", X), ("b", Y), ("c", Y)], "'c' is not the next tensor to write: that is none"),
        ([("a", X.T)], r"'a' is float32\[3, 2\], not float32\[2, 3\]"),
        ([("a", X.astype(np.float64))], r"'a' is float64\[2, 3\], not float32\[2, 3\]"),
        ([("a", X.astype(">f4"))], r"'a' is >f4\[2, 3\], not float32"),
    ],
)
def test_writing_other_tensors_than_planned_is_refused(writes, match, tmp_path):
    with pytest.raises(ValueError, match=match):
        with safetensors.Writer(tmp_path, PLAN) as writer:
            for name, x in writes:
                writer.write(name, x)


@pytest.mark.parametrize(
    "plan, match",
    [
        ({}, "no tensors"),
        ({"a": ((1,), np.dtype(np.complex128))}, "'a' of complex128 has no place"),
        ({"a": ((1,), np.dtype(">f4"))}, "'a' of >f4 has no place"),
        ({"__metadata__": ((1,), np.dtype(np.float32))}, "'__metadata__' of float32 has no place"),
    ],
)
def test_a_plan_that_the_format_cannot_hold_is_refused_before_a_file_is_made(plan, match, tmp_path):
    with pytest.raises(ValueError, match=match):
        safetensors.Writer(tmp_path, plan)
    assert not list(tmp_path.iterdir())


def test_files_of_before_are_not_mixed_with_those_written(tmp_path):
    sharded(tmp_path)
    with pytest.raises(FileExistsError, match="write in an empty folder"):
        safetensors.Writer(tmp_path, PLAN)


def test_an_error_within_the_with_is_the_one_that_is_seen(tmp_path):
    with pytest.raises(KeyError):
        with safetensors.Writer(tmp_path, PLAN) as writer:
            writer.write("a", X)
            raise KeyError
