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
    write(tmp_path, {"a": np.zeros(4, np.float32)})
    with pytest.raises(FileExistsError, match="write in an empty folder"):
        safetensors.Writer(tmp_path, PLAN)


def test_an_error_within_the_with_is_the_one_that_is_seen(tmp_path):
    with pytest.raises(KeyError):
        with safetensors.Writer(tmp_path, PLAN) as writer:
            writer.write("a", X)
            raise KeyError
