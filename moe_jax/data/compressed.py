"""Compressed files as streams of bytes, in bounded memory; damage and truncation are errors."""

import contextlib
import gzip
import io
import lzma
import re
import zlib
from collections.abc import Callable, Iterator
from typing import BinaryIO

from moe_jax.data import stored

ERRORS = (OSError, EOFError, lzma.LZMAError, zlib.error)  # raised by the streams of `open_file`
BUFFER_BYTES = 65_536
# How files of other formats begin, and what to do with one whose name says that it is text.
MAGIC = {
    rb"\x1f\x8b": ("gzip", "let its name end with .gz"),
    rb"\xfd7zXZ\0": ("xz", "let its name end with .xz"),
    rb"\x28\xb5\x2f\xfd": ("Zstandard", "let its name end with .zst"),
    rb"BZh[1-9](1AY&SY|\x17rE8P\x90)": ("bzip2", "decompress it"),
    rb"PK\x03\x04": ("a ZIP archive", "unpack it"),
    rb"PAR1[\x15\x19]": ("Parquet", "let its name end with .parquet"),
    rb"ARROW1\0\0": ("an Arrow file", "let its name end with .arrow"),
    rb"version https://git-lfs": ("a pointer of Git LFS", "get the file with git lfs pull"),
}


def format_of(path: stored.Path, sample: bytes | None = None) -> str:
    """The format of a file by its first bytes, with what to do; "" for one that is not known, or
    that the file's name says. `sample` is the beginning of its content, which may be compressed."""
    is_outer = sample is None or path.suffix not in OPENERS
    if sample is None:
        with contextlib.suppress(OSError), stored.opened(path) as file:
            sample = file.read(64)
    for form, (kind, fix) in MAGIC.items():
        is_named = is_outer and path.name.endswith(fix.rpartition(" ")[2])
        if re.match(form, sample or b"") and not is_named:
            return f"{kind}; {fix}"
    return ""


# Files of `xz -9` need 65 MB; a file can declare a dictionary of up to 4 GB.
XZ_MEMORY = 512 << 20


class _Xz(io.RawIOBase):
    """The concatenated streams of an .xz file.

    lzma.LZMAFile ends without an error where a later stream is damaged or where padding separates
    two streams, and the rest of the text is lost.
    """

    def __init__(self, file: BinaryIO):
        self._file = file
        self._stream: lzma.LZMADecompressor | None = None

    def readable(self) -> bool:
        return True

    def readinto(self, buffer) -> int:
        while True:
            if self._stream is None or self._stream.eof:
                content = self._stream.unused_data.lstrip(b"\0") if self._stream else b""
                while not content:
                    if not (chunk := self._file.read(BUFFER_BYTES)):
                        return 0
                    content = chunk.lstrip(b"\0")  # streams may be padded
                self._stream = lzma.LZMADecompressor(memlimit=XZ_MEMORY)
            else:
                content = self._file.read(BUFFER_BYTES) if self._stream.needs_input else b""
                if self._stream.needs_input and not content:
                    raise EOFError("the last stream has no end")
            if found := self._stream.decompress(content, len(buffer)):
                buffer[: len(found)] = found
                return len(found)


def _zstandard(file: BinaryIO):
    import pyarrow  # this takes a quarter of a second, and other files do not need it

    # pyarrow reads concatenated and skippable frames, checks their checksums, refuses a truncated
    # frame and a window of more than 128 MB.
    return pyarrow.input_stream(file, compression="zstd")


OPENERS: dict[str, Callable] = {
    ".gz": lambda file: gzip.GzipFile(fileobj=file, mode="rb"),
    ".xz": lambda file: io.BufferedReader(_Xz(file), BUFFER_BYTES),
    ".zst": lambda file: io.BufferedReader(_zstandard(file), BUFFER_BYTES),
}


@contextlib.contextmanager
def open_file(path: stored.Path) -> Iterator[io.BufferedReader | gzip.GzipFile]:
    """The bytes of a file, decompressed if its name ends as one of `OPENERS`; it cannot seek.

    Raises: one of `ERRORS`, also while it is read.
    """
    with stored.opened(path) as file:
        if path.suffix not in OPENERS:
            yield file
            return
        if not stored.size(path):  # gzip and Zstandard would read a text without characters
            raise EOFError("it is empty, and even compressed nothing has some bytes")
        with OPENERS[path.suffix](file) as content:
            yield content
