"""Reads safetensors files lazily by byte range and writes them tensor by tensor.

Nothing in a file is trusted. There are two reasons not to use the safetensors package. A converter
reads one part of one tensor at a time: it must neither keep the file mapped (mapped pages count as
resident memory) nor hold the whole file that it writes in memory. And the package accepts a tensor
named twice, unknown keys in an entry, and a header that starts with a space. The format:
https://github.com/huggingface/safetensors#format.
"""

import collections
import dataclasses
import io
import json
import math
import pathlib
import reprlib
import stat
import struct
import sys
from collections.abc import Mapping
from typing import BinaryIO

import ml_dtypes
import numpy as np

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
ADAPTER = "adapter_config.json"

_DTYPES = {
    "BOOL": np.dtype(np.bool_),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "F8_E4M3": np.dtype(ml_dtypes.float8_e4m3fn),
    "F8_E5M2": np.dtype(ml_dtypes.float8_e5m2),
}
_DTYPES |= {f"F{8 * n}": np.dtype(f"f{n}") for n in (2, 4, 8)}
_DTYPES |= {f"{kind}{8 * n}": np.dtype(f"{kind.lower()}{n}") for kind in "IU" for n in (1, 2, 4, 8)}
_CODES = {dtype: code for code, dtype in _DTYPES.items()}
_MAX_JSON_BYTES = 100_000_000  # the package's limit for a header
_MAX_RANK = 64  # numpy's limit
# Copying 1 GB took 0.17 s through maps of 64 MB, but 0.49 s and twice the memory through one map.
_MAPPED_BYTES = 1 << 26
_PICKLES = (".bin", ".pt", ".pth", ".ckpt")

_repr = reprlib.Repr()  # text from a file may be long and contain line ends
_repr.maxstring = 200
_show = _repr.repr


class FormatError(ValueError):
    """A file that violates the format; the message is one line with the file and the reason."""


@dataclasses.dataclass(frozen=True)
class Tensor:
    """A tensor in a file, not yet read; `offset` is the position of its first byte in the file."""

    file: pathlib.Path
    dtype: np.dtype
    shape: tuple[int, ...]
    offset: int

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize

    def read(self, index: tuple[slice, ...] = ()) -> np.ndarray:
        """A new array with `tensor[index]`; only the file's pages that contain it are read.

        Args:
          index: one slice with step 1 for each of the leading axes; other axes are read whole.

        Raises: ValueError for any other index; FormatError if the file has become shorter, or a
          bool is neither 0 nor 1.
        """
        if not self.shape and not index:
            return dataclasses.replace(self, shape=(1,)).read().reshape(()).copy()
        steps = [getattr(s, "step", 0) for s in index]
        if len(index) > len(self.shape) or not set(steps) <= {None, 1}:
            raise ValueError(f"index {index} of shape {list(self.shape)}: give slices of step 1")
        whole = [*index, *[slice(None)] * (len(self.shape) - len(index))]
        bounds = [slice(*s.indices(n)) for s, n in zip(whole, self.shape, strict=True)]
        out = np.empty([max(b.stop - b.start, 0) for b in bounds], self.dtype)
        if not out.size:
            return out
        first, *rest = bounds
        row_bytes = self.nbytes // self.shape[0]
        if out.nbytes == len(out) * row_bytes:
            self._read_whole_rows(out, first.start * row_bytes)
        else:
            n_rows = max(1, _MAPPED_BYTES // row_bytes)
            for row in range(first.start, first.stop, n_rows):
                rows = out[row - first.start :][:n_rows]
                rows[...] = self._map(row * row_bytes, len(rows))[:, *rest]
        if self.dtype == np.bool_ and np.max(out.view(np.uint8)) > 1:
            raise FormatError(f"{self.file} holds a bool that is neither 0 nor 1")
        return out

    def _read_whole_rows(self, out: np.ndarray, begin: int) -> None:
        """Reads without a map of the file, which would cost a page fault for each 4 KB."""
        left = out.reshape(-1).view(np.uint8)
        with self.file.open("rb", buffering=0) as file:
            file.seek(self.offset + begin)
            while left.size:
                if not (read := file.readinto(left.data)):
                    raise FormatError(f"{self.file} is shorter than when its header was read")
                left = left[read:]

    def _map(self, begin: int, n_rows: int) -> np.memmap:
        shape = (n_rows, *self.shape[1:])
        try:
            return np.memmap(self.file, self.dtype, "r", self.offset + begin, shape)
        except ValueError:
            raise FormatError(f"{self.file} is shorter than when its header was read") from None


def open_folder(folder: pathlib.Path) -> dict[str, Tensor]:
    """The tensors of model.safetensors, or of model.safetensors.index.json's shards.

    Only headers are read, and pickles (pytorch_model.bin) never are.

    Raises: FormatError if neither is there, if both are there with different tensors, if there is
      an adapter too, or if any file violates the format.
    """
    names = sorted(path.name for path in folder.glob("*"))
    if ADAPTER in names:
        raise FormatError(
            f"{folder} has {ADAPTER}: the model is another one with an adapter; merge them first"
            f" (merge_and_unload), or remove {ADAPTER} if the weights beside it are merged"
        )
    if INDEX in names:
        return _open_shards(folder)
    if SINGLE in names:
        return _read_header(resolve_inside(folder, SINGLE))
    if other := next((name for name in names if name.endswith(".safetensors")), None):
        raise FormatError(
            f"{folder} has {_show(other)} but neither {SINGLE} nor {INDEX}, the names that are"
            " read: is the download complete?"
        )
    if pickle := next((name for name in names if name.endswith(_PICKLES)), None):
        raise FormatError(
            f"{folder} has {_show(pickle)} but no {SINGLE}: a pickle runs code when it is"
            " opened, so none is; convert it elsewhere with the safetensors package"
        )
    raise FormatError(f"{folder} has neither {INDEX} nor {SINGLE}: is the download complete?")


def resolve_inside(folder: pathlib.Path, name: str, subfolder: str = "") -> pathlib.Path:
    """The path of the regular file `name` in `folder` or a subfolder, with links followed.

    A link may lead to another place in the folder, or from a snapshot in the Hugging Face cache
    (models--X--Y/snapshots/<revision>) to the blobs of the same model.

    Raises: FormatError for a link to any other place, a name that contains a path, a missing file,
      or one that is not a regular file.
    """
    if not isinstance(name, str) or not name.isprintable() or "/" in name or name in ("", ".."):
        raise FormatError(f"{folder}: {_show(name)} is not a plain file name")
    path = folder / subfolder / name
    try:
        root = folder.resolve(strict=True)
        target = path.resolve(strict=True)
        is_file = stat.S_ISREG(target.stat().st_mode)
    except (OSError, RuntimeError) as error:  # before Python 3.13, link loops raise RuntimeError
        reason = getattr(error, "strerror", None) or "its links form a loop"
        raise FormatError(f"{path} cannot be opened: {reason}") from None
    model = root.parent.parent
    in_cache = root.parent.name == "snapshots" and model.name.startswith("models--")
    if not (target.is_relative_to(root) or (in_cache and target.parent == model / "blobs")):
        raise FormatError(f"{path} is a link out of its folder: put the file itself there")
    if not is_file:
        raise FormatError(f"{path} is not a regular file")
    return target


class Writer:
    """Writes model.safetensors, or its shards and their index, in an existing folder.

        with Writer(folder, {"a": ((2, 3), np.dtype(np.float32))}) as writer:
            writer.write("a", a)

    After a failure, incomplete files remain: write in a temporary folder and rename that.

    Args:
      tensors: shape and dtype by name, in the order in which they will be written.
      max_shard_bytes: the most bytes of tensors in a shard, unless the shard is a single tensor.

    Raises: ValueError for tensors that the format does not support or, at the end of the `with`,
      for one that was not written; FileExistsError if the folder already has such files.
    """

    def __init__(
        self,
        folder: pathlib.Path,
        tensors: Mapping[str, tuple[tuple[int, ...], np.dtype]],
        *,
        max_shard_bytes: int = 4 * 10**9,
    ):
        if stale := next(folder.glob("model*.safetensors*"), None):
            raise FileExistsError(f"{stale} exists: write in an empty folder")
        self._folder = folder
        self._shards = _plan(folder, tensors, max_shard_bytes)
        self._tensors = {name: t for shard in self._shards for name, t in shard.items()}
        self._headers = {next(iter(shard)): _header(shard) for shard in self._shards}
        self._pending = collections.deque(self._tensors)
        self._stream: BinaryIO = io.BytesIO()  # replaced by the first shard's file

    def __enter__(self):
        return self

    def __exit__(self, error_type, error, traceback):
        self._stream.close()
        if error_type is not None:
            return
        if self._pending:
            raise ValueError(f"{self._folder} lacks {self._pending[0]!r}: write all that was named")
        if len(self._shards) > 1:
            index = {
                "metadata": {"total_size": sum(t.nbytes for t in self._tensors.values())},
                "weight_map": {name: t.file.name for name, t in self._tensors.items()},
            }
            (self._folder / INDEX).write_text(json.dumps(index, indent=2) + "\n")

    def write(self, name: str, array) -> None:
        """Writes the next of `tensors`; raises ValueError for another name, shape or dtype."""
        if not self._pending or name != self._pending[0]:
            upcoming = repr(self._pending[0]) if self._pending else "none"
            raise ValueError(f"{name!r} is not the next tensor to write: that is {upcoming}")
        array = np.asarray(array)
        due = self._tensors[name]
        if (array.shape, array.dtype) != (due.shape, due.dtype):
            got = f"{array.dtype}{list(array.shape)}"
            raise ValueError(f"{name!r} is {got}, not {due.dtype}{list(due.shape)}")
        if name in self._headers:
            self._stream.close()
            self._stream = due.file.open("xb")
            self._stream.write(self._headers[name])
        # Viewed as bytes, because the dtypes of ml_dtypes do not support the buffer protocol.
        self._stream.write(np.ascontiguousarray(array).reshape(-1).view(np.uint8).data)
        self._pending.popleft()


def _open_shards(folder: pathlib.Path) -> dict[str, Tensor]:
    path = resolve_inside(folder, INDEX)
    try:
        with path.open("rb") as stream:
            weight_map = _parse(stream.read(_MAX_JSON_BYTES + 1)).get("weight_map")
        if not _is_map_of_strings(weight_map) or not weight_map:
            raise ValueError("it has no weight_map from tensors to files")
    except (ValueError, RecursionError) as error:
        raise FormatError(f"{folder / INDEX} is refused: {error}") from None
    names = collections.defaultdict(set)
    for name, file in weight_map.items():
        names[file].add(name)
    if (folder / SINGLE).exists() and names.keys() != {SINGLE}:
        raise FormatError(
            f"{folder} has {SINGLE} and {INDEX} of other files: one is left from an earlier save;"
            f" remove it (Transformers would read {SINGLE})"
        )
    paths = {file: resolve_inside(folder, file) for file in sorted(names)}
    tensors = {}
    for file, path in paths.items():
        shard = _read_header(path)
        if wrong := sorted(names[file] ^ shard.keys()):
            verb = "holds" if wrong[0] in shard else "lacks"
            raise FormatError(f"{folder / file} {verb} {_show(wrong[0])}, against {INDEX}")
        tensors.update(shard)
    return tensors


def _read_header(path: pathlib.Path) -> dict[str, Tensor]:
    try:
        with path.open("rb") as stream:
            size = stream.seek(0, 2)
            stream.seek(0)
            if size < 8:
                raise ValueError(f"it has {size} bytes, too few for a header; download it again")
            (n,) = struct.unpack("<Q", stream.read(8))
            if n > min(_MAX_JSON_BYTES, size - 8):
                raise ValueError(f"its header would be {n} bytes of {size}; download it again")
            header = _parse(stream.read(n))
        if not _is_map_of_strings(header.pop("__metadata__", {})):
            raise ValueError("its __metadata__ is not a map of strings")
        tensors = {name: _tensor(path, name, entry, 8 + n) for name, entry in header.items()}
        _check_layout(tensors, 8 + n, size)
    except (ValueError, RecursionError) as error:
        raise FormatError(f"{path} is refused: {error}") from None
    return tensors


def _parse(text: bytes) -> dict:
    """A JSON object without duplicate keys at any level and with only finite numbers."""
    if len(text) > _MAX_JSON_BYTES:
        raise ValueError(f"it is longer than {_MAX_JSON_BYTES} bytes")
    if not text.startswith(b"{"):
        raise ValueError("its JSON does not start with {")
    return json.loads(
        text.decode(),  # decoded here, because json.loads would guess the encoding
        object_pairs_hook=_unique,
        parse_float=_finite,
        parse_constant=_finite,
    )


def _unique(pairs: list[tuple[str, object]]) -> dict:
    unique = dict(pairs)
    if len(unique) < len(pairs):
        ((twice, _),) = collections.Counter(key for key, _ in pairs).most_common(1)
        raise ValueError(f"{_show(twice)} comes twice in its JSON")
    for key in unique:
        key.encode()  # raises for a lone surrogate
    return unique


def _finite(text: str) -> float:
    if not math.isfinite(float(text)):
        raise ValueError(f"{_show(text)} is not a finite number")
    return float(text)


def _is_map_of_strings(value) -> bool:
    return isinstance(value, dict) and all(isinstance(v, str) for v in value.values())


def _tensor(path: pathlib.Path, name: str, entry, start: int) -> Tensor:
    shown = _show(name)
    match entry:
        case {"dtype": code, "shape": [*shape], "data_offsets": [begin, end]} if len(entry) == 3:
            counts = all(type(n) is int and n >= 0 for n in (*shape, begin, end))
        case _:
            counts = False
    if not counts or len(shape) > _MAX_RANK:
        raise ValueError(f"{shown} is not dtype, shape and data_offsets but {_show(entry)}")
    if not isinstance(code, str) or code not in _DTYPES:
        raise ValueError(f"{shown} has dtype {_show(code)}, not one of {', '.join(_DTYPES)}")
    tensor = Tensor(path, _DTYPES[code], tuple(shape), start + begin)
    # numpy cannot address more, and it checks the other dimensions even if one is 0.
    if math.prod(max(n, 1) for n in shape) * tensor.dtype.itemsize > sys.maxsize:
        raise ValueError(f"{shown} has shape {_show(shape)}, more than can be addressed")
    if end - begin != tensor.nbytes:
        raise ValueError(f"{shown} has {_show(end - begin)} bytes, not its shape's {tensor.nbytes}")
    return tensor


def _check_layout(tensors: dict[str, Tensor], start: int, size: int) -> None:
    """Checks that the tensors fill the file from `start` to its end without overlap or gap."""
    at = start
    for name, tensor in sorted(tensors.items(), key=lambda item: (item[1].offset, item[1].nbytes)):
        if tensor.offset != at:
            wrong = "overlaps another tensor" if tensor.offset < at else "follows a hole"
            raise ValueError(f"{_show(name)} {wrong}")
        at += tensor.nbytes
    if at > size:
        raise ValueError(f"it is truncated: {size} bytes of {at}; download it again")
    if at < size:
        raise ValueError(f"{size - at} bytes at its end are of no tensor")


def _plan(folder: pathlib.Path, tensors: Mapping, max_bytes: int) -> list[dict[str, Tensor]]:
    """The tensors of each shard of at most `max_bytes`; offsets do not include the header."""
    shards: list[dict[str, Tensor]] = []
    at = 0
    for name, (shape, dtype) in tensors.items():
        tensor = Tensor(folder / SINGLE, np.dtype(dtype), tuple(shape), 0)
        if name == "__metadata__" or tensor.dtype not in _CODES:
            raise ValueError(f"{name!r} of {tensor.dtype} has no place in a safetensors file")
        if not shards or at + tensor.nbytes > max_bytes:
            shards.append({})
            at = 0
        shards[-1][name] = dataclasses.replace(tensor, offset=at)
        at += tensor.nbytes
    if not shards:
        raise ValueError("no tensors to write")
    if len(shards) == 1:
        return shards
    files = [f"model-{i + 1:05d}-of-{len(shards):05d}.safetensors" for i in range(len(shards))]
    return [
        {name: dataclasses.replace(t, file=folder / file) for name, t in shard.items()}
        for file, shard in zip(files, shards, strict=True)
    ]


def _header(shard: dict[str, Tensor]) -> bytes:
    header: dict = {"__metadata__": {"format": "pt"}}  # Transformers requires a format
    for name, t in shard.items():
        offsets = (t.offset, t.offset + t.nbytes)
        header[name] = {"dtype": _CODES[t.dtype], "shape": t.shape, "data_offsets": offsets}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # aligns the tensors, like the package
    if len(text) > _MAX_JSON_BYTES:
        raise ValueError(f"a header of {len(text)} bytes is longer than {_MAX_JSON_BYTES}")
    return struct.pack("<Q", len(text)) + text
